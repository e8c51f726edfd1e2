"""Commands about the training data."""

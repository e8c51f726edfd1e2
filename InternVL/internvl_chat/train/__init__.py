"""Training: configuration, setup, the training loop and validation."""

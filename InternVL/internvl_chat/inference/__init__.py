"""Answer generation with a checkpoint."""

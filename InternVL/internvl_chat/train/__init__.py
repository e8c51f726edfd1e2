"""Training: arguments, what is trained, the step, checkpoints of a run."""

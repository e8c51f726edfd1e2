"""Plan a run before it starts: memory, time, checkpoints and cost of every parallel mode."""

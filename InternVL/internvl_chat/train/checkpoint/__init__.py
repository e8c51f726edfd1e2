"""Checkpoints: background saving, integrity checks, resuming, and the output folder."""

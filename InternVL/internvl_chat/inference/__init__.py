"""Answers from a checkpoint."""

"""Generating answers with a checkpoint."""

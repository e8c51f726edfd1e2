"""Evaluation of checkpoints: read benchmarks, generate answers, compute losses and scores, write reports."""

"""Evaluation of checkpoints: losses, answers, benchmarks, scores and reports."""

"""Evaluation of checkpoints: benchmarks, answers, losses, scores and reports."""

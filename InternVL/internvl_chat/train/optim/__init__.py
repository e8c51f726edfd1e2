"""Optimizers and learning-rate schedules, with an AdamW for bf16 weights."""

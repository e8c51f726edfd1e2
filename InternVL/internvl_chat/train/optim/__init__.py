"""Optimizers (including AdamW for bf16 weights) and learning-rate schedules."""

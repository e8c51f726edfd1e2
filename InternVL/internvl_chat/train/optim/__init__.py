"""AdamW for bf16 weights, other optimizers and schedules."""

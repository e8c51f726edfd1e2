"""Checks before the first step: memory plan, memory warm-up, sanity checks."""

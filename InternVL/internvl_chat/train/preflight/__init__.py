"""Checks before the first step: memory plan, dry run and sanity checks."""

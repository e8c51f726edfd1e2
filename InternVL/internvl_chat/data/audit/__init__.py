"""Data checks before training: invalid records, duplicates, benchmark contamination, and the report."""

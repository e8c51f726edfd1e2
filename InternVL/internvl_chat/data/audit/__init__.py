"""Data checks before training: faulty records, duplicates, benchmark contamination, and the report."""

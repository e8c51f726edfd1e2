"""Token counts of all records, computed before training and cached."""

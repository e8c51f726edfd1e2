"""Data pipeline from the meta file to batches: records, tiles, labels and packs."""

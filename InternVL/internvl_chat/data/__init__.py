"""From the meta file to batches: records, tiles, labels, packs."""

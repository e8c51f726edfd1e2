"""From the meta file to packed tensors: records, tiles, turns, labels, datasets."""

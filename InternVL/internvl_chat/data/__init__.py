"""From the meta file to packed tensors: records, tiles, messages, labels, datasets."""

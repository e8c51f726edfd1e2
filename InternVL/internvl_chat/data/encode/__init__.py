"""From a record to ids, labels and tiles."""

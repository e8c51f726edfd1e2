"""Images in object storage and in tar shards."""

"""Index of a dataset's records (lengths, ids, hashes, problems), built before training and cached."""

"""Record index of each dataset (lengths, ids, hashes, problems), built before training and cached."""

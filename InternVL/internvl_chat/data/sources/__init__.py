"""User data as it is on disk: the meta file, annotation files, records and images."""

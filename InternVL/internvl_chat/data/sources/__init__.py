"""Reading what users bring: the meta file, annotation files, records and images."""

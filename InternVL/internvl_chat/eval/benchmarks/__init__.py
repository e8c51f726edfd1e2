"""Benchmarks as files on disk become items to be answered: one reader for each format."""

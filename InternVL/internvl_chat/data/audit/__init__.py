"""Checks of data sets: problems, duplicates, contamination, reports."""

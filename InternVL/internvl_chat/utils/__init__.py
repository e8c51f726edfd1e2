"""Helpers without domain knowledge: errors, logging, paths, process groups, files."""

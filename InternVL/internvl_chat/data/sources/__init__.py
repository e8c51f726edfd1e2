"""Readers of the user's files: meta file, annotation files, records and images.

To support a new record format, extend `records.py`; for a new type of annotation file, extend
`annotation_files.py`.
"""

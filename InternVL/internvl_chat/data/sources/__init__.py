"""User data as it is on disk: the meta file, annotation files, records and images.

To support another record layout, extend `records.py`; for another type of annotation file, extend
`annotation_files.py`.
"""

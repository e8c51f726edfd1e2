"""PMC-MI-Bench and folders in its format as tasks of lmms-eval; this folder is its `--include_path`."""

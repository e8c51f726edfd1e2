"""lmms-eval tasks for PMC-MI-Bench and folders in its format; pass this folder as `--include_path`."""

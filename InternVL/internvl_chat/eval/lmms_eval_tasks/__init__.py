"""lmms-eval tasks for PMC-MI-Bench and for folders in its format; pass this folder as `--include_path`."""

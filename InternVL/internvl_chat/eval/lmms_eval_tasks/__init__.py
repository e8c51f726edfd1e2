"""lmms-eval tasks for PMC-MI-Bench and folders in its format; use this folder as `--include_path`."""

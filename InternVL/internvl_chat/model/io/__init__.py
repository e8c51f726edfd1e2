"""Reading and writing of model folders and checkpoint formats."""

"""Reading and writing model folders and checkpoint formats."""

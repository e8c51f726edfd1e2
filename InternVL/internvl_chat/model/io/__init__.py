"""Model folders and checkpoint formats."""

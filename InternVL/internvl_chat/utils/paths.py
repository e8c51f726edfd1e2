"""Root of the repository; relative paths in meta files start there by default."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]

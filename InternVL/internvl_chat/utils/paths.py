"""Where the repository is, which relative paths in a meta file count from by default."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]

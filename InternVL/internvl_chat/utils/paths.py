"""Repository root and the base folder of relative paths in meta files.

If the package is installed outside the repository, the current folder is used instead.
"""

import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
REPOSITORY = _ROOT if (_ROOT / "pyproject.toml").is_file() else Path.cwd()


def data_root() -> Path:
    """Return the default base folder of relative paths in meta files: `$DATA_ROOT`, or the repository."""
    return Path(os.environ.get("DATA_ROOT") or REPOSITORY).expanduser()

"""Root of the repository; relative paths in meta files start there by default.

If the package is installed elsewhere, the current folder takes the place of the repository.
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
REPOSITORY = _ROOT if (_ROOT / "pyproject.toml").is_file() else Path.cwd()

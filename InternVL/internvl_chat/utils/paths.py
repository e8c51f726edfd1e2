"""Repository root, default base folder for relative paths in meta files, and state and cache folders.

If the package is not run from the repository, the current folder takes the place of the repository root.
"""

import os
import tempfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
REPOSITORY = _ROOT if (_ROOT / "pyproject.toml").is_file() else Path.cwd()


def data_root() -> Path:
    """Return the default base folder for relative paths in meta files: `$DATA_ROOT`, or the repository."""
    return Path(os.environ.get("DATA_ROOT") or REPOSITORY).expanduser()


def state_folder() -> Path:
    """Return the folder for state, such as histories: `$XDG_STATE_HOME/m3llm` or `~/.local/state/m3llm`.

    Raises:
        RuntimeError: the user has no home folder.
    """
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "m3llm"


def default_cache() -> Path:
    """Return the cache folder: `$M3LLM_CACHE`, `$XDG_CACHE_HOME/m3llm`, or `~/.cache/m3llm`."""
    if folder := os.environ.get("M3LLM_CACHE"):
        return Path(folder).expanduser()
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "m3llm"
    try:
        return Path("~/.cache/m3llm").expanduser()
    except RuntimeError:  # no home directory, as in some containers
        return Path(tempfile.gettempdir()) / "m3llm"

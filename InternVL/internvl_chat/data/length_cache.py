"""Lengths of a data set's records, and the folder where they are kept from one run to the next."""

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internvl_chat.data.encoding import Measured
from internvl_chat.logs import get_logger

logger = get_logger(__name__)

# To be raised by whoever changes what the numbers depend on: the template, the tiling, or this file.
_VERSION = 1


@dataclass(frozen=True, eq=False)
class Lengths:
    """What each of R records has.

    Attributes:
        tokens: (R,) int32.
        supervised: (R,) int32, tokens that are learnt.
        tiles: (R,) int32, of all images.
        file: where the numbers are cached, if they belong to one data set and are.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    tiles: np.ndarray
    file: Path | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Measured:
        """Return the numbers of one record."""
        return Measured(int(self.tokens[index]), int(self.supervised[index]), int(self.tiles[index]))

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The three arrays by name."""
        return {name: getattr(self, name) for name in Measured._fields}


def default_cache() -> Path:
    """Return the folder of cached lengths: `$M3LLM_CACHE`, `$XDG_CACHE_HOME/m3llm`, `~/.cache/m3llm`."""
    if own := os.environ.get("M3LLM_CACHE"):
        return Path(own).expanduser()
    if users := os.environ.get("XDG_CACHE_HOME"):
        return Path(users) / "m3llm"
    try:
        return Path("~/.cache/m3llm").expanduser()
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / "m3llm"


def cache_file(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Return the file of the lengths that depend on these facts (anything that JSON can hold)."""
    text = json.dumps({"version": _VERSION, **facts}, sort_keys=True)
    return folder / f"lengths-{hashlib.sha256(text.encode()).hexdigest()[:40]}.npz"


def read_lengths(file: Path, num_records: int) -> Lengths | None:
    """Return cached lengths, or None where there are none, or where the file is damaged."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            lengths = Lengths(**{name: stored[name] for name in Measured._fields}, file=file)
    except FileNotFoundError:
        return None
    except Exception as error:
        logger.warning("the cached lengths %s cannot be read (%s); measuring again", file, error)
        return None
    if any(a.shape != (num_records,) or a.dtype != np.int32 for a in lengths.columns.values()):
        logger.warning("the cached lengths %s are not of %d records; measuring again", file, num_records)
        return None
    return lengths


def write_lengths(file: Path, lengths: Lengths) -> bool:
    """Write lengths, in full or not at all; return whether that was possible, with a warning if not."""
    unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("xb") as stream:
            np.savez(stream, **lengths.columns)
        unfinished.replace(file)
    except OSError as error:
        logger.warning("the lengths cannot be kept for the next run (set M3LLM_CACHE to a folder): %s", error)
        with suppress(OSError):
            unfinished.unlink()
        return False
    return True

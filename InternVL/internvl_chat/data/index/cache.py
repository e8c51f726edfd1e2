"""What is known of a data set's records before they are used, and where it is kept from run to run."""

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

from internvl_chat.data.encode.encoder import Measured
from internvl_chat.data.sources.problems import Problem
from internvl_chat.data.sources.shown_images import ShownImages
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# To be raised by whoever changes what the numbers depend on: the template, the tiling, or this file.
_VERSION = 4


@dataclass(frozen=True, eq=False)
class Lengths:
    """What each of R records has.

    Attributes:
        tokens: (R,) int32.
        supervised: (R,) int32, tokens that are learnt.
        tiles: (R,) int32, of all images.
        tiles_lost: (R,) int32, given up for `max_seq_length`; none by default.
        tokens_cut: (R,) int32, cut off for `max_seq_length`; none by default.
        file: where the numbers are cached, if they belong to one data set and are.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    tiles: np.ndarray
    tiles_lost: np.ndarray | None = None
    tokens_cut: np.ndarray | None = None
    file: Path | None = None

    def __post_init__(self) -> None:
        for name in ("tiles_lost", "tokens_cut"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, np.zeros(len(self.tokens), np.int32))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Measured:
        """Return the numbers of one record."""
        return Measured(*(int(column[index]) for column in self.columns.values()))

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in Measured._fields}


@dataclass(frozen=True, eq=False)
class RecordIndex:
    """What is known of the R records of a data set that are used.

    Attributes:
        lengths: zeros where a record cannot be used.
        ids: as in the file, in a form that can be shown; None for none.
        names: (R,) uint64, hashes of the ids, 0 for none.
        contents: (R,) uint64, hashes of conversations and image paths, 0 where a record cannot be used.
        problems: in the order of the file; several may be of one record.
        images: of the records that can be used.
        decoded: whether the images were decoded.
    """

    lengths: Lengths
    ids: list[str | None]
    names: np.ndarray
    contents: np.ndarray
    problems: list[Problem]
    images: ShownImages
    decoded: bool = False

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def unusable(self) -> list[int]:
        """Indices of the records that cannot be used."""
        return sorted({problem.index or 0 for problem in self.problems if problem.is_error})

    def same_as(self, other: "RecordIndex") -> bool:
        """Return whether both say the same of the same records, of which some may have been looked at again.

        Images that are the same make for the same lengths.
        """
        return self.problems == other.problems and self.images.same_as(other.images)


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
    """Return the file of what depends on these facts (anything that JSON can hold)."""
    text = json.dumps({"version": _VERSION, **facts}, sort_keys=True)
    return folder / f"records-{hashlib.sha256(text.encode()).hexdigest()[:40]}.npz"


def read_index(file: Path, num_records: int) -> RecordIndex | None:
    """Return what was kept, or None where there is nothing, or where the file is damaged."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            lengths = Lengths(**{name: stored[name] for name in Measured._fields}, file=file)
            texts = json.loads(stored["texts"].tobytes())
            problems = [Problem(*row)._replace(file=Path(row[2])) for row in texts["problems"]]
            index = RecordIndex(
                lengths,
                texts["ids"],
                stored["names"],
                stored["contents"],
                problems,
                ShownImages.from_arrays(stored, num_records),
                texts["decoded"],
            )
    except FileNotFoundError:
        return None
    except Exception as error:
        logger.warning("the cached lengths %s cannot be read (%s); measuring again", file, error)
        return None
    numbers = [(column, np.int32) for column in lengths.columns.values()]
    numbers += [(index.names, np.uint64), (index.contents, np.uint64)]
    if any(a.shape != (num_records,) or a.dtype != t for a, t in numbers) or len(index.ids) != num_records:
        logger.warning("the cached lengths %s are not of %d records; measuring again", file, num_records)
        return None
    return index


def write_index(file: Path, index: RecordIndex) -> bool:
    """Keep an index, in full or not at all; return whether that was possible, with a warning if not."""
    unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")
    problems = [problem._replace(file=str(problem.file)) for problem in index.problems]
    texts = json.dumps({"ids": index.ids, "problems": problems, "decoded": index.decoded})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("xb") as stream:
            np.savez(
                stream,
                texts=np.frombuffer(texts.encode(), np.uint8),
                names=index.names,
                contents=index.contents,
                **index.lengths.columns,
                **index.images.to_arrays(),
            )
        unfinished.replace(file)
    except OSError as error:
        logger.warning("the lengths cannot be kept for the next run (set M3LLM_CACHE to a folder): %s", error)
        with suppress(OSError):
            unfinished.unlink()
        return False
    return True

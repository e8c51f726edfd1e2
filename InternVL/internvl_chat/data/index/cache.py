"""Index of a dataset's records and its on-disk cache."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from internvl_chat.data.encode.encoder import RecordLengths
from internvl_chat.data.index.image_manifest import ImageManifest
from internvl_chat.data.sources.problems import Problem
from internvl_chat.utils.files import atomic_path, sha256
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Increase when the template, the tiling, the kinds of problems or the cache format changes.
_VERSION = 8


@dataclass(frozen=True, eq=False)
class Lengths:
    """The `RecordLengths` of R records, one array per field.

    Attributes:
        tokens: (R,) int32, number of tokens.
        supervised: (R,) int32, number of supervised tokens.
        tiles: (R,) int32, tiles of all images.
        tiles_lost: (R,) int32, tiles removed to fit `max_seq_length`; zeros by default.
        tokens_truncated: (R,) int32, tokens removed to fit `max_seq_length`; zeros by default.
        file: cache file of the dataset, if any.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    tiles: np.ndarray
    tiles_lost: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    tokens_truncated: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    file: Path | None = None

    def __post_init__(self) -> None:
        for name in ("tiles_lost", "tokens_truncated"):
            if not len(getattr(self, name)):
                object.__setattr__(self, name, np.zeros(len(self.tokens), np.int32))

    @classmethod
    def from_columns(cls, columns: Mapping[str, np.ndarray], file: Path | None = None) -> "Lengths":
        """Create lengths from arrays keyed by field name, as in `columns`."""
        tokens, supervised, tiles, lost, truncated = (columns[name] for name in RecordLengths._fields)
        return cls(tokens, supervised, tiles, lost, truncated, file)

    def select(self, records: np.ndarray) -> "Lengths":
        """Return the lengths of the selected records (indices or mask)."""
        return Lengths.from_columns({name: column[records] for name, column in self.columns.items()})

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> RecordLengths:
        """Return the lengths of one record."""
        return RecordLengths(*(int(column[index]) for column in self.columns.values()))

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The arrays, keyed by field name."""
        return {name: getattr(self, name) for name in RecordLengths._fields}


@dataclass(frozen=True, eq=False)
class RecordIndex:
    """Lengths, ids, hashes and problems of the R records of a dataset.

    Attributes:
        lengths: lengths of all records; zeros for unusable records.
        ids: printable ids; None for records without one.
        id_hashes: (R,) uint64, 0 for records without an id.
        content_hashes: (R,) uint64, hashes of the conversation and image paths; 0 for unusable records.
        problems: problems in file order; a record may have more than one.
        images: image files of the usable records.
        decoded: whether all images were decoded.
    """

    lengths: Lengths
    ids: list[str | None]
    id_hashes: np.ndarray
    content_hashes: np.ndarray
    problems: list[Problem]
    images: ImageManifest
    decoded: bool = False

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def unusable(self) -> list[int]:
        """Indices of the unusable records."""
        return sorted({problem.index or 0 for problem in self.problems if problem.is_error})

    def equals(self, other: "RecordIndex") -> bool:
        """Return whether two indexes of one annotation file are equal.

        Only problems and images are compared: the rest follows from the annotation file and the images.
        """
        return self.problems == other.problems and self.images.equals(other.images)


def cache_file(folder: Path, key: Mapping[str, Any]) -> Path:
    """Return the cache file for a JSON-serializable key."""
    text = json.dumps({"version": _VERSION, **key}, sort_keys=True)
    return folder / f"records-{sha256(text.encode())[:40]}.npz"


def read_index(file: Path, num_records: int) -> RecordIndex | None:
    """Read a cached index; return None if it is missing or damaged."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            lengths = Lengths.from_columns(arrays, file)
            metadata = json.loads(arrays["metadata"].tobytes())
            index = RecordIndex(
                lengths,
                metadata["ids"],
                arrays["id_hashes"],
                arrays["content_hashes"],
                [Problem(*row)._replace(file=Path(row[2])) for row in metadata["problems"]],
                ImageManifest.from_arrays(arrays, num_records),
                metadata["decoded"],
            )
    except FileNotFoundError:
        return None
    except Exception as error:
        logger.warning("cannot read the length cache %s (%s); recomputing it", file, error)
        return None
    columns = [*lengths.columns.values(), index.id_hashes, index.content_hashes]
    dtypes = [np.dtype(np.int32)] * len(lengths.columns) + [np.dtype(np.uint64)] * 2
    shapes_match = {column.shape for column in columns} == {(num_records,)}
    if not shapes_match or [c.dtype for c in columns] != dtypes or len(index.ids) != num_records:
        logger.warning(
            "the length cache %s does not match the dataset (%d records); recomputing it", file, num_records
        )
        return None
    return index


def write_index(file: Path, index: RecordIndex) -> bool:
    """Write an index to the cache atomically; on failure, log a warning and return False."""
    problems = [[*problem[:2], str(problem.file), *problem[3:]] for problem in index.problems]
    metadata = json.dumps({"ids": index.ids, "problems": problems, "decoded": index.decoded})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as partial, partial.open("xb") as stream:
            arrays: dict[str, Any] = {
                "metadata": np.frombuffer(metadata.encode(), np.uint8),
                "id_hashes": index.id_hashes,
                "content_hashes": index.content_hashes,
                **index.lengths.columns,
                **index.images.to_arrays(),
            }
            np.savez(stream, **arrays)
    except OSError as error:
        logger.warning("cannot write the length cache: %s; set M3LLM_CACHE to a different folder", error)
        return False
    return True

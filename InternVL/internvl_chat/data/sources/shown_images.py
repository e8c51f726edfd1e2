"""The image files that records show, as they were when they were looked at.

An outcome that was kept holds only as long as these files do: `stale` compares them with the disk.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

# On a network's disk a question waits for its answer; several wait together.
_THREADS = 16
_ASKED_AT_ONCE = 2048
# No file has it.
_GONE = (-1, -1)


class ShownImage(NamedTuple):
    """An image file of a record.

    Attributes:
        name: its path as the record gives it.
        num_bytes: its size.
        mtime_ns: when it was last changed.
    """

    name: str
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True, eq=False)
class ShownImages:
    """The I distinct images that the records of a data set show in U places.

    Attributes:
        names: as the records give them.
        states: (I, 2) int64, size in bytes and time of the last change in nanoseconds.
        uses: (U, 2) int32, a record's index and the number of an image that it shows.
    """

    names: list[str]
    states: np.ndarray
    uses: np.ndarray

    @classmethod
    def none(cls) -> "ShownImages":
        """Return those of records that show nothing."""
        return cls([], np.zeros((0, 2), np.int64), np.zeros((0, 2), np.int32))

    def stale(self, root: Path) -> np.ndarray:
        """Return the indices of the records that show a file which has changed or is gone.

        Args:
            root: folder that the names count from.
        """
        changed = (_states(os.fspath(root), self.names) != self.states).any(axis=1)
        return np.unique(self.uses[changed[self.uses[:, 1]], 0])

    def replace(self, records: np.ndarray, shown: Sequence[Sequence[ShownImage]]) -> "ShownImages":
        """Return what is shown when some records have been looked at again.

        Args:
            records: (N,) their indices.
            shown: what each of them shows now.
        """
        kept = self.uses[~np.isin(self.uses[:, 0], records)]
        known = map(ShownImage, self.names, *self.states.T.tolist())
        numbers = {image: number for number, image in enumerate(known)}
        added = [
            (record, numbers.setdefault(image, len(numbers)))
            for record, images in zip(records.tolist(), shown, strict=True)
            for image in images
        ]
        uses = np.concatenate([kept, np.array(added, np.int32).reshape(-1, 2)])
        used, uses[:, 1] = np.unique(uses[:, 1], return_inverse=True)
        every = list(numbers)
        images = [every[number] for number in used]
        states = np.array([image[1:] for image in images], np.int64).reshape(-1, 2)
        return ShownImages([image.name for image in images], states, uses)

    def same_as(self, other: "ShownImages") -> bool:
        """Return whether both are of the same files in the same state, shown by the same records."""
        pairs = ((self.states, other.states), (self.uses, other.uses))
        return self.names == other.names and all(np.array_equal(mine, its) for mine, its in pairs)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return all as arrays that a file can hold."""
        names = b"\0".join(map(os.fsencode, self.names))
        return {"images": np.frombuffer(names, np.uint8), "states": self.states, "uses": self.uses}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], num_records: int) -> "ShownImages":
        """Return what `to_arrays` was made of.

        Raises:
            ValueError: the arrays do not belong together, or not to so many records.
        """
        content = arrays["images"].tobytes()
        names = [os.fsdecode(name) for name in content.split(b"\0")] if content else []
        states, uses = arrays["states"], arrays["uses"]
        fits = states.shape == (len(names), 2) and uses.ndim == 2 and uses.shape[1] == 2
        if not fits or (states.dtype, uses.dtype) != (np.int64, np.int32):
            raise ValueError("its images are no table of files")
        if ((uses < 0) | (uses >= (num_records, len(names)))).any():
            raise ValueError("its images are not those of its records")
        return cls(names, states, uses)


def _states(root: str, names: Sequence[str]) -> np.ndarray:
    """Return size and time of the last change of files, (N, 2) int64; -1 for one that is not there."""
    parts = [names[i : i + _ASKED_AT_ONCE] for i in range(0, len(names), _ASKED_AT_ONCE)]
    with ThreadPoolExecutor(_THREADS) as pool:
        states = [state for part in pool.map(lambda part: _states_of(root, part), parts) for state in part]
    return np.array(states, np.int64).reshape(-1, 2)


def _states_of(root: str, names: Sequence[str]) -> list[tuple[int, int]]:
    states = []
    for name in names:
        try:
            status = os.stat(os.path.join(root, name))  # noqa: PTH116, PTH118 (a tenth of pathlib's time)
        except OSError:
            states.append(_GONE)
        else:
            states.append((status.st_size, status.st_mtime_ns))
    return states

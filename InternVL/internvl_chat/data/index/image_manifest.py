"""Manifest of a dataset's image files, used to find records whose images changed since they were indexed."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from internvl_chat.data.sources.images import ImageFile
from internvl_chat.data.storage.stores import ImageStore
from internvl_chat.utils.files import sha256

# Threads overlap the round trips of stat calls on a network file system.
_THREADS = 16
_CHUNK = 2048
_MISSING = (-1, -1)


@dataclass(frozen=True, eq=False)
class ImageManifest:
    """The distinct image files of a dataset, and which records use them.

    Attributes:
        names: path of each of the I files, as written in the records.
        states: (I, 2) int64, size in bytes and version of each file; see `ImageFile`.
        uses: (U, 2) int32, one row for each image of each record: index of the record, and position of the
            image in `names`.
    """

    names: list[str]
    states: np.ndarray
    uses: np.ndarray

    @classmethod
    def empty(cls) -> "ImageManifest":
        """Return a manifest without images."""
        return cls([], np.zeros((0, 2), np.int64), np.zeros((0, 2), np.int32))

    def changed_records(self, root: Path | ImageStore) -> np.ndarray:
        """Return the sorted indices of the records with a changed or missing image file.

        Args:
            root: folder that the names are relative to, or store of the images.
        """
        if isinstance(root, ImageStore):
            states = root.states(self.names)
        else:
            states = _states(os.fspath(root), self.names)
        changed = (states != self.states).any(axis=1)
        return np.unique(self.uses[changed[self.uses[:, 1]], 0])

    def update(self, records: np.ndarray, images: Sequence[Sequence[ImageFile]]) -> "ImageManifest":
        """Return a manifest in which the images of the given records are replaced.

        Args:
            records: (N,) record indices.
            images: images of each of these records.
        """
        other_uses = self.uses[~np.isin(self.uses[:, 0], records)]
        listed = map(ImageFile, self.names, *self.states.T.tolist())
        positions = {file: position for position, file in enumerate(listed)}
        new_uses = [
            (record, positions.setdefault(file, len(positions)))
            for record, record_images in zip(records.tolist(), images, strict=True)
            for file in record_images
        ]
        uses = np.concatenate([other_uses, np.array(new_uses, np.int32).reshape(-1, 2)])
        used, uses[:, 1] = np.unique(uses[:, 1], return_inverse=True)
        all_files = list(positions)
        files = [all_files[position] for position in used]
        states = np.array([file[1:] for file in files], np.int64).reshape(-1, 2)
        return ImageManifest([file.name for file in files], states, uses)

    def digest(self, excluded: Collection[int]) -> str:
        """Return a hash of image names and sizes.

        Args:
            excluded: indices of records to leave out; an image counts if any other record uses it.
        """
        used = np.unique(self.uses[~np.isin(self.uses[:, 0], list(excluded)), 1])
        files = sorted((self.names[position], int(self.states[position, 0])) for position in used)
        return sha256(json.dumps(files).encode())

    def equals(self, other: "ImageManifest") -> bool:
        """Return whether two manifests list the same files in the same state, used by the same records."""
        arrays = ((self.states, other.states), (self.uses, other.uses))
        return self.names == other.names and all(np.array_equal(a, b) for a, b in arrays)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the manifest as arrays for `np.savez`."""
        names = b"\0".join(map(os.fsencode, self.names))
        return {"images": np.frombuffer(names, np.uint8), "states": self.states, "uses": self.uses}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], num_records: int) -> "ImageManifest":
        """Restore a manifest from the arrays of `to_arrays`.

        Raises:
            ValueError: the arrays are malformed or do not match the number of records.
        """
        content = arrays["images"].tobytes()
        names = [os.fsdecode(name) for name in content.split(b"\0")] if content else []
        states, uses = arrays["states"], arrays["uses"]
        shapes_match = states.shape == (len(names), 2) and uses.ndim == 2 and uses.shape[1] == 2
        if not shapes_match or states.dtype != np.int64 or uses.dtype != np.int32:
            raise ValueError("the image manifest is malformed")
        if ((uses < 0) | (uses >= (num_records, len(names)))).any():
            raise ValueError("the image manifest does not match the records")
        return cls(names, states, uses)


def _states(root: str, names: Sequence[str]) -> np.ndarray:
    """Return the size and modification time of each file, (N, 2) int64; -1 for missing files."""
    chunks = [names[i : i + _CHUNK] for i in range(0, len(names), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        states = [
            state for chunk in pool.map(lambda chunk: _chunk_states(root, chunk), chunks) for state in chunk
        ]
    return np.array(states, np.int64).reshape(-1, 2)


def _chunk_states(root: str, names: Sequence[str]) -> list[tuple[int, int]]:
    states = []
    for name in names:
        try:
            status = os.stat(os.path.join(root, name))  # noqa: PTH116, PTH118 (ten times faster than pathlib)
        except OSError:
            states.append(_MISSING)
        else:
            states.append((status.st_size, status.st_mtime_ns))
    return states

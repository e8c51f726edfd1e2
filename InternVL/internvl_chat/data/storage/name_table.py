"""Compact table from names to rows of integers, for millions of images."""

from collections.abc import Iterable

import numpy as np

from internvl_chat.data.storage.transfer import hash63


class NameTable:
    """Read-only mapping from N names to rows of K integers; each name takes 8 bytes, the size of its hash.

    Args:
        names: distinct names.
        rows: the rows, (N, K) int64.

    Raises:
        ValueError: two names are equal (or have the same hash: probability 5e-8 with a million names).
    """

    def __init__(self, names: Iterable[str], rows: np.ndarray) -> None:
        hashes = np.fromiter(map(_hash, names), np.int64)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._rows = hashes[order], np.ascontiguousarray(rows[order])
        if (self._hashes[1:] == self._hashes[:-1]).any():
            raise ValueError("two names are equal")

    def __len__(self) -> int:
        return len(self._hashes)

    def get(self, name: str) -> list[int] | None:
        """Return the row of a name; None if it is not in the table."""
        key = _hash(name)
        position = int(np.searchsorted(self._hashes, key))
        if position == len(self._hashes) or self._hashes[position] != key:
            return None
        return self._rows[position].tolist()


def _hash(name: str) -> int:
    return hash63(name.encode("utf-8", "surrogatepass"))

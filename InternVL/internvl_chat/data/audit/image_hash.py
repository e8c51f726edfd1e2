"""Fingerprints of an image: of its bytes, and of what it looks like.

The second is the DCT hash ("pHash"): the signs of the 63 lowest frequencies of a 32 x 32 grey picture
against their median. Copies that were scaled, compressed again or turned grey differ in a few bits.
"""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from internvl_chat.data.encode.tiling import to_rgb
from internvl_chat.data.sources.images import decode_image, open_image
from internvl_chat.data.sources.problems import RecordProblem

_SIDE = 32
_KEPT = 8
# Below this spread of grey levels a picture is a plain area, and its hash is noise.
_PLAIN = 4.0


class Fingerprint(NamedTuple):
    """Of one image.

    Attributes:
        content: SHA-256 of the file, the first 16 bytes; None where it cannot be read.
        look: 64 bits; None for a plain area, which looks like any other, and where it cannot be decoded.
        problem: why one of the two is missing, and what follows; None where nothing is.
    """

    content: bytes | None
    look: int | None
    problem: str | None = None


def fingerprint(path: Path) -> Fingerprint:
    """Return the fingerprint of an image file, as far as it can be read."""
    try:
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").digest()[:16]
    except (OSError, ValueError) as error:
        return Fingerprint(None, None, f"it cannot be read, so not compared: {error}")
    try:
        with open_image(path) as image:
            # A JPEG can be decoded at an eighth of its size; what is lost is averaged away anyhow.
            image.draft("RGB", (8 * _SIDE, 8 * _SIDE))
            return Fingerprint(content, perceptual_hash(to_rgb(image)))
    except (RecordProblem, OSError, ValueError, SyntaxError, MemoryError) as error:
        return Fingerprint(content, None, f"only its bytes are compared, not its look: {error}")


def perceptual_hash(image: Image.Image) -> int | None:
    """Return the 64 bits of an RGB image, or None for one that is a plain area."""
    grey = _grey(image)
    if grey.std() < _PLAIN:
        return None
    basis = _cosines()
    frequencies = (basis @ grey @ basis.T).ravel()
    # The first is the mean, whose bit would be the same for all.
    bits = frequencies > np.median(frequencies[1:])
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes())


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    """Return the lowest rows of the DCT-II, (8, 32)."""
    rows, columns = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None, :]
    return np.cos(np.pi * rows * (2 * columns + 1) / (2 * _SIDE))


def near_pairs(
    first: np.ndarray, second: np.ndarray, most: int, block: int = 1 << 22
) -> list[tuple[int, int, int]]:
    """Return all pairs of hashes that differ in at most so many bits.

    Args:
        first: (N,) uint64.
        second: (M,) uint64.
        most: bits that may differ.
        block: comparisons at a time; each takes 9 bytes.

    Returns:
        Place in `first`, place in `second`, and the bits that differ, in the order of the places.
    """
    found = []
    step = max(1, block // max(1, len(second)))
    for start in range(0, len(first), step):
        distances = np.bitwise_count(first[start : start + step, None] ^ second[None, :])
        for i, j in zip(*np.nonzero(distances <= most), strict=True):
            found.append((start + int(i), int(j), int(distances[i, j])))
    return found


def similarity(first: Path, second: Path) -> float:
    """Return the correlation of two images as 32 x 32 grey pictures; -1 where one cannot be decoded."""
    pictures = []
    for path in (first, second):
        try:
            grey = _grey(decode_image(path))
        except (RecordProblem, OSError):
            return -1.0
        centred = grey - grey.mean()
        pictures.append(centred / max(float(np.linalg.norm(centred)), 1e-9))
    return float((pictures[0] * pictures[1]).sum())


def _grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64)

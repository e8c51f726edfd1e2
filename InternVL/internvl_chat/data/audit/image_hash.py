"""Image fingerprints: SHA-256 of the file, and a perceptual hash that is robust to scaling and recompression.

The perceptual hash ("pHash") compares the lowest DCT frequencies of a 32 x 32 grayscale image with their
median. Scaled, recompressed and grayscale copies differ in a few of its 64 bits.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from internvl_chat.data.sources.images import ImageLocation, decode_image, image_sha256, open_image, to_rgb
from internvl_chat.data.sources.problems import RecordError

_SIDE = 32
_FREQUENCIES = 8
# An image with a smaller standard deviation of gray levels counts as uniform: its hash would be noise.
_MIN_DEVIATION = 4.0
# The lowest rows of the DCT-II matrix, (8, 32).
_COSINES = np.cos(np.pi / _SIDE * np.outer(np.arange(_FREQUENCIES), np.arange(_SIDE) + 0.5))


class Fingerprint(NamedTuple):
    """Fingerprint of one image.

    Attributes:
        content: SHA-256 of the file; None if the file is unreadable.
        look: perceptual hash; None if the image is uniform or cannot be decoded.
        problem: why the file cannot be read or decoded, and which comparison this prevents; None if readable.
    """

    content: str | None
    look: int | None
    problem: str | None = None


def fingerprint(path: ImageLocation) -> Fingerprint:
    """Return the fingerprint of an image file; hashes that cannot be computed are None."""
    try:
        content = image_sha256(path)
    except (RecordError, OSError, ValueError) as error:
        return Fingerprint(None, None, f"cannot be read, so not compared: {error}")
    try:
        with open_image(path) as image:
            # Decode JPEG files at reduced size: this is faster, and details are averaged out anyway.
            image.draft("RGB", (8 * _SIDE, 8 * _SIDE))
            return Fingerprint(content, perceptual_hash(to_rgb(image)))
    except (RecordError, OSError, ValueError, SyntaxError, MemoryError) as error:
        return Fingerprint(content, None, f"cannot be decoded, so only its bytes are compared: {error}")


def perceptual_hash(image: Image.Image) -> int | None:
    """Return the 64-bit DCT hash of an RGB image, or None for a uniform image."""
    gray = gray_levels(image)
    if gray.std() < _MIN_DEVIATION:
        return None
    frequencies = (_COSINES @ gray @ _COSINES.T).ravel()
    bits = frequencies > np.median(frequencies[1:])
    # The first bit compares the mean gray level, which exceeds the median in almost every image.
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes())


def near_pairs(
    first: np.ndarray, second: np.ndarray, max_bits: int, block: int = 1 << 22
) -> list[tuple[int, int, int]]:
    """Return all pairs of hashes that differ in at most `max_bits` bits.

    Args:
        first: hashes, (N,) uint64.
        second: hashes, (M,) uint64.
        block: number of comparisons at a time; each takes 9 bytes.

    Returns:
        (index in `first`, index in `second`, number of differing bits) of each pair, sorted by index.
    """
    pairs = []
    step = max(1, block // max(1, len(second)))
    for start in range(0, len(first), step):
        distances = np.bitwise_count(first[start : start + step, None] ^ second[None, :])
        for i, j in zip(*np.nonzero(distances <= max_bits), strict=True):
            pairs.append((start + int(i), int(j), int(distances[i, j])))
    return pairs


def similarity(first: ImageLocation, second: ImageLocation) -> float:
    """Return the correlation of two image files as 32 x 32 grayscale images; -1 if one cannot be decoded."""
    try:
        return correlation(gray_levels(decode_image(first)), gray_levels(decode_image(second)))
    except (RecordError, OSError):
        return -1.0


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation of two grayscale images from `gray_levels`; 0 if one is uniform."""
    centered = [gray - gray.mean() for gray in (first, second)]
    norms = [max(float(np.linalg.norm(gray)), 1e-9) for gray in centered]
    return float((centered[0] * centered[1]).sum()) / (norms[0] * norms[1])


def gray_levels(image: Image.Image) -> np.ndarray:
    """Return the gray levels of an image, downscaled to 32 x 32."""
    return np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64)

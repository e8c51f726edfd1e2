"""Previews of a record's images, and the tiles that the model receives."""

import io
import threading
from functools import lru_cache

import numpy as np
from PIL import Image

from internvl_chat.data.browse.record_view import encode_record
from internvl_chat.data.encode.tiling import Grid
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.image_content import ImageOptions
from internvl_chat.data.sources.images import ImageLocation, decode_image, image_info
from internvl_chat.data.sources.preview import jpeg_preview
from internvl_chat.data.sources.problems import RecordError

_FIGURE_PIXELS, _THUMBNAIL_PIXELS = 1200, 200
# A page requests all tiles of an image at once: it is decoded for the first request only.
_MAX_CACHED = 4
# One image at a time is decoded at full size, which takes up to 0.7 GB.
_lock = threading.Lock()


def thumbnail(records: RecordSet, index: int, image: int) -> bytes:
    """Return a small JPEG of an image, as read by the encoder.

    Raises:
        DataError: the record is malformed.
        RecordError: the record has no such image, or it cannot be decoded quickly.
    """
    return jpeg_preview(_path(records, index, image), _THUMBNAIL_PIXELS, _options(records))


def figure(records: RecordSet, index: int, image: int) -> bytes:
    """Return a JPEG of an image, as read by the encoder.

    Raises:
        DataError: the record is malformed.
        RecordError: the record has no such image, or it cannot be decoded.
    """
    path = _path(records, index, image)
    with _lock:
        return jpeg_preview(path, _FIGURE_PIXELS, _options(records), any_size=True)


def tile(records: RecordSet, index: int, image: int, number: int) -> bytes:
    """Return a tile as PNG: the pixels that the model receives, before normalization.

    Args:
        records: dataset of the record.
        index: index of the record.
        image: 0-based number of the image in the record.
        number: 0-based number of the tile; the thumbnail is the last one.

    Raises:
        DataError: the record is malformed.
        RecordError: the record is unusable, or has no such tile.
    """
    path = _path(records, index, image)
    grids, _ = encode_record(records, records.record(index))
    if not 0 <= number < grids[image].tiles:
        raise RecordError(f"image {image} has {grids[image].tiles} tiles")
    info = image_info(path)
    with _lock:
        pixels = _tiles(records, path, info.num_bytes, info.version, grids[image])
    stream = io.BytesIO()
    Image.fromarray(pixels[number]).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


@lru_cache(maxsize=_MAX_CACHED)
def _tiles(records: RecordSet, path: ImageLocation, num_bytes: int, version: int, grid: Grid) -> np.ndarray:
    """Return all tiles of an image, (N, S, S, 3) uint8, without augmentation."""
    return records.encoder.tiles([decode_image(path, _options(records))], [grid]).numpy()


def _options(records: RecordSet) -> ImageOptions:
    return records.encoder.preprocessing.image_options


def _path(records: RecordSet, index: int, image: int) -> ImageLocation:
    paths = records.image_paths(records.record(index))
    if not 0 <= image < len(paths):
        raise RecordError(f"the record has {len(paths)} images")
    return paths[image]

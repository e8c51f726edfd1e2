"""Locate images, read their headers and decode them; unusable images raise a `RecordError`.

An image is a file or a `StoredImage` (in tar shards or object storage). All images are opened here.
"""

import io
import os
import stat
import warnings
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile as PillowFile
from PIL.TiffImagePlugin import SAMPLEFORMAT, TiffImageFile

from internvl_chat.data.sources.image_content import (
    ImageContent,
    ImageOptions,
    content_warnings,
    flatten,
    has_alpha,
    has_transparent_pixels,
    orientation,
    read_content,
    turn,
    turned_size,
)
from internvl_chat.data.sources.image_names import describe_missing, describe_remote
from internvl_chat.data.sources.problems import RecordError
from internvl_chat.data.storage.manifest import normalized
from internvl_chat.data.storage.stores import ImageStore, StoredImage
from internvl_chat.data.storage.transfer import FileState
from internvl_chat.utils.errors import DataError, format_problems
from internvl_chat.utils.files import file_sha256, is_file, sha256
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

ImageLocation: TypeAlias = Path | StoredImage

# Like the reference: ignore transparency and EXIF rotation.
REFERENCE = ImageOptions()

# Pillow's default limit, fixed here because other libraries may raise it; 0.7 GB as decoded RGB.
MAX_PIXELS = 178_956_970
# Pillow already warns at half the limit; only the limit matters here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Formats that Pillow decodes itself; for others (such as EPS) it may run external programs.
_FORMATS = ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000", "AVIF")

# Value of the TIFF tag SampleFormat for signed integers.
_SIGNED = 2

_JPEG_END = b"\xff\xd9"
_END_MARKERS = {
    "JPEG": _JPEG_END,
    "MPO": _JPEG_END,
    "JPEG2000": _JPEG_END,
    "PNG": b"IEND\xaeB`\x82",
    "GIF": b"\0;",
}
# Padding that some programs append to files, and the number of bytes at the end to search.
_PADDING = b"\0\r\n "
_PADDING_WINDOW = 4096


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Return the accepted formats that this build of Pillow supports."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def locate_image(root: Path | ImageStore, name: str) -> ImageLocation:
    """Return the location of a record's image.

    A relative path must stay under the root. Absolute paths and symbolic links may point to any local file.

    Raises:
        RecordError: a relative path points outside the root, or the name is a URL or base64 data.
    """
    if problem := describe_remote(name):
        raise RecordError(problem, kind="image missing")
    if isinstance(root, ImageStore):
        if os.path.isabs(name):  # noqa: PTH117
            return Path(name)
        if normalized(name).split("/")[0] == os.pardir:
            raise _outside(root.root, name)
        return root.image(name)
    path = root / name
    if os.pardir in name and not Path(name).is_absolute():
        # Compare the paths without resolving symbolic links, which may point anywhere.
        base = os.path.abspath(root)  # noqa: PTH100
        if os.path.commonpath([base, os.path.abspath(path)]) != base:  # noqa: PTH100
            raise _outside(root, name)
    return path


def _outside(root: Path | str, name: str) -> RecordError:
    return RecordError(
        f"the image {name} is outside 'root' ({root}); set 'root' in the meta file to a folder that "
        "contains all images",
        kind="image outside root",
    )


def image_exists(root: Path | ImageStore, name: str) -> bool:
    """Return whether an image is known to exist under a root, without requests to object storage."""
    return root.contains(name) if isinstance(root, ImageStore) else is_file(root / name)


def image_state(path: ImageLocation) -> FileState:
    """Return the size of an image file and a number that changes with its content.

    Raises:
        RecordError: the file is missing, empty, or not a regular file.
    """
    if isinstance(path, StoredImage):
        state = path.state()
        if not state.num_bytes:
            raise _unreadable(path, "it is empty")
        return state
    status = _file_status(path)
    return FileState(status.st_size, status.st_mtime_ns)


def image_sha256(path: ImageLocation) -> str:
    """Return the SHA-256 of an image file in hexadecimal."""
    return sha256(path.read()) if isinstance(path, StoredImage) else file_sha256(path)


def _file_status(path: Path) -> os.stat_result:
    """Return the `stat` result of an image file.

    Raises:
        RecordError: the file is missing, empty, or not a regular file.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise _missing(path) from None
    except Exception as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise _unreadable(path, "it is not a regular file")
    if not status.st_size:
        raise _unreadable(path, "it is empty")
    return status


def _missing(path: Path) -> RecordError:
    reason = describe_missing(path) or "check 'root' in the meta file"
    return RecordError(f"the image {path} does not exist; {reason}", kind="image missing")


def _unreadable(name: ImageLocation | str, reason: object) -> RecordError:
    return RecordError(f"the image {name} cannot be read: {reason}", kind="image unreadable")


def open_image(path: ImageLocation) -> PillowFile:
    """Open an image and read its header; use the result as a context manager.

    Raises:
        RecordError: the file is missing, not an image, too large, or has an unsupported bit depth.
        StorageError: object storage is unavailable.
    """
    if isinstance(path, StoredImage):
        return open_upload(path.read(), str(path))
    _file_status(path)
    try:
        return _open_header(path, path)
    except FileNotFoundError:
        raise _missing(path) from None


def open_upload(data: bytes, name: str) -> PillowFile:
    """Read the header of an uploaded image; use the result as a context manager.

    Args:
        data: contents of the image file.
        name: name of the image in error messages.

    Raises:
        RecordError: the data are not a readable image, or the image is too large or has an unsupported bit
            depth.
    """
    if not data:
        raise _unreadable(name, "it is empty")
    return _open_header(io.BytesIO(data), name)


def _open_header(source: Path | io.BytesIO, name: Path | str) -> PillowFile:
    try:
        image = Image.open(source, formats=_formats())
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError:
        raise RecordError(
            f"the image {name} has more than {MAX_PIXELS:,} pixels; reduce its size", kind="image too large"
        ) from None
    except UnidentifiedImageError:
        raise _unreadable(name, f"its format is not one of {', '.join(_formats())}") from None
    except Exception as error:
        raise _unreadable(name, error) from error
    try:
        _check_header(name, image)
    except RecordError:
        image.close()
        raise
    return image


def _check_header(name: Path | str, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise RecordError(
            f"the image {name} has {width * height:,} pixels, more than {MAX_PIXELS:,}; reduce its size",
            kind="image too large",
        )
    if min(width, height) < 1:
        raise _unreadable(name, "it has no pixels")
    if problem := _depth_problem(image):
        raise RecordError(f"the image {name} has {problem}", kind="image depth")


def _depth_problem(image: Image.Image) -> str | None:
    """Describe channels that are not unsigned 8-bit, because converting them would clip or wrap values.

    Returns None if there are no such channels.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return f"more than 8 bits per channel (mode {image.mode}); convert it to 8 bits"
    if isinstance(image, TiffImageFile) and _SIGNED in image.tag_v2.get(SAMPLEFORMAT, ()):
        return "signed pixel values; convert it to unsigned 8 bits"
    return None


def to_rgb(image: Image.Image, background: str = REFERENCE.background) -> Image.Image:
    """Convert an image to RGB; an opaque RGB image is returned without a copy.

    Args:
        image: image in any mode.
        background: color behind transparent pixels; `none` drops transparency, like Pillow.

    Raises:
        ValueError: the image has signed channels or more than 8 bits per channel.
    """
    if problem := _depth_problem(image):
        raise ValueError(problem)
    image.load()
    if background != "none" and has_alpha(image):
        return flatten(image, background)
    return image if image.mode == "RGB" else image.convert("RGB")


def image_size(path: ImageLocation, options: ImageOptions = REFERENCE) -> tuple[int, int]:
    """Return the (width, height) of an image in pixels, reading only its header."""
    with open_image(path) as image:
        return turned_size(image.size, orientation(image), options)


def decode_image(path: ImageLocation, options: ImageOptions = REFERENCE) -> Image.Image:
    """Decode the first frame of an image to RGB.

    Args:
        path: image file.
        options: options for transparency and EXIF rotation.

    Raises:
        RecordError: the image cannot be opened (see `open_image`) or decoded.
    """
    with open_image(path) as image:
        return decode_opened(image, path, options)


def decode_opened(
    image: Image.Image, name: ImageLocation | str, options: ImageOptions = REFERENCE
) -> Image.Image:
    """Decode the first frame of an opened image to RGB.

    Args:
        image: result of `open_image` or `open_upload`.
        name: name of the image in error messages.
        options: how to read transparency and EXIF rotation.

    Raises:
        RecordError: the image cannot be decoded.
    """
    try:
        return to_rgb(turn(image, options), options.background)
    except Exception as error:
        raise RecordError(f"the image {name} cannot be decoded: {error}", kind="image unreadable") from error


class ImageInfo(NamedTuple):
    """Properties of an image file that do not require decoding it.

    Attributes:
        size: (width, height) in pixels, before EXIF rotation.
        content: number of frames, bit depth, orientation and transparency.
        has_end: whether the file ends as its format requires; otherwise it may be truncated.
        version: see `ImageFile`.
    """

    size: tuple[int, int]
    content: ImageContent
    has_end: bool
    num_bytes: int
    version: int


class ImageFile(NamedTuple):
    """Image file of a record: its name, and the size and version that identify its content.

    The version is the modification time in nanoseconds; in shards and object storage, it is a hash.
    """

    name: str
    num_bytes: int
    version: int


def image_info(path: ImageLocation) -> ImageInfo:
    """Read an image file's header and last bytes; cached per process until the file changes."""
    state = image_state(path)
    return ImageInfo(*_header_and_end(path, *state), *state)


@lru_cache(maxsize=1 << 16)
def _header_and_end(
    path: ImageLocation, num_bytes: int, version: int
) -> tuple[tuple[int, int], ImageContent, bool]:
    with open_image(path) as image:
        try:
            size, has_end = image.size, _has_end(path, image.format, num_bytes)
            return size, read_content(image), has_end
        except OSError as error:
            raise _unreadable(path, error) from error


def _has_end(path: ImageLocation, image_format: str | None, num_bytes: int) -> bool:
    """Return whether a file ends as its format requires; True for formats without an end marker.

    A complete file may still lack its end marker, for example if it is followed by other data.
    """
    if image_format not in _END_MARKERS and image_format != "WEBP":
        return True
    with path.open() if isinstance(path, StoredImage) else path.open("rb", buffering=0) as stream:
        if image_format == "WEBP":
            # "RIFF" and the length of the remaining file: https://developers.google.com/speed/webp/docs/riff_container
            return int.from_bytes(stream.read(8)[4:], "little") + 8 <= num_bytes
        stream.seek(max(0, num_bytes - _PADDING_WINDOW))
        return stream.read(_PADDING_WINDOW).rstrip(_PADDING).endswith(_END_MARKERS[image_format])


def check_decoding(path: ImageLocation, info: ImageInfo) -> bool:
    """Check that an image decodes and return whether it has transparent pixels.

    Cached per process until the file changes.

    Args:
        path: image file.
        info: result of `image_info(path)`.

    Raises:
        RecordError: the image cannot be decoded.
    """
    message, is_transparent = _decoding_result(path, info.num_bytes, info.version)
    if message:
        raise RecordError(message, kind="image unreadable")
    return is_transparent


@lru_cache(maxsize=1 << 16)
def _decoding_result(path: ImageLocation, num_bytes: int, version: int) -> tuple[str | None, bool]:
    """Return the decoding error, if any, and whether the image has transparent pixels."""
    try:
        decode_image(path)
        with open_image(path) as image:
            return None, has_transparent_pixels(image)
    except RecordError as error:
        return str(error), False


def open_images(paths: Iterable[str | Path], options: ImageOptions = REFERENCE) -> list[Image.Image]:
    """Decode image files and warn about content that the options discard.

    Raises:
        DataError: a file is missing or cannot be decoded; the message lists all such files.
    """
    images, problems = [], []
    for name in map(str, paths):
        try:
            images.append(_open(name, options))
        except RecordError as problem:
            problems.append(str(problem))
    if problems:
        raise DataError(format_problems(problems))
    return images


def _open(name: str, options: ImageOptions) -> Image.Image:
    path = Path(name)
    if remote := describe_remote(name):
        raise RecordError(remote)
    try:
        exists = path.exists()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not exists:
        reason = describe_missing(path)
        raise RecordError(f"the image {path} does not exist{f'; {reason}' if reason else ''}")
    info = image_info(path)
    # Look for transparent pixels, which decodes the image a second time, only if they would cause a warning.
    may_warn = info.content.has_alpha and options.background == "none"
    is_transparent = may_warn and check_decoding(path, info)
    for _, message in content_warnings([name], [info.content], options, [is_transparent]):
        logger.warning("%s", message)
    return decode_image(path, options)

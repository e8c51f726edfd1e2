"""Opening image files that may be anything: where they are, what they are and how large, before decoding."""

import os
import stat
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from internvl_chat.data.encode.tiling import has_eight_bits, to_rgb
from internvl_chat.data.sources.image_end import ends_well
from internvl_chat.data.sources.problems import RecordProblem

# Pillow's own bound, held here so that no setting of another library lifts it: 0.7 GB as RGB in memory.
MAX_PIXELS = 178_956_970
# Above half of that Pillow warns; the bound is ours.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# All that Pillow decodes by itself; it would start other programs for some of the rest (as EPS).
_FORMATS = ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000", "AVIF")


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Return the formats that this build of Pillow has."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def locate_image(root: Path, name: str) -> Path:
    """Return where an image of a record is.

    A relative path must stay under the root. An absolute one is taken as it is, and symbolic links are
    followed: both are ways to say on purpose that images are elsewhere.

    Raises:
        RecordProblem: the path leads out of the root.
    """
    path = root / name
    if os.pardir in name and not Path(name).is_absolute():
        # By the letters alone: where a link leads is its maker's business.
        base = os.path.abspath(root)  # noqa: PTH100
        if os.path.commonpath([base, os.path.abspath(path)]) != base:  # noqa: PTH100
            raise RecordProblem(
                f"the image {name} is outside 'root' ({root}); set 'root' in the meta file to a folder that "
                "holds all images",
                kind="image outside root",
            )
    return path


def _file_status(path: Path) -> os.stat_result:
    """Return size and times of an image file.

    Raises:
        RecordProblem: it does not exist, is no file, or is empty.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise _missing(path) from None
    except Exception as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise _unreadable(path, "it is no file")
    if not status.st_size:
        raise _unreadable(path, "it is empty")
    return status


def _missing(path: Path) -> RecordProblem:
    return RecordProblem(
        f"the image {path} does not exist; check 'root' in the meta file", kind="image missing"
    )


def _unreadable(path: Path, why: object) -> RecordProblem:
    return RecordProblem(f"the image {path} cannot be read: {why}", kind="image unreadable")


def open_image(path: Path) -> Image.Image:
    """Read an image's header; close what is returned (it is a context manager).

    Raises:
        RecordProblem: it does not exist, is no image, has too many pixels, or more than 8 bits a channel.
    """
    _file_status(path)
    try:
        image = Image.open(path, formats=_formats())
    except FileNotFoundError:
        raise _missing(path) from None
    except Image.DecompressionBombError:
        raise RecordProblem(
            f"the image {path} has more than {MAX_PIXELS:,} pixels; make it smaller", kind="image too large"
        ) from None
    except UnidentifiedImageError:
        raise _unreadable(path, f"it is none of {', '.join(_formats())}") from None
    except Exception as error:
        raise _unreadable(path, error) from error
    try:
        _check_header(path, image)
    except RecordProblem:
        image.close()
        raise
    return image


def _check_header(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise RecordProblem(
            f"the image {path} has {width * height:,} pixels, more than {MAX_PIXELS:,}; make it smaller",
            kind="image too large",
        )
    if min(width, height) < 1:
        raise _unreadable(path, "it has no pixels")
    if not has_eight_bits(image):
        raise RecordProblem(
            f"the image {path} cannot be used: it has more than 8 bits a channel (mode {image.mode}); "
            "convert it to 8 bits",
            kind="image depth",
        )


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) in pixels, from the header alone.

    Raises:
        RecordProblem: as `open_image`.
    """
    with open_image(path) as image:
        return image.size


def decode_image(path: Path) -> Image.Image:
    """Return an image in RGB, as Pillow converts it: the first frame, not turned by EXIF.

    Raises:
        RecordProblem: as `open_image`, or it cannot be decoded.
    """
    with open_image(path) as image:
        try:
            return to_rgb(image)
        except Exception as error:
            raise RecordProblem(
                f"the image {path} cannot be decoded: {error}", kind="image unreadable"
            ) from error


class ImageFacts(NamedTuple):
    """What is known of an image file before it is decoded.

    Attributes:
        size: (width, height) in pixels.
        ends_well: whether the file ends as its format says; if not, only decoding tells if it is whole.
        num_bytes: size of the file.
        mtime_ns: when it was last changed.
    """

    size: tuple[int, int]
    ends_well: bool
    num_bytes: int
    mtime_ns: int


def image_facts(path: Path) -> ImageFacts:
    """Look at an image's header and end, unless this process has done so and the file has not changed since.

    Raises:
        RecordProblem: as `open_image`.
    """
    status = _file_status(path)
    return ImageFacts(*_header_and_end(path, status.st_size, status.st_mtime_ns), status.st_size,
                      status.st_mtime_ns)  # fmt: skip


@lru_cache(maxsize=1 << 16)
def _header_and_end(path: Path, num_bytes: int, mtime_ns: int) -> tuple[tuple[int, int], bool]:
    with open_image(path) as image:
        try:
            return image.size, ends_well(path, image.format, num_bytes)
        except OSError as error:
            raise _unreadable(path, error) from error


@lru_cache(maxsize=1 << 16)
def _decoding_problem(path: Path, num_bytes: int, mtime_ns: int) -> str | None:
    try:
        decode_image(path)
    except RecordProblem as problem:
        return str(problem)
    return None


def check_decoding(path: Path, facts: ImageFacts) -> None:
    """Decode an image, unless this process has done so and the file has not changed since.

    Args:
        path: the file.
        facts: of `image_facts(path)`.

    Raises:
        RecordProblem: as `decode_image`.
    """
    problem = _decoding_problem(path, facts.num_bytes, facts.mtime_ns)
    if problem:
        raise RecordProblem(problem, kind="image unreadable")

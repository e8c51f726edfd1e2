"""Opening image files that may be anything: where they are, what they are and how large, before decoding."""

import os
import stat
import warnings
from functools import lru_cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from internvl_chat.data.problems import RecordProblem
from internvl_chat.data.tiling import has_eight_bits, to_rgb

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


def open_image(path: Path) -> Image.Image:
    """Read an image's header; close what is returned (it is a context manager).

    Raises:
        RecordProblem: it does not exist, is no image, has too many pixels, or more than 8 bits a channel.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise RecordProblem(f"the image {path} cannot be read: it is no file", kind="image unreadable")
        if not status.st_size:
            raise RecordProblem(f"the image {path} cannot be read: it is empty", kind="image unreadable")
        image = Image.open(path, formats=_formats())
    except FileNotFoundError:
        raise RecordProblem(
            f"the image {path} does not exist; check 'root' in the meta file", kind="image missing"
        ) from None
    except Image.DecompressionBombError:
        raise RecordProblem(
            f"the image {path} has more than {MAX_PIXELS:,} pixels; make it smaller", kind="image too large"
        ) from None
    except UnidentifiedImageError:
        raise RecordProblem(
            f"the image {path} cannot be read: it is none of {', '.join(_formats())}", kind="image unreadable"
        ) from None
    except RecordProblem:
        raise
    except Exception as error:
        raise RecordProblem(f"the image {path} cannot be read: {error}", kind="image unreadable") from error
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
        raise RecordProblem(f"the image {path} cannot be read: it has no pixels", kind="image unreadable")
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


@lru_cache(maxsize=1 << 16)
def _decoding_problem(path: Path, size: int, changed: int) -> str | None:
    try:
        decode_image(path)
    except RecordProblem as problem:
        return str(problem)
    return None


def check_decoding(path: Path) -> None:
    """Decode an image, unless this process has done so and the file has not changed since.

    Raises:
        RecordProblem: as `decode_image`.
    """
    image_size(path)
    status = path.stat()
    problem = _decoding_problem(path, status.st_size, status.st_mtime_ns)
    if problem:
        raise RecordProblem(problem, kind="image unreadable")

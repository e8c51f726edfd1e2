"""Image content that is lost in a single upright frame of opaque 8-bit RGB, and options to preserve it."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

# Malformed EXIF data does not affect the pixels.
warnings.filterwarnings("ignore", "Corrupt EXIF data", module="PIL")

_BIT_DEPTH = re.compile(r";(\d{2})")
# TIFF tags for the bits per channel and the page type; flag 1 is a reduced-size copy, flag 4 a mask.
_TIFF_BITS, _TIFF_PAGE, _TIFF_COPY = 258, 254, 0b101
# Formats whose EXIF or XMP orientation Pillow reads but does not apply. It does apply TIFF orientation.
_TURNED = ("JPEG", "MPO", "PNG", "WEBP", "AVIF")
_HEADER = 1 << 12
# Maximum number of TIFF pages to count: Pillow's time grows with the square of their number.
_MAX_PAGES = 1000


class ImageOptions(NamedTuple):
    """Options for transparency and EXIF rotation.

    Attributes:
        background: color behind transparent pixels; `none` drops transparency, like the reference.
        exif_transpose: apply the rotation stored as EXIF orientation.
    """

    background: str = "none"
    exif_transpose: bool = False


class ImageContent(NamedTuple):
    """Image properties from the file header.

    Attributes:
        frames: number of frames or pages; at most 1,000 pages of a TIFF are counted.
        bits: bits per channel.
        orientation: EXIF orientation; 1 is upright.
        has_alpha: whether pixels can be transparent.
    """

    frames: int = 1
    bits: int = 8
    orientation: int = 1
    has_alpha: bool = False


def read_content(image: ImageFile) -> ImageContent:
    """Return the properties of an opened image.

    Do not decode the image afterward, because a later frame may be selected.
    """
    return ImageContent(
        bits=_bits(image), orientation=orientation(image), has_alpha=has_alpha(image), frames=_frames(image)
    )


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation that Pillow has not applied; 1 if it is missing or invalid."""
    # If a PNG has no EXIF in its header, getexif() would decode the pixels to look for EXIF after them.
    sources = ("exif",) if image.format == "PNG" else ("exif", "xmp")
    if image.format not in _TURNED or not any(source in image.info for source in sources):
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return value if value in range(2, 9) else 1


def turned_size(size: tuple[int, int], orientation: int, options: ImageOptions) -> tuple[int, int]:
    """Return the (width, height) of an image after any rotation enabled by the options."""
    return size[::-1] if options.exif_transpose and orientation >= 5 else size


def turn(image: Image.Image, options: ImageOptions) -> Image.Image:
    """Apply the EXIF orientation if the options enable it."""
    if options.exif_transpose and orientation(image) != 1:
        return ImageOps.exif_transpose(image)
    return image


def has_alpha(image: Image.Image) -> bool:
    """Return whether an image has an alpha channel or a transparent color."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def has_transparent_pixels(image: Image.Image) -> bool:
    """Return whether any pixel of an image is transparent."""
    if not has_alpha(image):
        return False
    return any(image.convert("RGBA").getchannel("A").histogram()[:255])


def flatten(image: Image.Image, background: str) -> Image.Image:
    """Composite an image onto a background color and return it as RGB."""
    canvas = Image.new("RGBA", image.size, background)
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def _frames(image: ImageFile) -> int:
    """Return the number of frames or pages, excluding reduced-size copies and masks in a TIFF."""
    if image.format == "MPO":  # a photo with a preview or depth map
        return 1
    try:
        return _pages(image) if isinstance(image, TiffImageFile) else getattr(image, "n_frames", 1)
    except Exception:  # damaged after the first frame; later frames are not used
        return 1


def _pages(image: TiffImageFile) -> int:
    """Return the number of pages, up to `_MAX_PAGES`, that are neither reduced-size copies nor masks.

    If the first page is a copy or a mask, all pages count, because the full image follows.
    """
    copies = []
    with suppress(EOFError):
        for number in range(_MAX_PAGES):
            image.seek(number)
            copies.append(bool(image.tag_v2.get(_TIFF_PAGE, 0) & _TIFF_COPY))
    return len(copies) if copies[0] else copies.count(False)


def _bits(image: ImageFile) -> int:
    """Return the number of bits per channel."""
    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(_TIFF_BITS, (8,)))
    arguments = image.tile[0].args if image.tile else ()
    if image.format == "PPM" and isinstance(arguments, tuple) and isinstance(arguments[-1], int):
        return max(arguments[-1].bit_length(), 8)
    if image.format in ("JPEG2000", "AVIF"):
        return _coded_bits(_header(image), image.format)
    found = _BIT_DEPTH.search(str(arguments))
    return int(found[1]) if found else 8


def _header(image: ImageFile) -> bytes:
    """Return the first bytes of an opened image's file."""
    if image.filename:
        with Path(str(image.filename)).open("rb") as stream:
            return stream.read(_HEADER)
    assert image.fp is not None  # the bytes of an upload
    image.fp.seek(0)
    return image.fp.read(_HEADER)


def _coded_bits(header: bytes, image_format: str) -> int:
    """Return the number of bits per channel from the header of a JPEG 2000 or AVIF file.

    JPEG 2000: byte Ssiz of the first component in the SIZ marker segment (ISO/IEC 15444-1, A.5.1).
    AVIF: flags high_bitdepth and twelve_bit in the configuration box (AV1 in ISOBMFF, 2.3.3).
    """
    mark, offset = (b"\xff\x4f\xff\x51", 42) if image_format == "JPEG2000" else (b"av1C", 6)
    position = header.find(mark) + offset
    if position < offset or position >= len(header):
        return 8
    if image_format == "JPEG2000":
        return (header[position] & 0x7F) + 1
    return (8, 8, 10, 12)[header[position] >> 5 & 0b11]


def content_warnings(
    names: Sequence[str],
    contents: Sequence[ImageContent],
    options: ImageOptions,
    transparent: Sequence[bool | None],
) -> Iterator[tuple[str, str]]:
    """Yield a (kind, message) for each kind of image content that is ignored in a record.

    The kinds are frames after the first, transparency, color depth above 8 bits, and EXIF rotation.

    Args:
        names: name of each image.
        contents: properties of each image.
        options: options with which the images are read.
        transparent: whether each image has transparent pixels; None if it was not decoded.
    """
    unknown = "; --check full reports whether any pixel is transparent"
    found: dict[str, list[str]] = {}
    for name, content, visible in zip(names, contents, transparent, strict=True):
        if content.frames > 1:
            count = f"{content.frames} or more" if content.frames == _MAX_PAGES else content.frames
            found.setdefault("multiple frames", []).append(
                f"{name}: only the first of {count} pages or frames is used"
            )
        if content.has_alpha and visible is not False and options.background == "none":
            text = f"{name}: the transparency is dropped{unknown if visible is None else ''}"
            found.setdefault("transparency", []).append(text)
        if content.bits > 8:
            black = 1 << content.bits - 8
            text = (
                f"{name}: only the upper 8 of {content.bits} bits are used: values below {black} turn black"
            )
            found.setdefault("color depth", []).append(text)
        if content.orientation != 1 and not options.exif_transpose:
            text = f"{name}: EXIF orientation {content.orientation} is not applied"
            found.setdefault("exif rotation", []).append(text)
    for kind, messages in found.items():
        more = f" (and {len(messages) - 1} more images)" if len(messages) > 1 else ""
        yield kind, messages[0] + more

"""Whether an image file ends as its format says, which a copy that broke off does not."""

from pathlib import Path

_END_OF_JPEG = b"\xff\xd9"
_ENDS = {
    "JPEG": _END_OF_JPEG,
    "MPO": _END_OF_JPEG,
    "JPEG2000": _END_OF_JPEG,
    "PNG": b"IEND\xaeB`\x82",
    "GIF": b"\0;",
}
# What programs fill files up with, and as much of it as is looked through.
_PADDING = b"\0\r\n "
_WINDOW = 4096


def ends_well(path: Path, kind: str | None, num_bytes: int) -> bool:
    """Return whether the last bytes of an image file are those of a whole one.

    If not, it may still be whole: only decoding tells. Of TIFF, BMP, PPM and AVIF the end says nothing, and
    the answer is yes.

    Args:
        path: the file.
        kind: its format, in Pillow's words.
        num_bytes: its size.

    Raises:
        OSError: it cannot be read.
    """
    if kind not in _ENDS and kind != "WEBP":
        return True
    with path.open("rb", buffering=0) as stream:
        if kind == "WEBP":
            # RIFF, and how many bytes follow: https://developers.google.com/speed/webp/docs/riff_container
            return int.from_bytes(stream.read(8)[4:], "little") + 8 <= num_bytes
        stream.seek(max(0, num_bytes - _WINDOW))
        return stream.read(_WINDOW).rstrip(_PADDING).endswith(_ENDS[kind])

"""Decode images from requests, with limits on their number and size."""

from collections.abc import Sequence
from contextlib import ExitStack

from PIL import Image
from PIL.ImageFile import ImageFile

from internvl_chat.data.sources.image_content import (
    ImageOptions,
    content_warnings,
    has_transparent_pixels,
    read_content,
)
from internvl_chat.data.sources.images import decode_opened, open_upload
from internvl_chat.data.sources.problems import RecordError, printable_message
from internvl_chat.utils.errors import DataError, format_problems

# Limits per request. A decoded pixel takes 3 bytes.
MAX_IMAGES = 32
MAX_PIXELS = 1 << 26
MAX_BYTES = 32 << 20


def decode_uploads(
    files: Sequence[bytes], options: ImageOptions, names: Sequence[str] | None = None
) -> list[Image.Image]:
    """Decode the uploaded images of a request to RGB, after checking all headers.

    Args:
        files: contents of the image files.
        options: how to read transparency and EXIF rotation.
        names: names of the images in error messages (default: `#1`, `#2`, ...).

    Raises:
        DataError: an image is unusable, or there are too many images or pixels; the message lists all
            problems.
    """
    if len(files) > MAX_IMAGES:
        raise DataError(f"{len(files)} images; at most {MAX_IMAGES} are allowed")
    if names is None:
        names = [f"#{number}" for number in range(1, len(files) + 1)]
    with ExitStack() as stack:
        opened: list[ImageFile] = []
        problems = []
        for data, name in zip(files, names, strict=True):
            try:
                opened.append(stack.enter_context(open_upload(data, name)))
            except RecordError as problem:
                problems.append(printable_message(str(problem)))
        pixels = sum(image.width * image.height for image in opened)
        if pixels > MAX_PIXELS:
            problems.append(f"the images have {pixels:,} pixels in total; at most {MAX_PIXELS:,} are allowed")
        if problems:
            raise DataError(format_problems(problems))
        images = []
        for image, name in zip(opened, names, strict=True):
            try:
                images.append(decode_opened(image, name, options))
            except RecordError as problem:
                problems.append(printable_message(str(problem)))
    if problems:
        raise DataError(format_problems(problems))
    return images


def upload_warnings(data: bytes, name: str, options: ImageOptions) -> list[str]:
    """Return a warning for each kind of content that is ignored in an uploaded image.

    Args:
        data: contents of a file that `decode_uploads` accepts.
        name: name of the image in the warnings.
        options: how to read transparency and EXIF rotation.
    """
    with open_upload(data, name) as image:
        is_transparent = options.background == "none" and has_transparent_pixels(image)
    with open_upload(data, name) as image:
        contents = [read_content(image)]
    return [message for _, message in content_warnings([name], contents, options, [is_transparent])]

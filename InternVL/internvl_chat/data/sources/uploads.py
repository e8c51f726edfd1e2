"""Decode images from requests, with limits on their number and size."""

from collections.abc import Sequence
from contextlib import ExitStack

from PIL import Image
from PIL.ImageFile import ImageFile

from internvl_chat.data.sources.image_content import ImageOptions
from internvl_chat.data.sources.images import decode_opened, open_upload
from internvl_chat.data.sources.problems import RecordError, printable_message
from internvl_chat.utils.errors import DataError, format_problems

# Limits of one request. An RGB pixel takes 3 bytes.
MAX_IMAGES = 32
MAX_PIXELS = 1 << 26
MAX_BYTES = 32 << 20


def decode_uploads(files: Sequence[bytes], options: ImageOptions) -> list[Image.Image]:
    """Decode the uploaded images of a request to RGB; checks all headers before it decodes pixels.

    Args:
        files: contents of the image files.
        options: how to read transparency and EXIF rotation.

    Raises:
        DataError: an image is unusable, or there are too many images or pixels; the message lists all
            problems.
    """
    if len(files) > MAX_IMAGES:
        raise DataError(f"{len(files)} images; at most {MAX_IMAGES} are allowed")
    with ExitStack() as stack:
        opened: list[ImageFile] = []
        problems = []
        for number, data in enumerate(files, 1):
            try:
                opened.append(stack.enter_context(open_upload(data, f"#{number}")))
            except RecordError as problem:
                problems.append(printable_message(str(problem)))
        pixels = sum(image.width * image.height for image in opened)
        if pixels > MAX_PIXELS:
            problems.append(f"the images have {pixels:,} pixels in total; at most {MAX_PIXELS:,} are allowed")
        if problems:
            raise DataError(format_problems(problems))
        images = []
        for number, image in enumerate(opened, 1):
            try:
                images.append(decode_opened(image, f"#{number}", options))
            except RecordError as problem:
                problems.append(printable_message(str(problem)))
    if problems:
        raise DataError(format_problems(problems))
    return images

"""Small JPEG previews of image files for reports and the data browser."""

from internvl_chat.data.sources.image_content import ImageOptions, turn
from internvl_chat.data.sources.images import REFERENCE, ImageLocation, open_image, to_rgb
from internvl_chat.data.sources.problems import RecordError
from internvl_chat.utils.html import jpeg_thumbnail

# Decoding larger images takes seconds.
MAX_DECODED_PIXELS = 50_000_000


def jpeg_preview(
    path: ImageLocation, pixels: int, options: ImageOptions = REFERENCE, *, any_size: bool = False
) -> bytes:
    """Return an image file as a JPEG of at most `pixels` per side.

    Args:
        path: the image.
        pixels: maximum width and height.
        options: how to read transparency and EXIF rotation.
        any_size: also decode images with more than `MAX_DECODED_PIXELS`, which takes seconds.

    Raises:
        RecordError: the image cannot be decoded, or is too large to decode quickly.
    """
    with open_image(path) as image:
        if not any_size and image.width * image.height > MAX_DECODED_PIXELS:
            raise RecordError(f"{path}: too large for a thumbnail", "too large for a thumbnail")
        image.draft("RGB", (2 * pixels, 2 * pixels))  # JPEG files are decoded at reduced size
        try:
            return jpeg_thumbnail(to_rgb(turn(image, options), options.background), pixels)
        except Exception as error:
            raise RecordError(f"{path}: {error}", "image unreadable") from error

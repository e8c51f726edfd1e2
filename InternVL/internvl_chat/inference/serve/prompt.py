"""Convert a chat request to a prompt."""

import base64
import binascii

from internvl_chat.constants import IMAGE_PLACEHOLDER, IMG_CONTEXT
from internvl_chat.data.sources.image_content import ImageOptions
from internvl_chat.data.sources.records import Message
from internvl_chat.data.sources.uploads import MAX_IMAGES, decode_uploads
from internvl_chat.inference.engine import Prompt
from internvl_chat.inference.serve.schema import ChatRequest, ImagePart, TextPart
from internvl_chat.utils.errors import DataError


def to_prompt(request: ChatRequest, options: ImageOptions) -> Prompt:
    """Return the prompt of a request, with decoded images.

    An image part becomes a placeholder and a newline at its position, as in training records with content
    parts and in the chat template of exported models.

    Raises:
        DataError: a message or an image is unusable.
    """
    messages: list[Message] = []
    urls: list[str] = []
    for number, message in enumerate(request.messages):
        if message.role in ("system", "developer") and number:
            raise DataError(f"messages.{number}: only the first message can be a {message.role} message")
        images = [part.image_url.url for part in message.content if isinstance(part, ImagePart)]
        content = "".join(map(_text_of, message.content))
        if message.role == "user":
            _check_question(content, len(images), number)
        elif images:
            raise DataError(f"messages.{number}: only user messages can contain images")
        if IMG_CONTEXT in content:
            raise DataError(f"messages.{number} contains the reserved token {IMG_CONTEXT}")
        role = "system" if message.role == "developer" else message.role
        messages.append(Message(role, content))
        urls += images
    if messages[-1].role != "user":
        raise DataError("the last message must be a user message")
    if len(urls) > MAX_IMAGES:
        raise DataError(f"{len(urls)} images; at most {MAX_IMAGES} are allowed")
    files = [_content_of(url, number) for number, url in enumerate(urls, 1)]
    return Prompt(messages, decode_uploads(files, options))


def _text_of(part: TextPart | ImagePart) -> str:
    return part.text if isinstance(part, TextPart) else f"{IMAGE_PLACEHOLDER}\n"


def _check_question(content: str, images: int, number: int) -> None:
    if not content.strip():
        raise DataError(f"messages.{number} is empty")
    if content.count(IMAGE_PLACEHOLDER) != images:
        raise DataError(
            f"messages.{number} contains {IMAGE_PLACEHOLDER} as text; send images as parts of type image_url"
        )


def _content_of(url: str, number: int) -> bytes:
    """Return the contents of the image file in a data URL."""
    header, _, data = url.partition(",")
    kind = header.lower()
    if not kind.startswith("data:"):
        raise DataError(
            f"the image #{number} is not a data URL (data:image/png;base64,...); the server opens no other "
            "URLs and no files"
        )
    if not (kind.startswith("data:image/") and kind.endswith(";base64")):
        raise DataError(f"the image #{number} must be a data URL of the form data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"the image #{number} is not valid base64: {error}") from None

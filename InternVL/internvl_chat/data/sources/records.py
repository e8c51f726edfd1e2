"""Parse and validate records: `conversations` (LLaVA, ShareGPT) or `messages`, with any number of images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from internvl_chat.constants import IMAGE_PLACEHOLDER, IMG_CONTEXT
from internvl_chat.data.sources.dialects import file_in_text, foreign_placeholder, is_supervised, unread_media
from internvl_chat.data.sources.problems import RecordError

# Supported keys.
RECORD_KEYS = ("id", "conversations", "messages", "image", "images", "system")
MESSAGE_KEYS = ("from", "value", "role", "content")
PART_KEYS = ("type", "text", "image", "path", "url", "image_url")

_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# Types of image content parts; `image_url` is OpenAI's.
_IMAGE_PARTS = ("image", "image_url")
_PATH_KEYS = PART_KEYS[2:]


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: `system`, `user` or `assistant`.
        content: text of the message.
        supervised: whether its tokens contribute to the loss (assistant messages only).
    """

    role: str
    content: str
    supervised: bool = True


@dataclass(frozen=True)
class Record:
    """A conversation about any number of images.

    Attributes:
        messages: optional system message, then user and assistant messages, including at least one assistant
            message. The user messages contain one placeholder per image, in the order of the images.
        images: image paths, absolute or relative to the dataset's root.
    """

    id: str | None
    messages: tuple[Message, ...]
    images: tuple[str, ...]


def parse_record(raw: Any) -> Record:
    """Validate a record and convert it to messages and images.

    Images are listed under `image` or `images`, or else in the content parts of `messages`. A `system` field
    becomes the system message. Answers with a false or zero `loss` or `weight` are not supervised.

    A single image without a placeholder is placed before the first user message, as in InternVL.

    If `image` is a string, the reference inserts a placeholder before the first message, unless that message
    contains one. A system message then starts with a literal `<image>`, even if a user message contains the
    placeholder. For compatibility, this is done here as well.

    Raises:
        RecordError: the record is unusable; the message says how to fix it.
    """
    if not isinstance(raw, Mapping):
        raise RecordError(f"a record must be a JSON object, found {type(raw).__name__}")
    messages = _parse_messages(raw)
    images = _parse_images(raw)
    _reject_unsupported_media(raw, messages, images)
    unmarked_system = messages[0].role == "system" and IMAGE_PLACEHOLDER not in messages[0].content
    if len(images) == 1 and not _count_placeholders(messages):
        first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise RecordError(
                "the record has an image, but no human message for its placeholder", kind="placeholders"
            )
        _reject_foreign_placeholder(messages)
        messages = _add_placeholder(messages, first)
    elif isinstance(raw.get("image"), str) and images and unmarked_system:
        messages = _add_placeholder(messages, 0)
    placeholders = _count_placeholders(messages)
    if placeholders != len(images):
        found = f"{placeholders} {IMAGE_PLACEHOLDER} placeholders in the human messages"
        raise RecordError(f"{found}, but {len(images)} images{_hint(messages)}", kind="placeholders")
    if not images:
        _reject_foreign_placeholder(messages)
    record_id = raw.get("id")
    messages = (*_system_field(raw, messages), *messages)
    return Record(None if record_id is None else str(record_id), messages, images)


def _reject_unsupported_media(
    raw: Mapping[str, Any], messages: Sequence[Message], images: Sequence[str]
) -> None:
    """Reject a record that refers to an image, a video or audio in an unsupported key or tag."""
    unread = unread_media(raw, RECORD_KEYS, images)
    for number, entry in enumerate(raw_messages(raw)[0], 1):
        if unread is None and (found := unread_media(entry, MESSAGE_KEYS, images)):
            unread = f"message {number}: {found}"
    for number, message in enumerate(messages, 1):
        if unread is None and message.role == "user" and (name := file_in_text(message.content)):
            unread = f"message {number}: unsupported <img> tag with {name!r:.80}"
    if unread:
        raise RecordError(
            f"{unread}; list images under 'image' and mark each position with {IMAGE_PLACEHOLDER} (videos "
            "and audio are not supported)",
            kind="unsupported media",
        )


def _reject_foreign_placeholder(messages: Sequence[Message]) -> None:
    """Reject an image placeholder of another framework; call only if no user message has an `<image>`."""
    for number, message in enumerate(messages, 1):
        found = foreign_placeholder(message.content, possible=False)
        if found and message.role == "user":
            raise RecordError(
                f"message {number} contains the unsupported placeholder {found!r:.80}; use "
                f"{IMAGE_PLACEHOLDER} instead, once per image",
                kind="placeholders",
            )


def _hint(messages: Sequence[Message]) -> str:
    """Return an error-message suffix that quotes the first foreign placeholder in user messages, or ""."""
    texts = (message.content for message in messages if message.role == "user")
    found = next(filter(None, (foreign_placeholder(text, possible=True) for text in texts)), None)
    return f"; {found!r:.80} is not a placeholder" if found else ""


def _system_field(raw: Mapping[str, Any], messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the `system` field as a message; empty if it is missing or repeats the first message."""
    text = raw.get("system")
    if text is None or text == "":
        return ()
    if not isinstance(text, str):
        raise RecordError(f"'system' must be text, found {type(text).__name__}")
    if messages[0].role == "system":
        if messages[0].content == text:
            return ()
        raise RecordError(
            "the 'system' field differs from the conversation's system message; remove one of them",
            kind="role",
        )
    check_text(text, "'system'")
    return (Message("system", text),)


def _count_placeholders(messages: Sequence[Message]) -> int:
    return sum(message.content.count(IMAGE_PLACEHOLDER) for message in messages if message.role == "user")


def _parse_messages(raw: Mapping[str, Any]) -> tuple[Message, ...]:
    entries, role_key, text_key = raw_messages(raw)
    if not isinstance(entries, list) or not entries:
        raise RecordError("no conversation: 'conversations' must be a list of messages")
    messages = tuple(
        _parse_message(entry, number, role_key, text_key) for number, entry in enumerate(entries, 1)
    )
    if any(message.role == "system" for message in messages[1:]):
        raise RecordError("a system message must be the first message", kind="role")
    answers = [message.content for message in messages if message.role == "assistant" and message.supervised]
    if not answers and any(message.role == "assistant" for message in messages):
        raise RecordError(
            "no answer is supervised: 'loss' or 'weight' excludes all answers", kind="empty answer"
        )
    if not answers:
        assistant = "gpt" if role_key == "from" else "assistant"
        raise RecordError(
            f"no assistant message ({role_key!r}: {assistant!r}), so no token is supervised", kind="role"
        )
    if not any(map(str.strip, answers)):
        raise RecordError("all answers are empty, so no token is supervised", kind="empty answer")
    return messages


def raw_messages(raw: Mapping[str, Any]) -> tuple[Any, str, str]:
    """Return a record's raw messages and the names of their role and text keys."""
    if "conversations" not in raw and "messages" in raw:
        return raw["messages"], "role", "content"
    return raw.get("conversations"), "from", "value"


def _parse_message(entry: Any, number: int, role_key: str, text_key: str) -> Message:
    if not isinstance(entry, Mapping) or role_key not in entry or text_key not in entry:
        raise RecordError(f"message {number} must be an object with {role_key!r} and {text_key!r}")
    role, text = entry[role_key], entry[text_key]
    if not isinstance(role, str) or role not in _ROLES:
        names = "system, human or gpt" if role_key == "from" else "system, user or assistant"
        raise RecordError(f"message {number} has the unknown role {role!r:.80}; use {names}", kind="role")
    if isinstance(text, list):
        text = _join_parts(text, number)
    if not isinstance(text, str):
        raise RecordError(f"message {number}: {text_key!r} must be text, found {type(text).__name__}")
    check_text(text, f"message {number}")
    return Message(_ROLES[role], text, is_supervised(entry) if _ROLES[role] == "assistant" else True)


def check_text(text: str, where: str) -> None:
    """Check that text is valid Unicode and does not contain the reserved image token.

    Args:
        text: text of a message.
        where: name of the text in the error message.

    Raises:
        RecordError: the text is unusable.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{where} is not valid Unicode at character {error.start + 1}", kind="encoding"
        ) from None
    if IMG_CONTEXT in text:
        raise RecordError(f"{where} contains the reserved token {IMG_CONTEXT}; remove it")


def _join_parts(parts: list[Any], number: int) -> str:
    """Join a message's content parts, replacing each image part with a placeholder and a newline."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _IMAGE_PARTS:
            if part.get("text"):
                raise RecordError(f"message {number} has an image part with text; use a separate text part")
            texts.append(f"{IMAGE_PLACEHOLDER}\n")
        elif kind == "text" and isinstance(part.get("text"), str):
            if key := next((key for key in _PATH_KEYS if part.get(key)), None):
                raise RecordError(
                    f"message {number} has a text part with the key {key!r}; use a separate image part"
                )
            texts.append(part["text"])
        else:
            raise RecordError(
                f"message {number} has a content part that is neither text nor an image: {part!r:.80}"
            )
    return "".join(texts)


def _parse_images(raw: Mapping[str, Any]) -> tuple[str, ...]:
    if raw.get("image") and raw.get("images"):
        raise RecordError("both 'image' and 'images' are given; remove one of them")
    parts = _images_of_parts(raw)
    images = raw.get("image") or raw.get("images") or [path for path in parts if path is not None]
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise RecordError("'image' must be a path or a list of paths")
    for number, (image, path) in enumerate(zip(images, parts, strict=False), 1):
        if path is not None and not _is_same_path(image, str(path)):
            raise RecordError(
                f"image {number} is {path!r:.80} in the messages, but {image!r:.80} in the record's list"
            )
    return tuple(images)


def _is_same_path(one: str, other: str) -> bool:
    """Return whether two paths are equal, or one is the last part of the other."""
    long, short = PurePosixPath(one).parts, PurePosixPath(other.removeprefix("file://")).parts
    if len(long) < len(short):
        long, short = short, long
    return bool(short) and long[-len(short) :] == short


def _images_of_parts(raw: Mapping[str, Any]) -> list[Any]:
    """Return the path in each image part, and None for each placeholder in a user message's text, in order.

    Call after `_parse_messages` has validated the parts.
    """
    entries, role_key, text_key = raw_messages(raw)
    paths: list[Any] = []
    for entry in entries:
        content = entry[text_key]
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            if part["type"] in _IMAGE_PARTS:
                paths.append(_image_of_part(part))
            elif _ROLES[entry[role_key]] == "user":
                paths += [None] * part["text"].count(IMAGE_PLACEHOLDER)
    return paths


def _image_of_part(part: Mapping[str, Any]) -> Any:
    """Return the image path in a content part, or None.

    Raises:
        RecordError: the part refers to different images.
    """
    url = part.get("image_url")
    values = [*(part.get(key) for key in _PATH_KEYS[:3]), url.get("url") if isinstance(url, Mapping) else url]
    first, *others = [value for value in values if value not in (None, "")] or [None]
    if other := next((value for value in others if value != first), None):
        raise RecordError(f"an image part refers to both {first!r:.80} and {other!r:.80}")
    return first


def _add_placeholder(messages: tuple[Message, ...], index: int) -> tuple[Message, ...]:
    """Insert a placeholder before the content of message `index`."""
    marked = replace(messages[index], content=f"{IMAGE_PLACEHOLDER}\n{messages[index].content}")
    return (*messages[:index], marked, *messages[index + 1 :])

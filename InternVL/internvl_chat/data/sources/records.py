"""Parse and check records: `conversations` (LLaVA, ShareGPT) or `messages`, with any number of images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from internvl_chat.constants import IMAGE_PLACEHOLDER, IMG_CONTEXT
from internvl_chat.data.sources.problems import RecordError

_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Message:
    """A message; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """A conversation over any number of images.

    Attributes:
        id: id in the file, or None.
        messages: an optional system message followed by user and assistant messages, at least one of the
            latter. The user messages contain one placeholder per image, in the order of the images.
        images: paths relative to the dataset's root.
    """

    id: str | None
    messages: tuple[Message, ...]
    images: tuple[str, ...]


def parse_record(raw: Any) -> Record:
    """Check a record and convert it to messages and images.

    Images are listed under `image` or `images`; otherwise the parts of `messages` name them.

    A single image without a placeholder is placed before the first user message (InternVL's rule). If `image`
    is a string, the reference puts a placeholder before the first message unless that message contains one.
    A system message followed by `<image>` therefore begins with the placeholder as plain text.

    Raises:
        RecordError: what is wrong and how to fix it.
    """
    if not isinstance(raw, Mapping):
        raise RecordError(f"a record must be a JSON object, found {type(raw).__name__}")
    messages = _parse_messages(raw)
    images = _parse_images(raw)
    unmarked_system = messages[0].role == "system" and IMAGE_PLACEHOLDER not in messages[0].content
    if len(images) == 1 and not _count_placeholders(messages):
        first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise RecordError("an image, but no human message to put its placeholder in", kind="placeholders")
        messages = _add_placeholder(messages, first)
    elif isinstance(raw.get("image"), str) and images and unmarked_system:
        messages = _add_placeholder(messages, 0)
    placeholders = _count_placeholders(messages)
    if placeholders != len(images):
        found = f"{placeholders} {IMAGE_PLACEHOLDER} placeholders in the human messages"
        raise RecordError(f"{found}, but {len(images)} images", kind="placeholders")
    record_id = raw.get("id")
    return Record(None if record_id is None else str(record_id), messages, images)


def _count_placeholders(messages: Sequence[Message]) -> int:
    return sum(message.content.count(IMAGE_PLACEHOLDER) for message in messages if message.role == "user")


def conversation_warnings(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Return (kind, message) of each warning about a usable conversation; kinds are keys of `WARNINGS`."""
    answers = [
        (number, message.content) for number, message in enumerate(messages, 1) if message.role == "assistant"
    ]
    warnings = []
    if empty := [str(number) for number, text in answers if not text.strip()]:
        warnings.append(("empty message", f"empty answer in message {', '.join(empty)}"))
    if marked := [str(number) for number, text in answers if IMAGE_PLACEHOLDER in text]:
        message = f"{IMAGE_PLACEHOLDER} in the answer in message {', '.join(marked)} is treated as text"
        warnings.append(("placeholder in answer", message))
    roles = [message.role for message in messages if message.role != "system"]
    if roles[0] == "assistant":
        warnings.append(("message order", "the first message is an answer"))
    if repeated := [role for role, following in pairwise(roles) if role == following]:
        kind = "answers" if "assistant" in repeated else "questions"
        warnings.append(("message order", f"two consecutive {kind}"))
    if roles[-1] == "user":
        warnings.append(("message order", "the last question has no answer and is not trained on"))
    return warnings


def _parse_messages(raw: Mapping[str, Any]) -> tuple[Message, ...]:
    key, role_key, text_key = ("conversations", "from", "value")
    if key not in raw and "messages" in raw:
        key, role_key, text_key = ("messages", "role", "content")
    entries = raw.get(key)
    if not isinstance(entries, list) or not entries:
        raise RecordError("no conversation: 'conversations' must be a list of messages")
    messages = tuple(
        _parse_message(entry, number, role_key, text_key) for number, entry in enumerate(entries, 1)
    )
    if any(message.role == "system" for message in messages[1:]):
        raise RecordError("a system message must be the first message", kind="role")
    answers = [message.content for message in messages if message.role == "assistant"]
    if not answers:
        raise RecordError("no assistant message ('from': 'gpt'), so there is nothing to learn", kind="role")
    if not any(map(str.strip, answers)):
        raise RecordError("all answers are empty, so there is nothing to learn", kind="empty answer")
    return messages


def _parse_message(entry: Any, number: int, role_key: str, text_key: str) -> Message:
    if not isinstance(entry, Mapping) or role_key not in entry or text_key not in entry:
        raise RecordError(f"message {number} must be an object with {role_key!r} and {text_key!r}")
    role, text = entry[role_key], entry[text_key]
    if not isinstance(role, str) or role not in _ROLES:
        raise RecordError(
            f"message {number} has the unknown role {role!r:.80}; use system, human or gpt", kind="role"
        )
    if isinstance(text, list):
        text = _join_parts(text, number)
    if not isinstance(text, str):
        raise RecordError(f"message {number}: {text_key!r} must be text, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(
            f"message {number} is not valid Unicode at character {error.start + 1}", kind="encoding"
        ) from None
    if IMG_CONTEXT in text:
        raise RecordError(f"message {number} contains the reserved token {IMG_CONTEXT}")
    return Message(_ROLES[role], text)


def _join_parts(parts: list[Any], number: int) -> str:
    """Join the parts of a message's content; an image part becomes a placeholder and a newline."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            texts.append(f"{IMAGE_PLACEHOLDER}\n")
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise RecordError(
                f"message {number} has a content part that is neither text nor image: {part!r:.80}"
            )
    return "".join(texts)


def _parse_images(raw: Mapping[str, Any]) -> tuple[str, ...]:
    if raw.get("image") and raw.get("images"):
        raise RecordError("both 'image' and 'images' are given; keep one")
    images = raw.get("image") or raw.get("images") or _images_of_parts(raw)
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise RecordError("'image' must be a path or a list of paths")
    return tuple(images)


def _images_of_parts(raw: Mapping[str, Any]) -> list[Any]:
    """Return the paths in the image parts of `messages`, which have been checked."""
    entries = [] if "conversations" in raw else raw.get("messages", [])
    contents = [entry["content"] for entry in entries if isinstance(entry["content"], list)]
    parts = [part for content in contents for part in content if part["type"] == "image"]
    return [path for part in parts if (path := part.get("image") or part.get("path")) is not None]


def _add_placeholder(messages: tuple[Message, ...], index: int) -> tuple[Message, ...]:
    """Put a placeholder before the text of a message."""
    marked = replace(messages[index], content=f"{IMAGE_PLACEHOLDER}\n{messages[index].content}")
    return (*messages[:index], marked, *messages[index + 1 :])

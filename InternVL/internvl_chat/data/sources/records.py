"""One record of a data set: its messages and its images, checked, whatever dialect it was written in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from internvl_chat.constants import IMAGE_PLACEHOLDER, IMG_CONTEXT
from internvl_chat.data.sources.problems import RecordProblem

_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Message:
    """What one side says: `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """A conversation over any number of images.

    Attributes:
        id: as in the file, or None.
        messages: an optional system message, then the others; at least one is the assistant's. Placeholders in
            the user's messages are as many as the images, in their order.
        images: paths under the data set's root.
    """

    id: str | None
    messages: tuple[Message, ...]
    images: tuple[str, ...]


def parse_record(raw: Any) -> Record:
    """Check and normalise a record: LLaVA/ShareGPT `conversations`, or `messages`.

    Images are under `image` or `images`; without both, the parts of `messages` name them.

    A single image without a placeholder is shown before the first user message (InternVL's rule). Where the
    image is a string, the reference puts the placeholder before the first message unless that very message has
    one; a system message in front of `<image>` therefore begins with the placeholder as plain text.

    Raises:
        RecordProblem: says what is wrong and how to repair it.
    """
    if not isinstance(raw, Mapping):
        raise RecordProblem(f"a record must be a JSON object, found {type(raw).__name__}")
    messages = _parse_messages(raw)
    images = _parse_images(raw)
    if len(images) == 1 and not any(IMAGE_PLACEHOLDER in t.content for t in messages if t.role == "user"):
        messages = _show_first(messages)
    elif isinstance(raw.get("image"), str) and images and messages[0].role == "system":
        messages = _as_the_reference_marks_system(messages)
    placeholders = sum(t.content.count(IMAGE_PLACEHOLDER) for t in messages if t.role == "user")
    if placeholders != len(images):
        raise RecordProblem(
            f"{placeholders} {IMAGE_PLACEHOLDER} placeholders in the human messages, but {len(images)} images",
            kind="placeholders",
        )
    identity = raw.get("id")
    return Record(None if identity is None else str(identity), messages, images)


def find_warnings(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Return what is strange in a conversation that can be used: kinds of `WARNINGS`, and what it is."""
    answers = [
        (number, message.content) for number, message in enumerate(messages, 1) if message.role == "assistant"
    ]
    found = []
    if empty := [str(number) for number, text in answers if not text.strip()]:
        found.append(("empty message", f"empty answer in message {', '.join(empty)}"))
    if marked := [str(number) for number, text in answers if IMAGE_PLACEHOLDER in text]:
        message = f"{IMAGE_PLACEHOLDER} in the answer of message {', '.join(marked)} stays text"
        found.append(("placeholder in answer", message))
    roles = [message.role for message in messages if message.role != "system"]
    if roles[0] == "assistant":
        found.append(("message order", "an answer comes first, without a question"))
    if repeated := [role for role, following in pairwise(roles) if role == following]:
        sides = "an answer follows an answer" if "assistant" in repeated else "a question follows a question"
        found.append(("message order", f"{sides}, with nothing between"))
    if roles[-1] == "user":
        found.append(("message order", "the last question has no answer; nothing is learnt from it"))
    return found


def _parse_messages(raw: Mapping[str, Any]) -> tuple[Message, ...]:
    key, role_key, text_key = ("conversations", "from", "value")
    if key not in raw and "messages" in raw:
        key, role_key, text_key = ("messages", "role", "content")
    entries = raw.get(key)
    if not isinstance(entries, list) or not entries:
        raise RecordProblem("no conversation: 'conversations' must be a list of messages")
    messages = tuple(
        _parse_message(entry, number, role_key, text_key) for number, entry in enumerate(entries, 1)
    )
    if any(message.role == "system" for message in messages[1:]):
        raise RecordProblem("a system message must be the first message", kind="role")
    answers = [message.content for message in messages if message.role == "assistant"]
    if not answers:
        raise RecordProblem("no assistant message ('from': 'gpt'), so there is nothing to learn", kind="role")
    if not any(map(str.strip, answers)):
        raise RecordProblem("every answer is empty, so there is nothing to learn", kind="empty answer")
    return messages


def _parse_message(entry: Any, number: int, role_key: str, text_key: str) -> Message:
    if not isinstance(entry, Mapping) or role_key not in entry or text_key not in entry:
        raise RecordProblem(f"message {number} must be an object with {role_key!r} and {text_key!r}")
    role, text = entry[role_key], entry[text_key]
    if not isinstance(role, str) or role not in _ROLES:
        raise RecordProblem(
            f"message {number} has the unknown role {role!r:.80}; use system, human or gpt", kind="role"
        )
    if isinstance(text, list):
        text = _join_parts(text, number)
    if not isinstance(text, str):
        raise RecordProblem(f"message {number}: {text_key!r} must be text, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordProblem(
            f"message {number} is no valid Unicode text at character {error.start + 1}", kind="encoding"
        ) from None
    if IMG_CONTEXT in text:
        raise RecordProblem(f"message {number} contains the reserved token {IMG_CONTEXT}")
    return Message(_ROLES[role], text)


def _join_parts(parts: list[Any], number: int) -> str:
    """Join the parts of a `messages` message; an image part becomes a placeholder and a newline."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            texts.append(f"{IMAGE_PLACEHOLDER}\n")
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise RecordProblem(
                f"message {number} has a content part that is neither text nor image: {part!r:.80}"
            )
    return "".join(texts)


def _parse_images(raw: Mapping[str, Any]) -> tuple[str, ...]:
    if raw.get("image") and raw.get("images"):
        raise RecordProblem("both 'image' and 'images' are given; keep one")
    images = raw.get("image") or raw.get("images") or _images_of_parts(raw)
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise RecordProblem("'image' must be a path or a list of paths")
    return tuple(images)


def _images_of_parts(raw: Mapping[str, Any]) -> list[Any]:
    """Return what the image parts of `messages` name; the messages have been checked."""
    entries = [] if "conversations" in raw else raw.get("messages", [])
    contents = [entry["content"] for entry in entries if isinstance(entry["content"], list)]
    parts = [part for content in contents for part in content if part["type"] == "image"]
    return [path for part in parts if (path := part.get("image") or part.get("path")) is not None]


def _show_first(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Put the placeholder before the text of the first user message."""
    for index, message in enumerate(messages):
        if message.role == "user":
            shown = replace(message, content=f"{IMAGE_PLACEHOLDER}\n{message.content}")
            return (*messages[:index], shown, *messages[index + 1 :])
    raise RecordProblem("an image, but no human message to show it in", kind="placeholders")


def _as_the_reference_marks_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Put the placeholder, as text, before a system message without one."""
    system, *others = messages
    if IMAGE_PLACEHOLDER in system.content:
        return messages
    return (replace(system, content=f"{IMAGE_PLACEHOLDER}\n{system.content}"), *others)

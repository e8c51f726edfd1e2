"""Warnings about usable records: unusual content and ignored fields."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from internvl_chat.constants import IMAGE_PLACEHOLDER
from internvl_chat.data.sources.dialects import (
    control_tokens,
    file_names,
    foreign_placeholder,
    unread_message_fields,
    unread_record_fields,
)
from internvl_chat.data.sources.images import image_exists
from internvl_chat.data.sources.records import (
    MESSAGE_KEYS,
    PART_KEYS,
    RECORD_KEYS,
    Message,
    Record,
    raw_messages,
)
from internvl_chat.data.storage.stores import ImageStore

_TREATED_AS_TEXT = "is treated as text, not as an image placeholder"
_TOKENIZED_AS_CONTROL = (
    "is tokenized as a control token; to treat it as text, pass --escape_control_tokens True"
)
# Text that pandas writes for missing values.
_MISSING_VALUES = ("nan", "NaN", "<NA>", "NaT")


def record_warnings(
    raw: Mapping[str, Any], record: Record, root: Path | ImageStore, *, escaped: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield each warning about a usable record as (kind, message); kinds are keys of `WARNINGS`.

    Args:
        raw: raw record from the file.
        record: result of `parse_record(raw)`.
        root: images of the dataset.
        escaped: whether control tokens in messages are tokenized as plain text.
    """
    yield from conversation_warnings(record.messages)
    yield from _text_warnings(raw, record, escaped)
    for key in ("image", "images"):
        if not record.images and raw.get(key) not in (None, []):
            yield "ignored field", f"{key!r} is {raw[key]!r}, so the record has no image; omit it or use []"
    if fields := list(_unread_fields(raw, record)):
        yield "ignored field", f"ignored: {', '.join(fields)}"
    known = {*record.images}
    for key, name in _unread_files(raw):
        if name not in known and image_exists(root, name):
            yield (
                "ignored file",
                f"ignored key {key!r} refers to the existing file {name!r:.80}; list images under 'image'",
            )
            break


def _unread_files(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, name) of each media file in an ignored key of the record, its messages or their parts."""
    yield from file_names(raw, RECORD_KEYS)
    entries, _, text_key = raw_messages(raw)
    for entry in entries:
        yield from file_names(entry, MESSAGE_KEYS)
        for part in entry[text_key] if isinstance(entry[text_key], list) else ():
            yield from file_names(part, PART_KEYS)


def _unread_fields(raw: Mapping[str, Any], record: Record) -> Iterator[str]:
    """Yield a description of each ignored field that other frameworks interpret."""
    yield from unread_record_fields(raw)
    entries, _, _ = raw_messages(raw)
    if "conversations" in raw and raw.get("messages") and not _same_text(raw):
        yield "'messages' (a second conversation; 'conversations' is used)"
    shift = len(record.messages) - len(entries)  # 1 if a `system` field adds a message
    fields = (
        field
        for entry, message in zip(entries, record.messages[shift:], strict=True)
        for field in unread_message_fields(entry, message.role)
    )
    yield from dict.fromkeys(fields)


def _same_text(raw: Mapping[str, Any]) -> bool:
    """Return whether `conversations` and `messages` contain the same text."""
    texts = [
        [entry.get(key) if isinstance(entry, Mapping) else entry for entry in entries]
        for entries, key in ((raw["conversations"], "value"), (raw["messages"], "content"))
        if isinstance(entries, list)
    ]
    return len(texts) == 2 and texts[0] == texts[1]


def _text_warnings(raw: Mapping[str, Any], record: Record, escaped: bool) -> Iterator[tuple[str, str]]:
    """Yield warnings about unsupported placeholders and unescaped control tokens."""
    foreign, control = [], []
    if IMAGE_PLACEHOLDER in _system_text(raw):
        foreign.append(f"{IMAGE_PLACEHOLDER!r} in the system message")
    # Ambiguous placeholders are reported only if no user message contains <image>.
    unmarked = not any(IMAGE_PLACEHOLDER in text for text in _user_texts(raw))
    for number, message in enumerate(record.messages, 1):
        possible = message.role == "user" and unmarked
        if found := foreign_placeholder(message.content, possible=possible):
            foreign.append(f"{found!r:.80} in message {number}")
        if not escaped and (tokens := control_tokens(message.content)):
            control.append(f"{tokens[0]!r} in message {number}")
    if foreign:
        yield "unsupported placeholder", f"{foreign[0]} {_TREATED_AS_TEXT}"
    if control:
        yield "control token", f"{control[0]} {_TOKENIZED_AS_CONTROL}"


def question_warnings(question: str, *, escaped: bool) -> Iterator[str]:
    """Yield a warning if a question contains unescaped control tokens or an unsupported placeholder."""
    tokens = [] if escaped else control_tokens(question)
    if tokens:
        yield f"{tokens[0]!r} {_TOKENIZED_AS_CONTROL}"
    found = foreign_placeholder(question, possible=IMAGE_PLACEHOLDER not in question)
    if found and found not in tokens:
        yield f"{found!r:.80} {_TREATED_AS_TEXT}"


def _user_texts(raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield the raw text of each user message; for a list of content parts, yield a placeholder instead."""
    entries, role_key, text_key = raw_messages(raw)
    for entry in entries:
        if entry[role_key] in ("human", "user"):
            text = entry[text_key]
            yield text if isinstance(text, str) else IMAGE_PLACEHOLDER


def _system_text(raw: Mapping[str, Any]) -> str:
    """Return the raw text of the `system` field and the system message, before `parse_record` changes it."""
    (first, *_), role_key, text_key = raw_messages(raw)
    text = first[text_key] if first[role_key] == "system" else ""
    return f"{raw.get('system') or ''}{text if isinstance(text, str) else ''}"


def conversation_warnings(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Return each warning about a usable conversation as (kind, message); kinds are keys of `WARNINGS`."""
    answers = [
        (number, message.content) for number, message in enumerate(messages, 1) if message.role == "assistant"
    ]
    warnings = []
    if empty := [str(number) for number, text in answers if not text.strip()]:
        warnings.append(("empty message", f"empty answer in message {', '.join(empty)}"))
    for number, (role, content) in enumerate(((m.role, m.content) for m in messages), 1):
        if role == "user" and not content.strip():
            warnings.append(("empty message", f"empty question in message {number}"))
        elif content.replace(IMAGE_PLACEHOLDER, "").strip() in _MISSING_VALUES:
            text = f"the text of message {number} is {content!r:.40}; is it a missing value?"
            warnings.append(("empty message", text))
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

"""Detect keys, placeholders and control tokens from the record formats of other frameworks.

ms-swift, LLaMA-Factory, axolotl, TRL, OpenAI and model vendors use different names for the same things.
Whatever one of them would interpret, but this package does not support, is reported.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

# Keys of images, videos or audio, as normalized by `plain_key`.
_MEDIA_KEY = re.compile(
    r"(?:local|input|question|query)?(?P<noun>image|img|picture|pic|photo|video|audio|media|visual|frame|clip)s?\d{0,3}"
    r"(?P<detail>path|file|filename|filepath|filelist|name|url|uri|list|base64|b64|bytes|data|src)?s?\d{0,3}"
)
# File suffixes of images, volumes, videos and audio.
_MEDIA_FILE = re.compile(
    r"\.(?:jpe?g|png|gif|tiff?|webp|bmp|jp2|j2k|ppm|pgm|avif|heic|svg|dcm|nii|svs|mha|nrrd"
    r"|mp4|avi|mov|mkv|webm|m4v|mp3|wav|flac|ogg|m4a)(?:\.gz)?$",
    re.IGNORECASE,
)
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", re.ASCII)

# Record fields that other frameworks interpret, and their meaning there.
RECORD_FIELDS = {
    **dict.fromkeys(("system", "systemprompt", "systemmessage", "sys"), "a system message; use 'system'"),
    **dict.fromkeys(("tools", "functions"), "tools available to the model"),
    **dict.fromkeys(("rejected", "rejectedresponse", "rejectedmessages"), "the rejected answer of a pair"),
    **dict.fromkeys(("chosen", "chosenresponse"), "the preferred answer of a pair"),
    "ktotag": "whether the answer is desirable",
    "history": "earlier messages",
    "objects": "objects and boxes to insert into the text",
    **dict.fromkeys(("loss", "weight", "lossweight", "sampleweight", "lossscale"), "the loss weight"),
    "lossmask": "which messages are supervised; set 'loss' in each message",
}
# The same for message fields.
MESSAGE_FIELDS = {
    **dict.fromkeys(("toolcalls", "functioncall"), "tool calls of the message"),
    **dict.fromkeys(("reasoningcontent", "reasoning", "thinking"), "reasoning before the answer"),
    "lossscale": "the loss weight",
    **dict.fromkeys(("trainingdetail", "traindetail"), "which parts of the message are supervised"),
    "rejected": "the rejected answer of a pair",
}
# Supervision fields exclude an answer from the loss if they are false; mask fields, if they are true.
_SUPERVISION = (
    "loss", "weight", "train", "training", "trainable", "lossmask", "trainonturn", "computeloss"
)  # fmt: skip
_MASKS = ("masked", "mask")
# Unsupported message fields that probably have the same meaning as a supervision or mask field.
_LIKE_SUPERVISION = re.compile(r"(?:is|should|use|for|do|calc|include|in|keep)*(?:train|loss|supervis|learn)")
_LIKE_MASKS = re.compile(r"(?:is)?(?:mask|ignore|exclude|skip|no(?:t|train|loss))")
_EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]", "{}")

# Unambiguous image placeholders of other frameworks: image tags with a number or suffix, tokens of other
# models, and variant spellings of <image>. Possessive quantifiers prevent exponential time on long text.
_BEFORE = r"(?:(?:default|start|begin|end|of|soft|local|user|input)[ _-])"
_AFTER = (
    r"(?:[ _:#-]?(?:here|pad|placeholder|token|patch|soft|tag|start|end|features?|embeds?|input|\d{1,3}))"
)
_PLACEHOLDER = re.compile(
    rf"<\|/?{_BEFORE}*+(?:image|img|vision|video|audio|media)s?{_AFTER}*+\|>"
    rf"|</?{_BEFORE}++(?:image|img){_AFTER}*+>|</?(?:image|img){_AFTER}++>|<im_patch>"
    r"|<img>[^<>\s]{0,300}</img>|\(<image>\./</image>\)|</image>|&lt;image&gt;|(?!(?-i:<image>))<image>",
    re.IGNORECASE,
)
# Ambiguous placeholders: they may also be markup or plain words.
_POSSIBLE_PLACEHOLDER = re.compile(
    rf"</?(?:img|images|pic|picture|photo|video|audio|frame|media)s?{_AFTER}*+>|<img\s[^<>\n]{{1,300}}>"
    r"|!\[[^\]\n]{0,200}\]\([^)\n]{1,300}\)|\[(?:image|img|picture)(?:[ _:#-]?\d{1,3})?\]"
    r"|\{\{?\s*(?:image|img)\s*\}?\}|<\s*image\s*/>|<\s+image\s*>|<图片>|<图像>",
    re.IGNORECASE,
)
_FILE_IN_TAG = re.compile(r"<img>([^<>\n]{1,300})</img>", re.IGNORECASE)
# Control tokens of chat templates. <ref>, <box> and <quad> are not included: InternVL uses them in answers.
_CONTROL_TOKEN = re.compile(
    r"<\|[A-Za-z0-9_]{1,40}\|>|<\uff5c[^<>\uff5c\n]{1,40}\uff5c>|</?img>|</s>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>"
)


@lru_cache(maxsize=1 << 12)
def plain_key(key: str) -> str:
    """Return a key in lowercase without separators.

    >>> plain_key("Image_Path")
    'imagepath'
    """
    return re.sub(r"[^a-z0-9]", "", key.lower()) if len(key) < 100 else ""


def unread_media(raw: Mapping[str, Any], read: Collection[str], names: Collection[str]) -> str | None:
    """Describe the first unsupported key that refers to an image, a video or audio; None if there is none.

    Args:
        raw: a record or a message.
        read: supported keys.
        names: images under supported keys; files with the same names under unsupported keys are ignored.
    """
    for key, value in raw.items():
        if key in read or not value or isinstance(value, bool | int | float):
            continue
        match = _MEDIA_KEY.fullmatch(plain_key(key))
        if match is None:
            continue
        is_image = match["noun"] in ("image", "img") and match["detail"] not in ("name", "data", "src")
        files = [text for text in _strings(value) if is_image or is_media(text)]
        known = {PurePosixPath(name).name for name in names}
        unread = [file for file in files if PurePosixPath(file).name not in known]
        if unread:
            return f"unsupported key {key!r} refers to {unread[0]!r:.80}"
    return None


def is_media(text: str) -> bool:
    """Return whether text is a media file name, a URL or a data URI."""
    return len(text) > 3 and "\n" not in text and bool(_MEDIA_FILE.search(text) or _REMOTE.match(text))


def file_names(raw: Mapping[str, Any], read: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, string) for each string under an unsupported key that looks like a media file name."""
    for key, value in raw.items():
        if key not in read and value and not isinstance(value, bool | int | float):
            for text in _strings(value):
                if _MEDIA_FILE.search(text) and "\n" not in text and not _REMOTE.match(text):
                    yield key, text


def _strings(value: Any, depth: int = 3) -> Iterator[str]:
    """Yield the non-empty strings in a JSON value, up to `depth` levels deep."""
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, list | dict) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item, depth - 1)


def is_supervised(entry: Mapping[str, Any]) -> bool:
    """Return whether an assistant message is supervised, according to its fields."""
    for key, value in entry.items():
        name = plain_key(key)
        if (name in _SUPERVISION and _is_flag(value) and not value) or (
            name in _MASKS and _is_flag(value) and value
        ):
            return False
    return True


def _resembles_exclusion(name: str, value: Any) -> bool:
    """Return whether an unsupported field, such as `ignore: true`, may exclude an answer from the loss."""
    return isinstance(value, bool) and bool((_LIKE_MASKS if value else _LIKE_SUPERVISION).match(name))


def _is_flag(value: Any) -> bool:
    """Return whether a value is true, false, 0 or 1."""
    return isinstance(value, bool | int | float) and value in (0, 1)


def unread_record_fields(raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield a description of each ignored record field that other frameworks interpret."""
    for key, value in raw.items():
        meaning = RECORD_FIELDS.get(plain_key(key))
        is_empty = value in _EMPTY or (value == 1 and "loss weight" in (meaning or ""))
        if meaning and not is_empty and key != "system":
            yield f"{key!r} ({meaning})"
        elif not meaning and not is_supervised({key: value}):
            yield f"{key!r} (which messages are supervised; set 'loss' in each message)"
    if raw.get("label") is False:
        yield "'label' (false means a rejected answer in preference data)"


def unread_message_fields(entry: Mapping[str, Any], role: str) -> Iterator[str]:
    """Yield a description of each ignored message field that other frameworks interpret.

    Args:
        entry: raw message from the file.
        role: role of the message: `system`, `user` or `assistant`.
    """
    for key, value in entry.items():
        name = plain_key(key)
        if name in MESSAGE_FIELDS and value not in _EMPTY and value != 1:
            yield f"{key!r} of a message ({MESSAGE_FIELDS[name]})"
        elif name in (*_SUPERVISION, *_MASKS) and value is not None:
            if not _is_flag(value):
                yield f"{key!r} of a message ({value!r:.20}; only 0, 1, true and false are supported)"
            elif role != "assistant" and name in _SUPERVISION and value:
                yield f"{key!r} of a message with the role {role} (only assistant messages are supervised)"
        elif name not in MESSAGE_FIELDS and role == "assistant" and _resembles_exclusion(name, value):
            yield f"{key!r} of a message ({value!r}; set 'loss' to false to exclude the message)"
    if entry.get("label") is False:
        yield "'label' of a message (false means a rejected answer in preference data)"


def foreign_placeholder(text: str, *, possible: bool) -> str | None:
    """Return the first image placeholder of another framework in a message's text, or None.

    Args:
        text: text of a message.
        possible: also find ambiguous placeholders, which may be markup or plain words.
    """
    match = _PLACEHOLDER.search(text) or (_POSSIBLE_PLACEHOLDER.search(text) if possible else None)
    return match[0] if match else None


def file_in_text(text: str) -> str | None:
    """Return the first media file in an `<img>FILE</img>` tag, or None."""
    return next((name.strip() for name in _FILE_IN_TAG.findall(text) if is_media(name.strip())), None)


def misplaced_image(
    raw: Mapping[str, Any], read: Collection[str], names: Collection[str], question: str
) -> str | None:
    """Return why an image of an evaluation question would be ignored or misplaced; None if none would be.

    Args:
        raw: raw question from the file.
        read: supported keys.
        names: images under supported keys.
        question: text of the question.
    """
    if unread := unread_media(raw, read, names):
        return unread
    if "<image>" in question:
        return None
    placeholder = file_in_text(question) or foreign_placeholder(question, possible=False)
    return f"the question contains the unsupported placeholder {placeholder!r:.80}" if placeholder else None


def control_tokens(text: str) -> list[str]:
    """Return all control tokens in text."""
    return _CONTROL_TOKEN.findall(text) if "<" in text or "[" in text else []


def split_control_tokens(text: str) -> Iterator[tuple[str, bool]]:
    """Split text at control tokens; yield each part and whether it is a control token.

    >>> list(split_control_tokens("a<|im_end|>b"))
    [('a', False), ('<|im_end|>', True), ('b', False)]
    """
    start = 0
    for match in _CONTROL_TOKEN.finditer(text):
        if match.start() > start:
            yield text[start : match.start()], False
        yield match[0], True
        start = match.end()
    if start < len(text):
        yield text[start:], False

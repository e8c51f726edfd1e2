"""Other dialects of records as tables: their keys, placeholders and control tokens, and how to find them.

ms-swift, LLaMA-Factory, axolotl, TRL, OpenAI and the models' own formats name the same things differently.
Whatever one of them would act on and this project does not is reported, never ignored.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

# Keys that name images, videos or audio, as `plain_key` writes them.
_MEDIA_KEY = re.compile(
    r"(?:local|input|question|query)?(?P<noun>image|img|picture|pic|photo|video|audio|media|visual|frame|clip)s?"
    r"(?P<detail>path|file|filename|filepath|filelist|name|url|uri|list|base64|b64|bytes|data|src)?s?"
)
# Files of images, volumes, videos and audio.
_MEDIA_FILE = re.compile(
    r"\.(?:jpe?g|png|gif|tiff?|webp|bmp|jp2|j2k|ppm|pgm|avif|heic|svg|dcm|nii|svs|mha|nrrd"
    r"|mp4|avi|mov|mkv|webm|m4v|mp3|wav|flac|ogg|m4a)(?:\.gz)?$",
    re.IGNORECASE,
)
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", re.ASCII)

# Fields of a record that change its training elsewhere: what they mean there.
RECORD_FIELDS = {
    **dict.fromkeys(("system", "systemprompt", "systemmessage", "sys"), "a system message; name it 'system'"),
    **dict.fromkeys(("tools", "functions"), "tools offered to the model"),
    **dict.fromkeys(("rejected", "rejectedresponse", "rejectedmessages"), "the worse answer of a pair"),
    **dict.fromkeys(("chosen", "chosenresponse"), "the better answer of a pair"),
    "ktotag": "whether the answer is a good one",
    "history": "earlier messages",
    "objects": "objects and boxes to be inserted into the text",
    **dict.fromkeys(("loss", "weight", "lossweight", "sampleweight", "lossscale"), "the weight in the loss"),
    "lossmask": "which messages are supervised; set 'loss' in each message",
}
# The same for fields of a message.
MESSAGE_FIELDS = {
    **dict.fromkeys(("toolcalls", "functioncall"), "calls of tools, which are part of the message"),
    **dict.fromkeys(("reasoningcontent", "reasoning", "thinking"), "a text that precedes the answer"),
    "lossscale": "the weight in the loss",
    "rejected": "the worse answer of a pair",
}
# Whether to learn from an answer: a false value excludes it. A true value of a mask excludes it.
_SUPERVISION = ("loss", "weight", "train", "training", "trainable", "lossmask")
_MASKS = ("masked", "mask")
_EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]", "{}")

# Placeholders of images in other dialects that occur in no other text: a tag of an image with a number or
# another addition, a token of another model, another spelling of <image>. Repeats are possessive, so that a
# long text does not take exponential time.
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
# Placeholders that may also be markup or plain words.
_POSSIBLE_PLACEHOLDER = re.compile(
    rf"</?(?:img|images|pic|picture|photo|video|audio|frame|media)s?{_AFTER}*+>|<img\s[^<>\n]{{1,300}}>"
    r"|!\[[^\]\n]{0,200}\]\([^)\n]{1,300}\)|\[(?:image|img|picture)(?:[ _:#-]?\d{1,3})?\]"
    r"|\{\{?\s*(?:image|img)\s*\}?\}|<\s*image\s*/>|<\s+image\s*>|<图片>|<图像>",
    re.IGNORECASE,
)
_FILE_IN_TAG = re.compile(r"<img>([^<>\n]{1,300})</img>", re.IGNORECASE)
# Control tokens of chat templates; <ref>, <box> and <quad> are InternVL's markup of answers.
_CONTROL_TOKEN = re.compile(
    r"<\|[A-Za-z0-9_]{1,40}\|>|<\uff5c[^<>\uff5c\n]{1,40}\uff5c>|</?img>|</s>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>"
)


@lru_cache(maxsize=1 << 12)
def plain_key(key: str) -> str:
    """Return a key in lower case and without separators.

    >>> plain_key("Image_Path")
    'imagepath'
    """
    return re.sub(r"[^a-z0-9]", "", key.lower()) if len(key) < 100 else ""


def unread_media(raw: Mapping[str, Any], read: Collection[str], names: Collection[str]) -> str | None:
    """Return a description of the first key that names an image, a video or audio which is not read.

    Args:
        raw: a record or a message.
        read: keys that are read.
        names: the images that are read; another key may repeat their file names.
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
            return f"{key!r} names {unread[0]!r:.80}, which is not read"
    return None


def is_media(text: str) -> bool:
    """Return whether a text is the name, URL or content of an image, a video or audio."""
    return len(text) > 3 and "\n" not in text and bool(_MEDIA_FILE.search(text) or _REMOTE.match(text))


def file_names(raw: Mapping[str, Any], read: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of the texts that may name an image file, under keys that are not read."""
    for key, value in raw.items():
        if key not in read and value and not isinstance(value, bool | int | float):
            for text in _strings(value):
                if _MEDIA_FILE.search(text) and "\n" not in text and not _REMOTE.match(text):
                    yield key, text


def _strings(value: Any, depth: int = 3) -> Iterator[str]:
    """Yield the non-empty strings in a JSON value."""
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, list | dict) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item, depth - 1)


def is_supervised(entry: Mapping[str, Any]) -> bool:
    """Return whether an answer is supervised, according to the fields of its message."""
    for key, value in entry.items():
        name = plain_key(key)
        if (name in _SUPERVISION and _is_flag(value) and not value) or (
            name in _MASKS and _is_flag(value) and value
        ):
            return False
    return True


def _is_flag(value: Any) -> bool:
    """Return whether a value is true, false, 0 or 1."""
    return isinstance(value, bool | int | float) and value in (0, 1)


def unread_record_fields(raw: Mapping[str, Any]) -> Iterator[str]:
    """Describe each record field that other frameworks interpret and this one ignores."""
    for key, value in raw.items():
        meaning = RECORD_FIELDS.get(plain_key(key))
        is_empty = value in _EMPTY or (value == 1 and "weight in the loss" in (meaning or ""))
        if meaning and not is_empty and key != "system":
            yield f"{key!r} ({meaning})"
    if raw.get("label") is False:
        yield "'label' (false marks a bad answer in preference data)"


def unread_message_fields(entry: Mapping[str, Any], role: str) -> Iterator[str]:
    """Describe each message field that other frameworks interpret and this one ignores.

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


def foreign_placeholder(text: str, *, possible: bool) -> str | None:
    """Return the first placeholder of another dialect in a text.

    Args:
        text: text of a message.
        possible: whether to include what may also be markup or plain words.
    """
    match = _PLACEHOLDER.search(text) or (_POSSIBLE_PLACEHOLDER.search(text) if possible else None)
    return match[0] if match else None


def file_in_text(text: str) -> str | None:
    """Return the image file that a text names as `<img>FILE</img>`."""
    return next((name.strip() for name in _FILE_IN_TAG.findall(text) if is_media(name.strip())), None)


def misplaced_image(
    raw: Mapping[str, Any], read: Collection[str], names: Collection[str], question: str
) -> str | None:
    """Return why an image of an evaluation item would not be shown at its position, or None.

    Args:
        raw: the item as the file has it.
        read: keys that are read.
        names: the images that are read.
        question: the text that is shown with the images.
    """
    if unread := unread_media(raw, read, names):
        return unread
    if "<image>" in question:
        return None
    placeholder = file_in_text(question) or foreign_placeholder(question, possible=False)
    return f"the question marks an image by {placeholder!r:.80}, which is not read" if placeholder else None


def control_tokens(text: str) -> list[str]:
    """Return the control tokens in a text."""
    return _CONTROL_TOKEN.findall(text) if "<" in text or "[" in text else []


def split_control_tokens(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a text, and whether each is a control token.

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

"""Content of a record page: images, tiles, messages, lengths, problems and the raw record."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from internvl_chat.data.audit.checks import length_warnings
from internvl_chat.data.browse.token_view import MessageView, encoded_messages, plain_messages
from internvl_chat.data.encode.encoder import EncodedConversation, RecordLengths
from internvl_chat.data.encode.tiling import Grid, tiles_per_image
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.image_content import turned_size
from internvl_chat.data.sources.images import image_info, locate_image
from internvl_chat.data.sources.problems import Problem, RecordError, printable_id, printable_message
from internvl_chat.data.sources.records import Record
from internvl_chat.utils.errors import DataError

_MAX_RAW_BYTES = 200_000


@dataclass(frozen=True)
class ImageView:
    """An image of a record.

    Attributes:
        size: (width, height) in pixels, after rotation; None if the file cannot be read.
        grid: tile grid; None if the record is unusable.
        error: why the file cannot be read.
    """

    name: str
    size: tuple[int, int] | None = None
    grid: Grid | None = None
    error: str | None = None


@dataclass(frozen=True)
class RecordView:
    """A record as the model sees it.

    Attributes:
        raw: the record as indented JSON; if it is invalid or too large, its bytes as text.
        raw_bytes: size of the record in the file.
        messages: with special tokens and token counts if the record is usable and there is a tokenizer.
        lengths: None if the record is unusable.
        image_tokens: tokens of all images.
    """

    records: RecordSet
    index: int
    id: str | None
    raw: str
    raw_bytes: int
    problems: Sequence[Problem] = ()
    messages: Sequence[MessageView] = ()
    images: Sequence[ImageView] = ()
    lengths: RecordLengths | None = None
    image_tokens: int = 0

    @property
    def is_raw_cut(self) -> bool:
        """Whether `raw` is only the start of the record."""
        return self.raw_bytes > _MAX_RAW_BYTES

    @property
    def line(self) -> int:
        """1-based line of the record in the annotation file."""
        return self.records.file.line(self.index)


def view_record(records: RecordSet, index: int, compared: Iterable[Problem] = ()) -> RecordView:
    """Return the content of a record page; problems of the record do not raise an error.

    Args:
        records: dataset of the record.
        index: index in the file.
        compared: warnings that result from comparing the record with others.
    """
    view = RecordView(records, index, *_read_raw(records, index))
    try:
        record = records.record(index)
        images = [_view_image(records, name) for name in record.images]
        view = replace(view, messages=plain_messages(record.messages), images=images)
        checked = records.check(index)
        grids, encoded = encode_record(records, record)
    except (DataError, RecordError) as error:
        return replace(view, problems=_problems(view, [(error.kind, _message(error))]))
    options = records.encoder.preprocessing
    warnings = [*checked.warnings, *length_warnings(checked.lengths)]
    view = replace(
        view,
        problems=[*_problems(view, warnings), *compared],
        images=[replace(image, grid=grid) for image, grid in zip(images, grids, strict=True)],
        lengths=checked.lengths,
    )
    if encoded is None:
        return view
    messages = encoded_messages(records.encoder.template.tokenizer, encoded, options.tokens_per_tile)
    return replace(view, messages=messages, image_tokens=len(encoded.image_positions))


def encode_record(records: RecordSet, record: Record) -> tuple[tuple[Grid, ...], EncodedConversation | None]:
    """Return the tile grids of a record, and the encoded conversation if there is a tokenizer.

    Raises:
        RecordError: the record is unusable.
    """
    encoder, sizes = records.encoder, [_image_size(records, name) for name in record.images]
    if encoder.tokenizer is not None:
        encoded = encoder.encode(record.messages, sizes)
        return encoded.grids, encoded
    limit = tiles_per_image(encoder.preprocessing.max_dynamic_patch, max(len(sizes), 1))
    return tuple(encoder.plan_grid(size, limit) for size in sizes), None


def _image_size(records: RecordSet, name: str) -> tuple[int, int]:
    """Return the (width, height) of an image, after rotation."""
    info = image_info(locate_image(records.root, name))
    return turned_size(info.size, info.content.orientation, records.encoder.preprocessing.image_options)


def _view_image(records: RecordSet, name: str) -> ImageView:
    shown = printable_message(name)
    try:
        return ImageView(shown, _image_size(records, name))
    except RecordError as error:
        return ImageView(shown, error=printable_message(str(error)))


def _read_raw(records: RecordSet, index: int) -> tuple[str | None, str, int]:
    """Return a record's printable id, its text, and its size in bytes."""
    try:
        content = records.file.read(index)
    except DataError as error:
        return None, error.message, 0
    text = content[:_MAX_RAW_BYTES].decode("utf-8", "replace")
    try:
        raw = records.file[index]
        record_id = printable_id(raw.get("id")) if isinstance(raw, dict) else None
        if len(content) <= _MAX_RAW_BYTES:
            text = json.dumps(raw, indent=2, ensure_ascii=False)
    except (DataError, RecursionError):
        record_id = None
    return record_id, text, len(content)


def _message(error: DataError | RecordError) -> str:
    return error.message if isinstance(error, DataError) else printable_message(str(error))


def _problems(view: RecordView, found: Iterable[tuple[str, str]]) -> list[Problem]:
    spec = view.records.spec
    location = (spec.name, view.index, spec.annotation, view.line, view.id)
    return [Problem(*location, kind, message) for kind, message in found]

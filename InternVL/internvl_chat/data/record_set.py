"""Parse, validate, encode and load the records of one dataset by index."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from internvl_chat.data.encode.encoder import EncodedConversation, RecordEncoder, RecordLengths
from internvl_chat.data.sources.image_content import ImageOptions, content_warnings, turned_size
from internvl_chat.data.sources.images import (
    ImageFile,
    ImageInfo,
    ImageLocation,
    check_decoding,
    decode_image,
    image_info,
    image_size,
    locate_image,
)
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.data.sources.problems import Problem, RecordError, printable_id, printable_message
from internvl_chat.data.sources.record_warnings import record_warnings
from internvl_chat.data.sources.records import Record, parse_record
from internvl_chat.data.storage.stores import ImageStore, ObjectStore, StoredImage, open_root
from internvl_chat.utils.errors import DataError, StorageError
from internvl_chat.utils.files import file_sha256
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)


class RecordKey(NamedTuple):
    """Identifies a record by the name of its dataset and its index in the file."""

    dataset: str
    index: int  # type: ignore[assignment]  # hides tuple.index


@dataclass(frozen=True)
class Sample:
    """A loaded record: encoded conversation and image tiles.

    Attributes:
        tiles: (N, S, S, 3) uint8, N tiles of S x S pixels.
    """

    key: RecordKey
    id: str | None
    encoded: EncodedConversation
    tiles: torch.Tensor


class CheckedRecord(NamedTuple):
    """Result of checking a usable record.

    Attributes:
        id_hash: hash of the id; 0 without an id.
        content_hash: hash of the conversation and the image paths.
        warnings: warnings about the record and its images, as (kind, message).
    """

    lengths: RecordLengths
    id: str | None
    id_hash: int
    content_hash: int
    warnings: list[tuple[str, str]]
    images: tuple[ImageFile, ...]


class RecordSet:
    """The records of one entry in the meta file.

    Args:
        spec: the entry.
        encoder: encoder with the run's options; the entry's tile limit takes precedence.

    Raises:
        DataError: the annotation file or the shards cannot be used; see `RecordFile` and `open_root`.
        StorageError: object storage is unavailable.
    """

    def __init__(self, spec: DatasetSpec, encoder: RecordEncoder) -> None:
        self.spec = spec
        preprocessing = encoder.preprocessing.with_tile_limit(spec.max_dynamic_patch)
        self.encoder = RecordEncoder(encoder.tokenizer, preprocessing, truncate_text=encoder.truncate_text)
        self.file = RecordFile(spec.annotation)
        self.root = open_root(spec.root)
        if spec.length is not None and spec.length != len(self.file):
            logger.warning(
                "dataset %s: 'length' is %d, but %s has %d records",
                spec.name, spec.length, spec.annotation, len(self.file),
            )  # fmt: skip

    def __len__(self) -> int:
        """Return the number of records in the file."""
        return len(self.file)

    def digest(self) -> str:
        """Return the SHA-256 of the annotation file."""
        return file_sha256(self.spec.annotation)

    @property
    def num_used(self) -> int:
        """Number of records per epoch, with repetitions."""
        return self.spec.num_used(len(self))

    @property
    def num_distinct(self) -> int:
        """Number of distinct records used per epoch, counted from the start of the file."""
        return min(len(self), self.num_used)

    def first(self, limit: int | None) -> range:
        """Return the indices of the first `limit` records used per epoch; None for all of them."""
        return range(self.num_distinct if limit is None else min(limit, self.num_distinct))

    def record(self, index: int) -> Record:
        """Parse a record.

        Raises:
            DataError: the record is malformed.
        """
        return self._parse(index)[1]

    def _parse(self, index: int) -> tuple[Any, Record]:
        """Return a raw record from the file and the parsed record."""
        raw = self.file[index]
        with self._errors_of(index, raw.get("id") if isinstance(raw, dict) else None):
            return raw, parse_record(raw)

    def error(self, index: int, message: str, record_id: object, kind: str = "structure") -> DataError:
        """Return an error with the record's file, line and id."""
        return DataError(
            printable_message(message),
            file=self.spec.annotation,
            line=self.file.line(index),
            record=printable_id(record_id),
            kind=kind,
        )

    @contextmanager
    def _errors_of(self, index: int, record_id: object) -> Iterator[None]:
        """Convert a `RecordError` to a `DataError` with the record's file, line and id.

        A `StorageError` keeps its type, so that the record is not treated as unusable.
        """
        try:
            yield
        except RecordError as error:
            raise self.error(index, str(error), record_id, error.kind) from None
        except StorageError as error:
            raise StorageError(str(self.error(index, str(error), record_id))) from None
        except RecursionError:
            raise self.error(index, "JSON is nested too deeply", record_id, "json") from None

    def encode(self, index: int) -> tuple[Record, EncodedConversation]:
        """Return a record, parsed and encoded; only the headers of its images are read.

        Raises:
            DataError: the record is unusable.
        """
        record = self.record(index)
        with self._errors_of(index, record.id):
            paths = self.image_paths(record)
            self.encoder.reject_oversized(record.messages, len(paths))
            sizes = [image_size(path, self._image_options) for path in paths]
            encoded = self.encoder.encode(record.messages, sizes)
        self._log_losses(index, record, encoded.lengths)
        return record, encoded

    def measure(self, index: int) -> RecordLengths:
        """Compute the lengths of a record; see `check`.

        Raises:
            DataError: the record is unusable.
        """
        return self.check(index).lengths

    def check(self, index: int, *, decode: bool = False) -> CheckedRecord:
        """Validate a record and compute its lengths.

        Args:
            index: index of the record in the file.
            decode: decode all images; otherwise only those whose file may be truncated.

        Raises:
            DataError: the record is unusable; `encode` or `load` would raise the same error.
        """
        raw, record = self._parse(index)
        with self._errors_of(index, record.id):
            paths = self.image_paths(record)
            self.encoder.reject_oversized(record.messages, len(paths))
            infos = [image_info(path) for path in paths]
            options = self._image_options
            sizes = [turned_size(info.size, info.content.orientation, options) for info in infos]
            lengths = self.encoder.measure(record.messages, sizes)
            transparent = [
                check_decoding(path, info) if decode or not info.has_end else None
                for path, info in zip(paths, infos, strict=True)
            ]
        images = zip(record.images, infos, strict=True)
        return CheckedRecord(
            lengths,
            record.id,
            0 if record.id is None else _hash(record.id),
            _hash(repr((record.messages, [str(path) for path in paths]))),
            list(self._warnings(raw, record, infos, transparent)),
            tuple(ImageFile(name, info.num_bytes, info.version) for name, info in images),
        )

    def warnings(self, index: int) -> list[Problem]:
        """Return the warnings about a record without computing its lengths.

        Raises:
            DataError: the record is unusable.
        """
        raw, record = self._parse(index)
        with self._errors_of(index, record.id):
            infos = [image_info(path) for path in self.image_paths(record)]
        found = self._warnings(raw, record, infos, [None] * len(infos))
        location = (
            self.spec.name,
            index,
            self.spec.annotation,
            self.file.line(index),
            printable_id(record.id),
        )
        return [Problem(*location, *warning) for warning in found]

    def _warnings(
        self, raw: Any, record: Record, infos: Sequence[ImageInfo], transparent: Sequence[bool | None]
    ) -> Iterator[tuple[str, str]]:
        """Yield each warning about a record and its images as (kind, message)."""
        escaped = self.encoder.preprocessing.escape_control_tokens
        contents = [info.content for info in infos]
        yield from record_warnings(raw, record, self.root, escaped=escaped)
        yield from content_warnings(record.images, contents, self._image_options, transparent)

    @property
    def _image_options(self) -> ImageOptions:
        return self.encoder.preprocessing.image_options

    def load(self, index: int, augment: random.Random | None = None) -> Sample:
        """Encode a record and decode its images.

        Args:
            index: index of the record in the file.
            augment: random number generator for datasets with augmentation; None disables augmentation.

        Raises:
            DataError: the record is unusable.
        """
        record, encoded = self.encode(index)
        with self._errors_of(index, record.id):
            images = (decode_image(path, self._image_options) for path in self.image_paths(record))
            try:
                tiles = self.encoder.tiles(images, encoded.grids, augment if self.spec.data_augment else None)
            except RecordError:
                raise
            except Exception as error:
                names = ", ".join(record.images)
                raise RecordError(
                    f"cannot process the record's images ({names}): {error}", "image unreadable"
                ) from error
        return Sample(RecordKey(self.spec.name, index), record.id, encoded, tiles)

    def images(self, index: int, record: Record) -> list[Image.Image]:
        """Decode a record's images as RGB.

        Raises:
            DataError: an image cannot be decoded.
        """
        with self._errors_of(index, record.id):
            return [decode_image(path, self._image_options) for path in self.image_paths(record)]

    def image_paths(self, record: Record) -> list[ImageLocation]:
        """Return the locations of a record's images.

        Raises:
            RecordError: an image path is invalid; see `locate_image`.
        """
        return [locate_image(self.root, name) for name in record.images]

    def prefetch(self, indices: Sequence[int]) -> None:
        """Download the images of records from object storage to the cache; unusable records are ignored."""
        if isinstance(self.root, ImageStore):
            self.root.prefetch(name for index in indices for name in self._image_names(index))

    def remember_images(self, names: Sequence[str], states: np.ndarray) -> None:
        """Store the sizes and versions of images, (N, 2) int64; with object storage, this saves requests."""
        if isinstance(self.root, ObjectStore):
            self.root.remember(names, states)

    def _image_names(self, index: int) -> list[str]:
        try:
            paths = self.image_paths(self.record(index))
        except (DataError, RecordError):
            return []
        return [path.name for path in paths if isinstance(path, StoredImage)]

    def _log_losses(self, index: int, record: Record, lengths: RecordLengths) -> None:
        """Log the tiles and tokens that were removed to fit `max_seq_length`."""
        losses = []
        if lengths.tiles_lost:
            losses.append(f"{lengths.tiles} tiles instead of {lengths.tiles + lengths.tiles_lost}")
        if lengths.tokens_truncated:
            losses.append(f"the last {lengths.tokens_truncated} tokens truncated")
        if losses:
            record_id = "" if record.id is None else f" (record {printable_id(record.id)!r})"
            logger.warning(
                "%s, line %d%s: %s, to fit max_seq_length %d",
                self.spec.annotation, self.file.line(index), record_id, " and ".join(losses),
                self.encoder.preprocessing.max_seq_length,
            )  # fmt: skip


def _hash(text: str) -> int:
    """Return a 64-bit hash; the probability of a collision among a million strings is 3e-8."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())

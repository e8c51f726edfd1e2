"""The records of one data set, as samples."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from internvl_chat.data.encode.encoder import Encoded, Measured, RecordEncoder
from internvl_chat.data.sources.images import (
    check_decoding,
    decode_image,
    image_facts,
    image_size,
    locate_image,
)
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.data.sources.problems import RecordProblem, show_id, show_message
from internvl_chat.data.sources.records import Record, find_warnings, parse_record
from internvl_chat.data.sources.shown_images import ShownImage
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)


class RecordKey(NamedTuple):
    """A record's place: name of its set, and its index in the file from 0."""

    dataset: str
    index: int


@dataclass(frozen=True)
class Sample:
    """A record ready for the collator.

    Attributes:
        key: where it comes from.
        id: its id in the file.
        encoded: ids, labels and grids.
        tiles: (N, S, S, 3) uint8.
    """

    key: RecordKey
    id: str | None
    encoded: Encoded
    tiles: torch.Tensor


class RecordSet:
    """The records of one entry of the meta file.

    Args:
        spec: the entry.
        encoder: made with the command line's tile limit; the entry's own wins.

    Raises:
        DataError: the annotation file cannot be read.
    """

    def __init__(self, spec: DatasetSpec, encoder: RecordEncoder) -> None:
        self.spec = spec
        self.encoder = encoder.with_max_tiles(spec.max_dynamic_patch)
        self.file = RecordFile(spec.annotation)
        if spec.length is not None and spec.length != len(self.file):
            logger.warning(
                "data set %s: 'length' is %d, but %s has %d records",
                spec.name, spec.length, spec.annotation, len(self.file),
            )  # fmt: skip

    def __len__(self) -> int:
        """Return the number of records in the file, each once."""
        return len(self.file)

    def digest(self) -> str:
        """Return the SHA-256 of the annotation file."""
        with self.spec.annotation.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    @property
    def num_used(self) -> int:
        """Records of one epoch, after `repeat_time`."""
        repeat = self.spec.repeat_time
        return int(len(self) * repeat) if repeat < 1 else len(self) * int(repeat)

    @property
    def num_distinct(self) -> int:
        """Records that an epoch uses, each counted once: the first of the file."""
        return min(len(self), self.num_used)

    def first(self, limit: int | None) -> range:
        """Return the indices of the first records, of all without a limit."""
        return range(len(self) if limit is None else min(limit, len(self)))

    def record(self, index: int) -> Record:
        """Parse a record.

        Raises:
            DataError: it is malformed.
        """
        raw = self.file[index]
        with self._naming(index, raw.get("id") if isinstance(raw, dict) else None):
            return parse_record(raw)

    def error(self, index: int, message: str, record_id: object, kind: str = "structure") -> DataError:
        """Return an error that names a record."""
        return DataError(
            show_message(message),
            file=self.spec.annotation,
            line=self.file.line(index),
            record=show_id(record_id),
            kind=kind,
        )

    @contextmanager
    def _naming(self, index: int, record_id: object) -> Iterator[None]:
        """Turn a record's problem into an error that names the record."""
        try:
            yield
        except RecordProblem as problem:
            raise self.error(index, str(problem), record_id, problem.kind) from None
        except RecursionError:
            raise self.error(index, "JSON is nested too deeply", record_id, "json") from None

    def encode(self, index: int) -> tuple[Record, Encoded]:
        """Encode a record; of its images only the headers are read.

        Raises:
            DataError: it cannot be used.
        """
        record = self.record(index)
        with self._naming(index, record.id):
            encoded = self.encoder.encode(
                record.messages, self._image_sizes(record, self.image_paths(record))
            )
        self._tell_of_losses(index, record, encoded.measured)
        return record, encoded

    def measure(self, index: int) -> Measured:
        """Return how long a record is; its images are not decoded if they look whole.

        Raises:
            DataError: it cannot be used, in the words of `examine`.
        """
        return self.examine(index).measured

    def examine(self, index: int, *, decode: bool = False) -> "Examined":
        """Return all that is to be known of a record before it is used.

        Args:
            index: in the file.
            decode: also decode its images; else only those whose file does not end as it should.

        Raises:
            DataError: it cannot be used, in the words of `encode`, or of `load` if its images are decoded.
        """
        record = self.record(index)
        with self._naming(index, record.id):
            paths = self.image_paths(record)
            self.encoder.refuse_endless(record.messages, len(paths))
            facts = [image_facts(path) for path in paths]
            measured = self.encoder.measure(record.messages, [image.size for image in facts])
            for path, image in zip(paths, facts, strict=True):
                if decode or not image.ends_well:
                    check_decoding(path, image)
        content = repr((record.messages, [str(path) for path in paths]))
        return Examined(
            measured, record.id, 0 if record.id is None else _hash(record.id), _hash(content),
            tuple(find_warnings(record.messages)),
            tuple(ShownImage(name, image.num_bytes, image.mtime_ns)
                  for name, image in zip(record.images, facts, strict=True)),
        )  # fmt: skip

    def load(self, index: int, augment: random.Random | None = None) -> Sample:
        """Encode a record and decode its images.

        Args:
            index: in the file.
            augment: randomness for a set that asks for augmentation.

        Raises:
            DataError: it cannot be used.
        """
        record, encoded = self.encode(index)
        with self._naming(index, record.id):
            images = map(decode_image, self.image_paths(record))
            try:
                tiles = self.encoder.tiles(images, encoded.grids, augment if self.spec.data_augment else None)
            except RecordProblem:
                raise
            except Exception as error:
                names = ", ".join(record.images)
                raise RecordProblem(
                    f"an image cannot be used ({names}): {error}", "image unreadable"
                ) from error
        return Sample(RecordKey(self.spec.name, index), record.id, encoded, tiles)

    def images(self, index: int, record: Record) -> list[Image.Image]:
        """Decode a record's images as RGB.

        Raises:
            DataError: one of them cannot be decoded.
        """
        with self._naming(index, record.id):
            return [decode_image(path) for path in self.image_paths(record)]

    def image_paths(self, record: Record) -> list[Path]:
        """Return where a record's images are.

        Raises:
            RecordProblem: a path leads out of the set's root.
        """
        return [locate_image(self.spec.root, name) for name in record.images]

    def _image_sizes(self, record: Record, paths: Sequence[Path]) -> list[tuple[int, int]]:
        self.encoder.refuse_endless(record.messages, len(paths))
        return [image_size(path) for path in paths]

    def _tell_of_losses(self, index: int, record: Record, measured: Measured) -> None:
        """Log what a record has to give up to fit."""
        losses = []
        if measured.tiles_lost:
            losses.append(f"{measured.tiles} tiles instead of {measured.tiles + measured.tiles_lost}")
        if measured.tokens_cut:
            losses.append(f"the last {measured.tokens_cut} tokens are cut off")
        if losses:
            logger.warning(
                "%s, line %d (record %r): %s, to fit max_seq_length %d",
                self.spec.annotation, self.file.line(index), show_id(record.id), " and ".join(losses),
                self.encoder.preprocessing.max_seq_length,
            )  # fmt: skip


class Examined(NamedTuple):
    """What is to be known of a record before it is used.

    Attributes:
        measured: how long it is.
        id: in the file.
        name: hash of the id, 0 for none.
        content: hash of its conversation and the paths of its images.
        find_warnings: what is strange in its conversation, as kind and message.
        images: its files, as they were when they were looked at.
    """

    measured: Measured
    id: str | None
    name: int
    content: int
    find_warnings: tuple[tuple[str, str], ...]
    images: tuple[ShownImage, ...]


def _hash(text: str) -> int:
    """Return 64 bits: among a million texts, two have them in common by chance with 3 in 100 million."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())

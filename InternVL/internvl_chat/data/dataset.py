"""The records of one data set, and of all data sets of a meta file, as samples."""

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from internvl_chat.data.encoding import Encoded, Measured, RecordEncoder
from internvl_chat.data.jsonl import RecordFile
from internvl_chat.data.length_cache import Lengths
from internvl_chat.data.meta import DatasetSpec
from internvl_chat.data.records import Record, RecordProblem, parse_record
from internvl_chat.data.tiling import to_rgb
from internvl_chat.errors import DataError
from internvl_chat.logs import get_logger

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
        identity = raw.get("id") if isinstance(raw, dict) else None
        with self._naming(index, None if identity is None else str(identity)):
            return parse_record(raw)

    def error(self, index: int, message: str, record_id: str | None) -> DataError:
        """Return an error that names a record."""
        return DataError(message, file=self.spec.annotation, line=self.file.line(index), record=record_id)

    @contextmanager
    def _naming(self, index: int, record_id: str | None) -> Iterator[None]:
        """Turn a record's problem into an error that names the record."""
        try:
            yield
        except RecordProblem as problem:
            raise self.error(index, str(problem), record_id) from None

    def encode(self, index: int) -> tuple[Record, Encoded]:
        """Encode a record; of its images only the headers are read.

        Raises:
            DataError: it cannot be used.
        """
        record = self.record(index)
        with ExitStack() as stack:
            images = self._open(index, record, stack)
            return record, self._encode(index, record, images)

    def measure(self, index: int) -> Measured:
        """Return how long a record is; of its images only the headers are read.

        Raises:
            DataError: it cannot be used, in the words of `encode`.
        """
        record = self.record(index)
        with ExitStack() as stack:
            sizes = [image.size for image in self._open(index, record, stack)]
        with self._naming(index, record.id):
            return self.encoder.measure(record.turns, sizes)

    def load(self, index: int, augment: random.Random | None = None) -> Sample:
        """Encode a record and decode its images.

        Args:
            index: in the file.
            augment: randomness for a set that asks for augmentation.

        Raises:
            DataError: it cannot be used.
        """
        record = self.record(index)
        with ExitStack() as stack:
            images = self._open(index, record, stack)
            encoded = self._encode(index, record, images)
            try:
                tiles = self.encoder.tiles(images, encoded.grids, augment if self.spec.data_augment else None)
            except Exception as error:
                names = ", ".join(record.images)
                raise self.error(
                    index, f"an image cannot be decoded ({names}): {error}", record.id
                ) from error
        return Sample(RecordKey(self.spec.name, index), record.id, encoded, tiles)

    def images(self, index: int, record: Record) -> list[Image.Image]:
        """Decode a record's images as RGB."""
        with ExitStack() as stack:
            opened = self._open(index, record, stack)
            try:
                return [to_rgb(image) for image in opened]
            except Exception as error:
                raise self.error(index, f"an image cannot be decoded: {error}", record.id) from error

    def _open(self, index: int, record: Record, stack: ExitStack) -> list[Image.Image]:
        images = []
        for name in record.images:
            path = self.spec.root / name
            try:
                images.append(stack.enter_context(Image.open(path)))
            except FileNotFoundError:
                raise self.error(
                    index, f"the image {path} does not exist; check 'root' in the meta file", record.id
                ) from None
            except Exception as error:
                raise self.error(index, f"the image {path} cannot be read: {error}", record.id) from error
        return images

    def _encode(self, index: int, record: Record, images: Sequence[Image.Image]) -> Encoded:
        with self._naming(index, record.id):
            encoded = self.encoder.encode(record.turns, [image.size for image in images])
        if encoded.num_tiles < encoded.tiles_wanted:
            logger.warning(
                "%s, line %d (record %r): %d tiles instead of %d, to fit max_seq_length %d",
                self.spec.annotation, self.file.line(index), record.id, encoded.num_tiles,
                encoded.tiles_wanted, self.encoder.preprocessing.max_seq_length,
            )  # fmt: skip
        return encoded


class Draw(NamedTuple):
    """One use of a record in training.

    Attributes:
        index: among all records of the epoch.
        epoch: from 0; with the index it seeds the augmentation.
        counts: False for a record that only keeps a process busy, with weight zero.
    """

    index: int
    epoch: int
    counts: bool = True


class TrainingData(Dataset):
    """All sets of a meta file one after the other, in the order of the file.

    Args:
        sets: the data sets.
        seed: of the augmentation.
        lengths: of `index_lengths(sets)`; a record that differs from them is an error.
    """

    def __init__(
        self, sets: Sequence[RecordSet], *, seed: int = 0, lengths: Sequence[Lengths] | None = None
    ) -> None:
        self.sets, self.seed, self.lengths = list(sets), seed, lengths
        if lengths is not None and [len(n) for n in lengths] != [s.num_distinct for s in self.sets]:
            raise ValueError("the lengths are not those of the sets")
        self._bounds = np.cumsum([0, *(s.num_used for s in self.sets)])
        if not len(self):
            raise DataError("no records are left to train on: every 'repeat_time' is too small")

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @property
    def sizes(self) -> list[int]:
        """Records of an epoch from each set, before resampling."""
        return [s.num_used for s in self.sets]

    def locate(self, index: int) -> tuple[RecordSet, int]:
        """Return the set of a record of the epoch, and its index in the set's file."""
        number, index = self._place(index)
        return self.sets[number], index

    def _place(self, index: int) -> tuple[int, int]:
        """Return the number of a record's set, and its index in the set's file."""
        number = int(np.searchsorted(self._bounds, index, side="right")) - 1
        return number, (index - int(self._bounds[number])) % len(self.sets[number])

    def __getitem__(self, draw: Draw) -> tuple[Sample, bool] | DataError:
        """Load a record; returns it and whether it counts.

        An error is returned, not raised: torch would bury one from a loader process in its traceback.
        """
        number, index = self._place(draw.index)
        rng = random.Random(f"{self.seed}/{draw.epoch}/{draw.index}")
        try:
            sample = self.sets[number].load(index, rng)
            self._compare(number, index, sample)
        except DataError as error:
            return error
        return sample, draw.counts

    def _compare(self, number: int, index: int, sample: Sample) -> None:
        """Raise a `DataError` where a record is not as long as it was when it was indexed."""
        if self.lengths is None or self.lengths[number][index] == sample.encoded.measured:
            return
        lengths = self.lengths[number]
        now, before = ("{} tokens ({} supervised) and {} tiles".format(*numbers)
                       for numbers in (sample.encoded.measured, lengths[index]))  # fmt: skip
        remedy = f"delete {lengths.file} and start again" if lengths.file else "start again"
        message = f"{now}, but {before} when the lengths were indexed: an image has changed since; {remedy}"
        raise self.sets[number].error(index, message, sample.id)

    def epoch_lengths(self) -> Lengths:
        """Return the lengths of every record of the epoch, in its numbering (repeated records repeated).

        Raises:
            ValueError: the data was made without lengths.
        """
        if self.lengths is None:
            raise ValueError("TrainingData was made without the lengths of its records")
        rounds = [s.num_used // s.num_distinct if s.num_distinct else 0 for s in self.sets]
        columns = {
            name: np.concatenate(
                [np.tile(lengths.columns[name], n) for lengths, n in zip(self.lengths, rounds, strict=True)]
            )
            for name in Measured._fields
        }
        return Lengths(**columns)


def build_sets(specs: Sequence[DatasetSpec], encoder: RecordEncoder) -> list[RecordSet]:
    """Open all data sets of a meta file."""
    return [RecordSet(spec, encoder) for spec in specs]

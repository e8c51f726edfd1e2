"""The records of all data sets of a meta file, as one epoch of training goes through them."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from internvl_chat.data.encode.encoder import Measured, RecordEncoder
from internvl_chat.data.index.cache import Lengths
from internvl_chat.data.record_set import RecordKey, RecordSet, Sample
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.data.sources.skip_policy import ExcludedRecord, SkipBudget
from internvl_chat.utils.errors import DataError


class SampleIndex(NamedTuple):
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
        excluded: records that are not used. The others keep their order.
        max_bad_fraction: most of all records that may be left out, with those that turn out to be unusable
            in training; None if the first of these is to end the run.
        digests: SHA-256 of each set's annotation file, where they are to be known.
    """

    def __init__(
        self,
        sets: Sequence[RecordSet],
        *,
        seed: int = 0,
        lengths: Sequence[Lengths] | None = None,
        excluded: Sequence[ExcludedRecord] = (),
        max_bad_fraction: float | None = None,
        digests: Sequence[str] = (),
    ) -> None:
        self.sets, self.seed, self.lengths = list(sets), seed, lengths
        self.excluded, self.max_bad_fraction = tuple(excluded), max_bad_fraction
        self.digests = tuple(digests)
        if lengths is not None and [len(n) for n in lengths] != [s.num_distinct for s in self.sets]:
            raise ValueError("the lengths are not those of the sets")
        self._usable = [self._others(s, [out.index for out in excluded if out.dataset == s.spec.name])
                        for s in self.sets]  # fmt: skip
        self._rounds = [s.num_used // s.num_distinct if s.num_distinct else 0 for s in self.sets]
        self._bounds = np.cumsum([0, *self.sizes])
        if not len(self):
            reason = "every record is left out" if excluded else "every 'repeat_time' is too small"
            raise DataError(f"no records are left to train on: {reason}")

    @staticmethod
    def _others(records: RecordSet, excluded: Sequence[int]) -> np.ndarray:
        """Return the indices in its file of a set's records but those, in the file's order."""
        return np.setdiff1d(np.arange(records.num_distinct), np.array(excluded, np.int64))

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @property
    def sizes(self) -> list[int]:
        """Records of an epoch from each set, before resampling."""
        return [len(usable) * rounds for usable, rounds in zip(self._usable, self._rounds, strict=True)]

    def indices(self, number: int) -> np.ndarray:
        """Return the indices in its file of a set's records that are used, in the file's order."""
        return self._usable[number]

    @property
    def skip_bad(self) -> bool:
        """Whether a record that turns out to be unusable is left out of its pack."""
        return self.max_bad_fraction is not None

    def skip_budget(self) -> SkipBudget:
        """Return what counts such records until they are too many."""
        total = sum(records.num_distinct for records in self.sets)
        return SkipBudget(total, self.max_bad_fraction or 0.0, self.excluded)

    def locate(self, index: int) -> tuple[RecordSet, int]:
        """Return the set of a record of the epoch, and its index in the set's file."""
        number, index = self._place(index)
        return self.sets[number], index

    def key_of(self, index: int) -> RecordKey:
        """Return where a record of the epoch comes from."""
        records, index = self.locate(index)
        return RecordKey(records.spec.name, index)

    def _place(self, index: int) -> tuple[int, int]:
        """Return the number of a record's set, and its index in the set's file."""
        number = int(np.searchsorted(self._bounds, index, side="right")) - 1
        usable = self._usable[number]
        return number, int(usable[(index - int(self._bounds[number])) % len(usable)])

    def __getitem__(self, sample_index: SampleIndex) -> tuple[Sample, bool] | DataError:
        """Load a record; returns it and whether it counts.

        An error is returned, not raised: torch would bury one from a loader process in its traceback.
        """
        number, index = self._place(sample_index.index)
        rng = random.Random(f"{self.seed}/{sample_index.epoch}/{sample_index.index}")
        try:
            sample = self.sets[number].load(index, rng)
            self._compare(number, index, sample)
        except DataError as error:
            return error
        return sample, sample_index.counts

    def _compare(self, number: int, index: int, sample: Sample) -> None:
        """Raise a `DataError` where a record is not as long as it was when it was indexed."""
        if self.lengths is None:
            return
        lengths = self.lengths[number]
        found, expected = sample.encoded.measured[:3], lengths[index][:3]
        if found == expected:
            return
        now, before = (
            "{} tokens ({} supervised) and {} tiles".format(*numbers) for numbers in (found, expected)
        )
        remedy = f"delete {lengths.file} and start again" if lengths.file else "start again"
        message = f"{now}, but {before} when the lengths were indexed: an image has changed since; {remedy}"
        raise self.sets[number].error(index, message, sample.id, "changed")

    def epoch_lengths(self) -> Lengths:
        """Return the lengths of every record of the epoch, in its numbering (repeated records repeated).

        Raises:
            ValueError: the data was made without lengths.
        """
        if self.lengths is None:
            raise ValueError("TrainingData was made without the lengths of its records")
        sets = list(zip(self.lengths, self._usable, self._rounds, strict=True))
        columns = {
            name: np.concatenate([np.tile(lengths.columns[name][usable], n) for lengths, usable, n in sets])
            for name in Measured._fields
        }
        return Lengths(**columns)


def build_sets(specs: Sequence[DatasetSpec], encoder: RecordEncoder) -> list[RecordSet]:
    """Open all data sets of a meta file."""
    return [RecordSet(spec, encoder) for spec in specs]

"""The training dataset: the concatenated records of all datasets in a meta file."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from internvl_chat.data.encode.encoder import RecordEncoder, RecordLengths
from internvl_chat.data.index.cache import Lengths
from internvl_chat.data.record_set import RecordKey, RecordSet, Sample
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.data.sources.skip_policy import ExcludedRecord, SkipBudget
from internvl_chat.utils.errors import DataError, StorageError


class SampleIndex(NamedTuple):
    """One use of a record in training.

    Attributes:
        index: position among all records of the epoch.
        epoch: 0-based epoch; together with the index, it seeds the augmentation.
        counts: whether the record contributes to the loss; False for a dummy sample.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    epoch: int
    counts: bool = True


class TrainingData(Dataset):
    """The concatenation of all datasets of a meta file.

    Args:
        seed: seed of the augmentation.
        lengths: lengths from `index_records(sets)`; loading a record with different lengths is an error.
        excluded: records to exclude; the order of the others does not change.
        max_bad_fraction: maximum fraction of records that may be excluded before or skipped during training;
            None to stop at the first unusable record.
        digests: SHA-256 of each dataset's annotation file, recorded in checkpoints; empty if not needed.
        image_digests: digest of each dataset's image files, recorded in checkpoints; empty if not needed.
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
        image_digests: Sequence[str] = (),
    ) -> None:
        self.sets, self.seed, self.lengths = list(sets), seed, lengths
        self.excluded, self.max_bad_fraction = tuple(excluded), max_bad_fraction
        self.digests, self.image_digests = tuple(digests), tuple(image_digests)
        if lengths is not None and [len(n) for n in lengths] != [s.num_distinct for s in self.sets]:
            raise ValueError("the lengths do not match the datasets")
        self._usable = [
            np.setdiff1d(
                np.arange(s.num_distinct),
                np.array([record.index for record in excluded if record.dataset == s.spec.name], np.int64),
            )
            for s in self.sets
        ]
        self._repeats = [s.num_used // s.num_distinct if s.num_distinct else 0 for s in self.sets]
        self._bounds = np.cumsum([0, *self.sizes])
        if not len(self):
            reason = "all records are excluded" if excluded else "every 'repeat_time' is too small"
            raise DataError(f"no records left to train on: {reason}")

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @property
    def sizes(self) -> list[int]:
        """Number of records per epoch for each dataset, including repetitions but before resampling."""
        return [len(usable) * repeats for usable, repeats in zip(self._usable, self._repeats, strict=True)]

    def indices(self, set_number: int) -> np.ndarray:
        """Return the indices of a dataset's used records in its file, in ascending order."""
        return self._usable[set_number]

    @property
    def skip_bad(self) -> bool:
        """Whether records found unusable during training are skipped."""
        return self.max_bad_fraction is not None

    def skip_budget(self) -> SkipBudget:
        """Return the budget of records that may be excluded or skipped."""
        total = sum(records.num_distinct for records in self.sets)
        return SkipBudget(total, self.max_bad_fraction or 0.0, self.excluded)

    def locate(self, index: int) -> tuple[RecordSet, int]:
        """Map a position in the epoch to a dataset and the record's index in its file."""
        set_number, file_index = self._locate(index)
        return self.sets[set_number], file_index

    def key_of(self, index: int) -> RecordKey:
        """Return the key of the record at a position in the epoch."""
        records, file_index = self.locate(index)
        return RecordKey(records.spec.name, file_index)

    def _locate(self, index: int) -> tuple[int, int]:
        """Map a position in the epoch to a dataset number and the record's index in its file."""
        set_number = int(np.searchsorted(self._bounds, index, side="right")) - 1
        usable = self._usable[set_number]
        return set_number, int(usable[(index - int(self._bounds[set_number])) % len(usable)])

    def __getitem__(self, sample_index: SampleIndex) -> tuple[Sample, bool] | DataError | StorageError:
        """Load a record; return it and whether it contributes to the loss.

        Errors are returned instead of raised, because a dataloader worker would add its traceback.
        """
        set_number, index = self._locate(sample_index.index)
        rng = random.Random(f"{self.seed}/{sample_index.epoch}/{sample_index.index}")
        try:
            sample = self.sets[set_number].load(index, rng)
            self._check_lengths(set_number, index, sample)
        except (DataError, StorageError) as error:
            return error
        return sample, sample_index.counts

    def _check_lengths(self, set_number: int, index: int, sample: Sample) -> None:
        """Raise a `DataError` if a record's lengths differ from the indexed ones."""
        if self.lengths is None:
            return
        lengths = self.lengths[set_number]
        actual, indexed = sample.encoded.lengths[:3], lengths[index][:3]
        if actual == indexed:
            return
        now, before = (
            "{} tokens ({} supervised) and {} tiles".format(*counts) for counts in (actual, indexed)
        )
        fix = f"delete {lengths.file} and restart" if lengths.file else "restart"
        message = f"{now}, but {before} when it was indexed: an image has changed since; {fix}"
        raise self.sets[set_number].error(index, message, sample.id, "changed")

    def epoch_lengths(self) -> Lengths:
        """Return the lengths of all records of the epoch, with repetitions.

        Raises:
            ValueError: the data was created without lengths.
        """
        if self.lengths is None:
            raise ValueError("TrainingData was created without lengths")
        sets = list(zip(self.lengths, self._usable, self._repeats, strict=True))
        columns = {
            name: np.concatenate([np.tile(lengths.columns[name][usable], n) for lengths, usable, n in sets])
            for name in RecordLengths._fields
        }
        return Lengths.from_columns(columns)


def build_sets(specs: Sequence[DatasetSpec], encoder: RecordEncoder) -> list[RecordSet]:
    """Open the datasets of a meta file."""
    return [RecordSet(spec, encoder) for spec in specs]

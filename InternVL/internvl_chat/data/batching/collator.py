"""Pack samples into one row, with the positions and boundaries required by attention and the loss.

Shapes: R records, T tokens in the row, U supervised tokens, N tiles, S tile size in pixels.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from internvl_chat.constants import IGNORE_INDEX
from internvl_chat.data.dataset import SampleIndex, TrainingData
from internvl_chat.data.encode.tiling import normalize_tiles
from internvl_chat.data.record_set import RecordKey, Sample
from internvl_chat.data.sources.skip_policy import SkippedRecord
from internvl_chat.utils.errors import DataError, StorageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

DUMMY_KEY = RecordKey("", -1)


@dataclass(frozen=True)
class Pack:
    """Tensors of the records that are processed in one forward pass.

    Attributes:
        input_ids: (1, T).
        labels: (1, T).
        image_positions: positions in the row that receive vision features.
        label_positions: (U,) positions in the row whose next token is supervised.
        position_ids: (1, T), starting at 0 in each record.
        cu_seq_lens: (R + 1,) int32, start of each record and end of the last; padding adds a segment.
        max_length: length of the longest segment in tokens, rounded up to a multiple of `multiple` (see
            `pack_samples`).
        tiles: (N, S, S, 3) uint8, tiles of all records in order.
        supervised: (R,) number of supervised tokens of each record.
        counts: (R,) bool, whether each record contributes to the loss.
        keys: key of each record.
        skipped: records that were planned for this pack but are unusable.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    image_positions: torch.Tensor
    label_positions: torch.Tensor
    position_ids: torch.Tensor
    cu_seq_lens: torch.Tensor
    max_length: int
    tiles: torch.Tensor
    supervised: torch.Tensor
    counts: torch.Tensor
    keys: tuple[RecordKey, ...]
    skipped: tuple[SkippedRecord, ...] = ()

    @property
    def lengths(self) -> torch.Tensor:
        """Number of tokens of each record, (R,)."""
        return self.cu_seq_lens.diff()[: len(self.keys)]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the records that contribute to the loss."""
        return int((self.lengths * self.counts).sum())

    @property
    def num_supervised(self) -> int:
        """Number of supervised tokens of the records that contribute to the loss."""
        return int((self.supervised * self.counts).sum())

    def text_inputs(self, device: torch.device) -> dict[str, Any]:
        """Return the model's forward arguments on a device, except the tiles."""
        names = ("input_ids", "labels", "image_positions", "label_positions", "position_ids", "cu_seq_lens")
        inputs: dict[str, Any] = {n: getattr(self, n).to(device, non_blocking=True) for n in names}
        inputs["max_length"] = self.max_length
        return inputs

    def pixel_values(
        self, device: torch.device, normalization: str, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Move the tiles to a device and normalize them there; returns (N, 3, S, S)."""
        return normalize_tiles(self.tiles.to(device, non_blocking=True), normalization, dtype)

    def pin_memory(self) -> "Pack":
        """Return the pack in pinned memory, for asynchronous copies to a GPU."""
        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **pinned)


def pack_samples(samples: Sequence[tuple[Sample, bool]], multiple: int = 1) -> Pack:
    """Concatenate samples into one row.

    Args:
        samples: samples, and whether each contributes to the loss.
        multiple: pad the row to a multiple of this many tokens.
    """
    encoded = [sample.encoded for sample, _ in samples]
    lengths = [len(e.input_ids) for e in encoded]
    labels = torch.cat([e.labels for e in encoded])
    bounds = list(itertools.accumulate(lengths, initial=0))
    if (labels[bounds[:-1]] != IGNORE_INDEX).any():
        raise ValueError("the first token of a record must not be supervised")
    padding = -bounds[-1] % multiple
    segments = lengths + [padding] * (padding > 0)
    return Pack(
        input_ids=F.pad(torch.cat([e.input_ids for e in encoded]), (0, padding)).unsqueeze(0),
        labels=F.pad(labels, (0, padding), value=IGNORE_INDEX).unsqueeze(0),
        image_positions=torch.cat(
            [e.image_positions + start for e, start in zip(encoded, bounds, strict=False)]
        ),
        label_positions=(labels[1:] != IGNORE_INDEX).nonzero().squeeze(1),
        position_ids=torch.cat([torch.arange(n) for n in segments]).unsqueeze(0),
        cu_seq_lens=torch.tensor(list(itertools.accumulate(segments, initial=0)), dtype=torch.int32),
        max_length=-(-max(segments) // multiple) * multiple,
        tiles=torch.cat([sample.tiles for sample, _ in samples]),
        supervised=torch.tensor([e.num_supervised for e in encoded]),
        counts=torch.tensor([counts for _, counts in samples]),
        keys=tuple(sample.key for sample, _ in samples),
    )


@dataclass(frozen=True)
class PackDataset(Dataset):
    """Dataset of packs, indexed by lists of sample indices.

    Attributes:
        multiple: see `pack_samples`.
    """

    data: TrainingData
    multiple: int = 1

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, sample_indices: Sequence[SampleIndex]) -> Pack | DataError | StorageError:
        """Load a pack.

        If `data.skip_bad`, unusable records are excluded from the pack and listed in `skipped`. Otherwise,
        the error of the first one is returned. An error of object storage is always returned. Errors are not
        raised, because a dataloader worker would add its traceback.
        """
        samples, skipped = [], []
        for sample_index in sample_indices:
            loaded = self.data[sample_index]
            if isinstance(loaded, StorageError):
                return loaded
            if not isinstance(loaded, DataError):
                samples.append(loaded)
                continue
            if not self.data.skip_bad:
                return loaded
            logger.warning("record skipped: %s", loaded)
            if sample_index.counts:
                records, index = self.data.locate(sample_index.index)
                skipped.append(SkippedRecord(records.spec.name, index, loaded.record, str(loaded)))
        pack = pack_samples(samples or [(self._dummy(), False)], self.multiple)
        return replace(pack, skipped=tuple(skipped)) if skipped else pack

    def _dummy(self) -> Sample:
        """Return a dummy sample for a pack without usable records: every rank must run a forward pass."""
        encoder = self.data.sets[0].encoder
        return Sample(DUMMY_KEY, None, encoder.dummy(), encoder.tiles([], []))

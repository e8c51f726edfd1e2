"""Samples behind one another in one row, with what attention and the loss need to keep them apart.

Shapes: R records, T tokens of all of them, U supervised tokens, N tiles, S pixels a side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from internvl_chat.constants import IGNORE_INDEX
from internvl_chat.data.dataset import RecordKey, Sample
from internvl_chat.data.tiling import normalize_tiles
from internvl_chat.errors import DataError


@dataclass(frozen=True)
class Pack:
    """Records for one forward pass.

    Attributes:
        input_ids: (1, T).
        labels: (1, T).
        position_ids: (1, T), from 0 in each record.
        cu_seq_lens: (R + 1,) int32, where each record begins, and the end of the last.
        max_length: tokens of the longest record.
        tiles: (N, S, S, 3) uint8, of all records in order.
        supervised: (R,) supervised tokens of each record.
        counts: (R,) bool, False for a record of weight zero.
        keys: where each record comes from.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seq_lens: torch.Tensor
    max_length: int
    tiles: torch.Tensor
    supervised: torch.Tensor
    counts: torch.Tensor
    keys: tuple[RecordKey, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the records that count."""
        return int((self.cu_seq_lens.diff() * self.counts).sum())

    @property
    def num_supervised(self) -> int:
        """Supervised tokens of the records that count."""
        return int((self.supervised * self.counts).sum())

    def model_inputs(
        self, device: torch.device, normalization: str, dtype: torch.dtype = torch.float32
    ) -> dict[str, Any]:
        """Return the arguments of the model's forward pass, on a device, tiles normalised there."""
        names = ("input_ids", "labels", "position_ids", "cu_seq_lens")
        inputs: dict[str, Any] = {n: getattr(self, n).to(device, non_blocking=True) for n in names}
        tiles = self.tiles.to(device, non_blocking=True)
        inputs["pixel_values"] = normalize_tiles(tiles, normalization, dtype)
        inputs["max_length"] = self.max_length
        return inputs

    def pin_memory(self) -> "Pack":
        """Return the pack in page-locked memory, which copies to a GPU while it computes."""
        return Pack(
            **{k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()}
        )


def pack_samples(samples: Sequence[tuple[Sample, bool]]) -> Pack:
    """Put samples behind one another.

    Args:
        samples: each with whether it counts in the loss.
    """
    encoded = [sample.encoded for sample, _ in samples]
    lengths = torch.tensor([len(e.input_ids) for e in encoded])
    labels = torch.cat([e.labels for e in encoded])
    starts = lengths.cumsum(0) - lengths
    if (labels[starts] != IGNORE_INDEX).any():
        raise ValueError("the first token of a record is never a target")
    return Pack(
        input_ids=torch.cat([e.input_ids for e in encoded]).unsqueeze(0),
        labels=labels.unsqueeze(0),
        position_ids=torch.cat([torch.arange(n) for n in lengths.tolist()]).unsqueeze(0),
        cu_seq_lens=torch.cat([starts, lengths.sum().unsqueeze(0)]).to(torch.int32),
        max_length=int(lengths.max()),
        tiles=torch.cat([sample.tiles for sample, _ in samples]),
        supervised=torch.tensor([e.num_supervised for e in encoded]),
        counts=torch.tensor([counts for _, counts in samples]),
        keys=tuple(sample.key for sample, _ in samples),
    )


@dataclass(frozen=True)
class StepCollator:
    """Turns a process's share of an optimizer step into packs.

    Attributes:
        records_per_pack: most records of one forward pass (`per_device_train_batch_size`).
    """

    records_per_pack: int

    def __call__(self, samples: Sequence[tuple[Sample, bool] | DataError]) -> list[Pack] | DataError:
        """Cut the share into packs, in order; the first error among the samples is handed on instead."""
        for sample in samples:
            if isinstance(sample, DataError):
                return sample
        size = self.records_per_pack
        return [pack_samples(samples[i : i + size]) for i in range(0, len(samples), size)]

"""The teacher-forced loss of each record of a meta file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from internvl_chat.data.collator import pack_samples
from internvl_chat.data.dataset import RecordSet, Sample
from internvl_chat.model.modeling import InternVLChatModel


@dataclass(frozen=True)
class RecordLoss:
    """The loss of one record, in the order and under the names that programs read.

    Attributes:
        dataset: name of its set.
        index: in the set, from 0.
        id: in the file.
        loss: mean cross-entropy over its supervised tokens.
        num_supervised: how many those are.
    """

    dataset: str
    index: int
    id: str | None
    loss: float
    num_supervised: int


@torch.inference_mode()
def record_loss(model: InternVLChatModel, sample: Sample, normalization: str) -> RecordLoss:
    """Return the loss of one record."""
    device = next(model.parameters()).device
    pack = pack_samples([(sample, True)])
    pixels = pack.pixel_values(device, normalization, model.pixel_dtype)
    output = model(**pack.text_inputs(device), pixel_values=pixels)
    key = sample.key
    return RecordLoss(key.dataset, key.index, sample.id, output.loss.item(), sample.encoded.num_supervised)


def losses(
    model: InternVLChatModel, sets: Sequence[RecordSet], normalization: str, limit: int | None = None
) -> Iterator[RecordLoss]:
    """Yield the loss of the first `limit` records of each set (all without a limit), in order."""
    model.eval()
    for records in sets:
        for index in records.first(limit):
            yield record_loss(model, records.load(index), normalization)

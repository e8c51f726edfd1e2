"""The teacher-forced loss of each record of a meta file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from internvl_chat.data.batching.collator import pack_samples
from internvl_chat.data.record_set import RecordSet, Sample
from internvl_chat.inference.token_losses import pack_losses
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel


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


def record_loss(model: InternVLChatModel, sample: Sample, normalization: str) -> RecordLoss:
    """Return the loss of one record."""
    [losses] = pack_losses(model, pack_samples([(sample, True)]), normalization)
    key = sample.key
    return RecordLoss(key.dataset, key.index, sample.id, losses.mean().item(), len(losses))


def losses(
    model: InternVLChatModel, sets: Sequence[RecordSet], normalization: str, limit: int | None = None
) -> Iterator[RecordLoss]:
    """Yield the loss of the first `limit` records of each set (all without a limit), in order."""
    model.eval()
    for records in sets:
        for index in records.first(limit):
            yield record_loss(model, records.load(index), normalization)

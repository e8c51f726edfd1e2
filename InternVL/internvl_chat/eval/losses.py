"""Teacher-forced loss of each record in a meta file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from internvl_chat.data.batching.collator import pack_samples
from internvl_chat.data.record_set import RecordSet
from internvl_chat.inference.token_losses import pack_losses
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel


@dataclass(frozen=True)
class RecordLoss:
    """Loss of one record. The fields are keys in the JSON output of `m3llm loss`.

    Attributes:
        loss: mean cross-entropy over the supervised tokens.
    """

    dataset: str
    index: int
    id: str | None
    loss: float
    num_supervised: int


def losses(
    model: InternVLChatModel, sets: Sequence[RecordSet], normalization: str, limit: int | None = None
) -> Iterator[RecordLoss]:
    """Yield the loss of each record, in order.

    Args:
        model: model; this function switches it to evaluation mode.
        sets: datasets.
        normalization: pixel normalization, a key of `NORMALIZATIONS`.
        limit: use the first `limit` records of each dataset (default: all).
    """
    model.eval()
    for records in sets:
        for index in records.first(limit):
            sample = records.load(index)
            [token_losses] = pack_losses(model, pack_samples([(sample, True)]), normalization)
            mean = token_losses.mean().item()
            yield RecordLoss(sample.key.dataset, sample.key.index, sample.id, mean, len(token_losses))

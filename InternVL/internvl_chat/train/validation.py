"""Validate during training: losses, and agreement of generated answers with the references.

Validation does not affect training: it changes no weights, no random state and no position in the data.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from internvl_chat.data.batching.collator import Pack, PackDataset
from internvl_chat.data.batching.sampler import StepSampler
from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.inference.engine import Engine, last_question
from internvl_chat.inference.token_losses import pack_losses
from internvl_chat.metrics.overlap import exact_match
from internvl_chat.metrics.rouge import rouge
from internvl_chat.model.loss import token_weight
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import DataError

_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class EvalMetrics:
    """Metrics of one dataset, or of all.

    Attributes:
        records: number of records.
        tokens: number of supervised tokens.
        loss: loss, weighted as in training (`--loss_reduction`); None without records.
        em: percentage of generated answers that match exactly; None if none was generated.
        rougeL: mean ROUGE-L F1 of the generated answers in percent; None if none was generated.
        generated: number of generated answers.
    """

    records: int
    tokens: int
    loss: float | None
    em: float | None
    rougeL: float | None
    generated: int

    @classmethod
    def from_sums(cls, sums: Sequence[float]) -> "EvalMetrics":
        """Return the metrics, given the sums of `Validation.run`."""
        weighted, weights, records, tokens, matches, rouges, generated = sums
        means = (100 * total / generated if generated else None for total in (matches, rouges))
        loss = weighted / weights if weights else None
        return cls(int(records), int(tokens), loss, *means, int(generated))

    def values(self) -> dict[str, float]:
        """Return the metrics that were measured."""
        values = {name: getattr(self, name) for name in ("loss", "em", "rougeL")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class EvalResult:
    """Result of a validation.

    Attributes:
        overall: metrics over the records of all datasets.
        sets: metrics of each dataset, by name.
    """

    overall: EvalMetrics
    sets: dict[str, EvalMetrics]

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name; see `metric_names`."""
        values = {f"eval_{name}": value for name, value in self.overall.values().items()}
        for dataset, metrics in self.sets.items():
            values |= {f"eval_{dataset}_{name}": value for name, value in metrics.values().items()}
        return values

    def row(self) -> dict[str, Any]:
        """Return the metrics as a line of `validation.jsonl`."""
        sets = {name: dataclasses.asdict(metrics) for name, metrics in self.sets.items()}
        return dataclasses.asdict(self.overall) | {"sets": sets}


def metric_names(datasets: Iterable[str], *, generate: bool) -> list[str]:
    """Return the names of the metrics that a validation measures."""
    kinds = ("loss", "em", "rougeL") if generate else ("loss",)
    prefixes = ("", *(f"{name}_" for name in datasets))
    return [f"eval_{prefix}{kind}" for prefix in prefixes for kind in kinds]


def validation_specs(specs: Sequence[DatasetSpec]) -> list[DatasetSpec]:
    """Return the datasets for validation: every record at most once, without augmentation."""
    return [
        dataclasses.replace(spec, data_augment=False, repeat_time=min(spec.repeat_time, 1)) for spec in specs
    ]


@dataclass
class Validation:
    """The validation records and their packs on this rank.

    Attributes:
        data: the validation records.
        sampler: the packs of this rank.
        reduction: weighting of the loss, one of `LOSS_REDUCTIONS`.
        generate: number of answers to generate for each dataset.
        normalization: pixel statistics of the tiles.
        packs: packs by sample indices, for the dataloader.
    """

    data: TrainingData
    sampler: StepSampler
    reduction: str
    generate: int
    normalization: str
    packs: PackDataset = field(init=False)

    def __post_init__(self) -> None:
        self.packs = PackDataset(self.data)

    def run(
        self,
        model: InternVLChatModel,
        batches: Iterable[Sequence[Pack | DataError]],
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> EvalResult | None:
        """Validate a model and leave it in evaluation mode; return None if any rank was stopped.

        Args:
            model: the model on its device.
            batches: batches of this rank's packs, from a dataloader over `packs` and `sampler`.
            is_stopped: returns whether to stop this rank; called after each pack and answer.

        Raises:
            DataError: a record cannot be used.
        """
        model.eval()
        sums = torch.zeros(len(self.data.sets), 7, dtype=torch.float64)
        packs = itertools.takewhile(lambda _: not is_stopped(), itertools.chain.from_iterable(batches))
        self._add_losses(model, packs, sums)
        self._add_answers(model, sums, is_stopped)
        if distributed.any_rank(is_stopped()):
            return None
        sums = distributed.all_reduce_sum(sums)
        names = [records.spec.name for records in self.data.sets]
        metrics = [EvalMetrics.from_sums(row) for row in sums.tolist()]
        return EvalResult(
            EvalMetrics.from_sums(sums.sum(dim=0).tolist()), dict(zip(names, metrics, strict=True))
        )

    def _add_losses(
        self, model: InternVLChatModel, packs: Iterable[Pack | DataError], sums: torch.Tensor
    ) -> None:
        """Add the weighted loss, weight, records and tokens of each record to the sums of its dataset."""
        numbers = {records.spec.name: number for number, records in enumerate(self.data.sets)}
        for pack in packs:
            if isinstance(pack, DataError):
                raise pack
            losses = pack_losses(model, pack, self.normalization)
            for key, counts, record_losses in zip(pack.keys, pack.counts.tolist(), losses, strict=True):
                if counts:
                    tokens, total = len(record_losses), float(record_losses.double().sum())
                    weight = token_weight(tokens, self.reduction)
                    added = [weight * total, weight * tokens, 1, tokens]
                    sums[numbers[key.dataset], :4] += torch.tensor(added, dtype=torch.float64)

    def _add_answers(
        self, model: InternVLChatModel, sums: torch.Tensor, is_stopped: Callable[[], bool]
    ) -> None:
        """Add exact match, ROUGE-L and the number of this rank's answers to the sums of their datasets."""
        keys = [(number, i) for number in range(len(self.data.sets)) for i in self.generation_indices(number)]
        for number, group in itertools.groupby(distributed.shard(keys), key=lambda key: key[0]):
            records = self.data.sets[number]
            engine = Engine(model, records.encoder.tokenizer, records.encoder.preprocessing)
            parsed = [(index, records.record(index)) for _, index in group]
            questions = [last_question(record, records.images(index, record)) for index, record in parsed]
            answers = engine.answer_each((prompt for prompt, _ in questions), max_new_tokens=_MAX_NEW_TOKENS)
            for position, answer in answers:
                if is_stopped():
                    return
                reference = questions[position][1]
                scores = [exact_match(answer, reference), rouge(answer, reference)["rougeL"], 1]
                sums[number, 4:] += torch.tensor(scores, dtype=torch.float64)

    def generation_indices(self, number: int) -> list[int]:
        """Return the records of dataset `number` whose last question is answered, evenly spaced."""
        indices = self.data.indices(number)
        if self.data.lengths is not None:
            # The question of a truncated record alone may be too long.
            indices = indices[self.data.lengths[number].tokens_truncated[indices] == 0]
        count = min(self.generate, len(indices))
        return indices[np.arange(count) * len(indices) // max(count, 1)].tolist()

"""Validation while training: losses on the validation sets, and how generated answers agree with references.

It changes nothing that training depends on: no weight, no random state, no position in the data.
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

_LONGEST_ANSWER = 256


@dataclass(frozen=True)
class EvalMetrics:
    """Metrics of one data set, or of all.

    Attributes:
        records: whose loss was computed.
        tokens: their supervised tokens.
        loss: weighted as in training (`--loss_reduction`); None without records.
        em: percentage of generated answers that match exactly; None if none was generated.
        rougeL: mean ROUGE-L F1 of the generated answers, in percent.
        generated: number of answers.
    """

    records: int
    tokens: int
    loss: float | None
    em: float | None
    rougeL: float | None
    generated: int

    @classmethod
    def from_sums(cls, sums: Sequence[float]) -> "EvalMetrics":
        """Return the metrics of sums over the records of a set on all ranks."""
        weighted, weights, records, tokens, matches, rouges, generated = sums
        means = (100 * total / generated if generated else None for total in (matches, rouges))
        loss = weighted / weights if weights else None
        return cls(int(records), int(tokens), loss, *means, int(generated))

    def measured(self) -> dict[str, float]:
        """Return the metrics that can choose the best model."""
        found = {name: getattr(self, name) for name in ("loss", "em", "rougeL")}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class EvalResult:
    """Result of a validation.

    Attributes:
        overall: on all records; sets count by their records.
        sets: on each set, by name.
    """

    overall: EvalMetrics
    sets: dict[str, EvalMetrics]

    def metrics(self) -> dict[str, float]:
        """Return the metrics under the names of `metric_names`."""
        found = {f"eval_{name}": value for name, value in self.overall.measured().items()}
        for set_name, metrics in self.sets.items():
            found |= {f"eval_{set_name}_{name}": value for name, value in metrics.measured().items()}
        return found

    def row(self) -> dict[str, Any]:
        """Return the line of `validation.jsonl`."""
        sets = {name: dataclasses.asdict(metrics) for name, metrics in self.sets.items()}
        return dataclasses.asdict(self.overall) | {"sets": sets}


def metric_names(sets: Iterable[str], *, generate: bool) -> list[str]:
    """Return the names of the metrics that a validation measures."""
    kinds = ("loss", "em", "rougeL") if generate else ("loss",)
    return [f"eval_{name}{kind}" for name in ("", *(f"{name}_" for name in sets)) for kind in kinds]


def validation_specs(specs: Sequence[DatasetSpec]) -> list[DatasetSpec]:
    """Return data sets as they are validated on: every record unaugmented and once."""
    return [
        dataclasses.replace(spec, data_augment=False, repeat_time=min(spec.repeat_time, 1)) for spec in specs
    ]


@dataclass
class Validation:
    """The validation records, and which of them this rank evaluates.

    Attributes:
        data: the records.
        sampler: their packs.
        reduction: what weighs the same, one of `LOSS_REDUCTIONS`.
        generate: how many questions of each set are answered.
        normalization: pixel statistics of the tiles.
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
        """Validate a model; None if some rank was asked to stop. The model is left in evaluation mode.

        Args:
            model: on its device.
            batches: the packs of this rank, from `packs` by `sampler`.
            is_stopped: whether this rank is asked to stop; called after each pack.

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
        """Add the weighted loss, weight, records and tokens of each record to the sums of its set."""
        numbers = {records.spec.name: number for number, records in enumerate(self.data.sets)}
        for pack in packs:
            if isinstance(pack, DataError):
                raise pack
            losses = pack_losses(model, pack, self.normalization)
            for key, counts, found in zip(pack.keys, pack.counts.tolist(), losses, strict=True):
                if counts:
                    weight = token_weight(len(found), self.reduction)
                    added = [weight * float(found.double().sum()), weight * len(found), 1, len(found)]
                    sums[numbers[key.dataset], :4] += torch.tensor(added, dtype=torch.float64)

    def _add_answers(
        self, model: InternVLChatModel, sums: torch.Tensor, is_stopped: Callable[[], bool]
    ) -> None:
        """Add exact matches, ROUGE-L and the number of this rank's answers to the sums of their sets."""
        own = distributed.shard(
            [(number, index) for number in range(len(self.data.sets)) for index in self.asked(number)]
        )
        for number, group in itertools.groupby(own, key=lambda question: question[0]):
            records = self.data.sets[number]
            engine = Engine(model, records.encoder.tokenizer, records.encoder.preprocessing)
            parsed = [(index, records.record(index)) for _, index in group]
            asked = [last_question(record, records.images(index, record)) for index, record in parsed]
            answers = engine.answer_each((prompt for prompt, _ in asked), max_new_tokens=_LONGEST_ANSWER)
            for position, answer in answers:
                if is_stopped():
                    return
                reference = asked[position][1]
                scores = [exact_match(answer, reference), rouge(answer, reference)["rougeL"], 1]
                sums[number, 4:] += torch.tensor(scores, dtype=torch.float64)

    def asked(self, number: int) -> list[int]:
        """Return the records of a set whose last question is answered: always the same, evenly spaced."""
        indices = self.data.indices(number)
        if self.data.lengths is not None:
            # With truncated text, the question alone may be too long.
            indices = indices[self.data.lengths[number].tokens_truncated[indices] == 0]
        wanted = min(self.generate, len(indices))
        return indices[np.arange(wanted) * len(indices) // max(wanted, 1)].tolist()

"""Figures on held-out records while training: losses, and how answers agree with the expected ones.

Nothing that the training depends on is changed: no weight, no randomness, no place in the data.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from internvl_chat.data.collator import Pack, PackDataset
from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.meta import DatasetSpec
from internvl_chat.data.order import StepSampler
from internvl_chat.inference.engine import Engine, last_question
from internvl_chat.inference.parallel import share
from internvl_chat.inference.token_losses import pack_losses
from internvl_chat.metrics.overlap import exact_match
from internvl_chat.metrics.rouge import rouge
from internvl_chat.model.loss import token_weight
from internvl_chat.model.modeling import InternVLChatModel
from internvl_chat.utils.errors import DataError

_LONGEST_ANSWER = 256

# Adds up float64 values over all processes.
Sum = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Figures:
    """What was found on a data set, or on all.

    Attributes:
        records: whose loss was computed.
        tokens: supervised tokens of these.
        loss: weighted as in training (`--loss_reduction`); none without records.
        em: percentage of generated answers that match exactly; none if none was generated.
        rougeL: mean ROUGE-L F of the generated answers, in percent.
        generated: answers.
    """

    records: int
    tokens: int
    loss: float | None
    em: float | None
    rougeL: float | None
    generated: int

    @classmethod
    def of_sums(cls, sums: Sequence[float]) -> "Figures":
        """Return the figures that the sums of a set's records make over all processes."""
        weighted, weights, records, tokens, matches, rouges, generated = sums
        means = (100 * total / generated if generated else None for total in (matches, rouges))
        loss = weighted / weights if weights else None
        return cls(int(records), int(tokens), loss, *means, int(generated))

    def measured(self) -> dict[str, float]:
        """Return the figures that a model can be chosen by."""
        found = {name: getattr(self, name) for name in ("loss", "em", "rougeL")}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Outcome:
    """What a validation found.

    Attributes:
        everything: on all records; sets count by their records.
        sets: on each set, by its name.
    """

    everything: Figures
    sets: dict[str, Figures]

    def metrics(self) -> dict[str, float]:
        """Return the figures under the names of `metric_names`."""
        found = {f"eval_{name}": value for name, value in self.everything.measured().items()}
        for set_name, figures in self.sets.items():
            found |= {f"eval_{set_name}_{name}": value for name, value in figures.measured().items()}
        return found

    def row(self) -> dict[str, Any]:
        """Return all of it as a line of `validation.jsonl`."""
        sets = {name: dataclasses.asdict(figures) for name, figures in self.sets.items()}
        return dataclasses.asdict(self.everything) | {"sets": sets}


def metric_names(sets: Iterable[str], *, generate: bool) -> list[str]:
    """Return the names of what a validation measures, any of which may choose the best model."""
    kinds = ("loss", "em", "rougeL") if generate else ("loss",)
    return [f"eval_{name}{kind}" for name in ("", *(f"{name}_" for name in sets)) for kind in kinds]


def held_out(specs: Sequence[DatasetSpec]) -> list[DatasetSpec]:
    """Return data sets as they are to be validated on: every record as it is, and once."""
    return [
        dataclasses.replace(spec, data_augment=False, repeat_time=min(spec.repeat_time, 1)) for spec in specs
    ]


@dataclass
class Validation:
    """The held-out records, and which of them this process goes through.

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
        shares: Iterable[Sequence[Pack | DataError]],
        total: Sum,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Outcome | None:
        """Validate a model, which is put into evaluation mode; None if some process was asked to stop.

        Args:
            model: on its device.
            shares: the packs of this process, from `packs` by `sampler`.
            total: adds up what the processes have found.
            is_stopped: says that this process is to stop; asked after each pack.

        Raises:
            DataError: a record cannot be used.
        """
        model.eval()
        sums = torch.zeros(len(self.data.sets), 7, dtype=torch.float64)
        packs = itertools.takewhile(lambda _: not is_stopped(), itertools.chain.from_iterable(shares))
        self._add_losses(model, packs, sums)
        self._add_answers(model, sums, is_stopped)
        if total(torch.tensor([float(is_stopped())], dtype=torch.float64)).item():
            return None
        sums = total(sums)
        names = [records.spec.name for records in self.data.sets]
        figures = [Figures.of_sums(row) for row in sums.tolist()]
        return Outcome(Figures.of_sums(sums.sum(dim=0).tolist()), dict(zip(names, figures, strict=True)))

    def _add_losses(
        self, model: InternVLChatModel, packs: Iterable[Pack | DataError], sums: torch.Tensor
    ) -> None:
        """Add weighted loss, weight, records and tokens of each record to its set's sums."""
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
        """Add exact matches, ROUGE-L and number of this process's answers to their sets' sums."""
        own = share(
            [(number, index) for number in range(len(self.data.sets)) for index in self.asked(number)]
        )
        for number, group in itertools.groupby(own, key=lambda place: place[0]):
            records = self.data.sets[number]
            engine = Engine(model, records.encoder.tokenizer, records.encoder.preprocessing)
            parsed = [(index, records.record(index)) for _, index in group]
            asked = [last_question(record, records.images(index, record)) for index, record in parsed]
            answers = engine.answer_each((prompt for prompt, _ in asked), max_new_tokens=_LONGEST_ANSWER)
            for place, answer in answers:
                if is_stopped():
                    return
                reference = asked[place][1]
                scores = [exact_match(answer, reference), rouge(answer, reference)["rougeL"], 1]
                sums[number, 4:] += torch.tensor(scores, dtype=torch.float64)

    def asked(self, number: int) -> list[int]:
        """Return the records of a set whose last question is answered: always the same, spread evenly."""
        indices = self.data.indices(number)
        if self.data.lengths is not None:
            # Where the end is cut off, the question may be too long by itself.
            indices = indices[self.data.lengths[number].tokens_cut[indices] == 0]
        wanted = min(self.generate, len(indices))
        return indices[np.arange(wanted) * len(indices) // max(wanted, 1)].tolist()

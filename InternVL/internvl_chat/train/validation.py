"""Validation during training: losses, and agreement of generated answers with the references.

Validation does not affect training: weights, random state and data order do not change.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from internvl_chat.data.batching.collator import Pack, PackDataset
from internvl_chat.data.batching.dataloader import DataLoaderOptions
from internvl_chat.data.batching.sampler import StepSampler
from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.images import ImageLocation
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.inference.engine import Engine, Prompt, Reply, last_question
from internvl_chat.inference.token_losses import pack_losses
from internvl_chat.metrics.overlap import exact_match
from internvl_chat.metrics.rouge import rouge
from internvl_chat.model.loss import token_weight
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import DataError, StorageError

_MAX_NEW_TOKENS = 256


# Metrics of a dataset; `em` and `rougeL` compare generated answers with the references, in percent.
_METRICS = ("loss", "em", "rougeL")


def metrics_of(sums: Sequence[float]) -> dict[str, Any]:
    """Return the metrics of a dataset, computed from its row of `sums` in `Validation.run`.

    The loss is weighted as in training (`--loss_reduction`). Metrics without data are None.
    """
    weighted, weights, records, tokens, matches, rouges, generated, truncated = sums
    return {
        "records": int(records),
        "tokens": int(tokens),
        "loss": weighted / weights if weights else None,
        "em": 100 * matches / generated if generated else None,
        "rougeL": 100 * rouges / generated if generated else None,
        "generated": int(generated),
        "truncated": int(truncated),
    }


def named_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Return a result of `Validation.run` as a flat dict (see `metric_names`), without None values."""
    parts = {"": row} | {f"{dataset}_": part for dataset, part in row["sets"].items()}
    values = {f"eval_{prefix}{name}": part[name] for prefix, part in parts.items() for name in _METRICS}
    return {name: value for name, value in values.items() if value is not None}


def metric_names(datasets: Iterable[str], *, generate: bool) -> list[str]:
    """Return the names of the metrics that validation computes, for example `eval_loss`.

    Args:
        datasets: names of the validation datasets, which become part of the metric names.
        generate: whether answers are generated, which adds exact match and ROUGE-L.
    """
    kinds = _METRICS if generate else ("loss",)
    prefixes = ("", *(f"{name}_" for name in datasets))
    return [f"eval_{prefix}{kind}" for prefix in prefixes for kind in kinds]


def validation_specs(specs: Sequence[DatasetSpec]) -> list[DatasetSpec]:
    """Return the datasets as used for validation: without augmentation, and with each record at most once."""
    return [
        dataclasses.replace(spec, data_augment=False, repeat_time=min(spec.repeat_time, 1)) for spec in specs
    ]


class ValidationResult(NamedTuple):
    """Result of a validation, the same on all ranks.

    Attributes:
        metrics: metrics over all records and, under `sets`, of each dataset by name.
        samples: rows of `samples.jsonl`, without the step.
    """

    metrics: dict[str, Any]
    samples: list[dict[str, Any]]


def _sample_row(
    records: RecordSet,
    index: int,
    prompt: Prompt,
    reference: str,
    answer: Reply,
    images: Sequence[ImageLocation],
) -> dict[str, Any]:
    """Return the row of an answer in `samples.jsonl`, without the step."""
    return {
        "dataset": records.spec.name,
        "index": index,
        "images": [str(path.absolute() if isinstance(path, Path) else path) for path in images],
        "question": prompt.messages[-1].content,
        "reference": reference,
        "answer": str(answer),
        "truncated": answer.truncated,
    }


@dataclass
class Validation:
    """Validates a model; each rank processes its share of the validation records.

    Attributes:
        reduction: loss weighting, one of `LOSS_REDUCTIONS`.
        generate: number of answers per dataset to generate for the metrics.
        samples: number of answers to generate for `samples.jsonl`, across all datasets.
        normalization: pixel normalization, one of `NORMALIZATIONS`.
    """

    data: TrainingData
    sampler: StepSampler
    reduction: str
    generate: int
    samples: int
    normalization: str
    options: DataLoaderOptions

    def run(
        self,
        model: InternVLChatModel,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> ValidationResult | None:
        """Validate a model, which is left in evaluation mode.

        Args:
            is_stopped: returns whether to stop early; called before each pack and after each answer.

        Returns:
            Metrics and sample answers; None if any rank was stopped.

        Raises:
            DataError: a record is unusable.
        """
        model.eval()
        sums = torch.zeros(len(self.data.sets), 8, dtype=torch.float64)
        batches = self.options.build(PackDataset(self.data), self.sampler, persistent_workers=False)
        packs = itertools.takewhile(lambda _: not is_stopped(), itertools.chain.from_iterable(batches))
        # Run eagerly: blocks compiled for training would be recompiled.
        with torch.compiler.set_stance("force_eager"):
            self._add_losses(model, packs, sums)
            samples = self._add_answers(model, sums, is_stopped)
        if distributed.any_rank(is_stopped()):
            return None
        sums = distributed.all_reduce_sum(sums)
        gathered = itertools.chain.from_iterable(distributed.all_gather_object(samples))
        sets = {
            records.spec.name: metrics_of(row)
            for records, row in zip(self.data.sets, sums.tolist(), strict=True)
        }
        return ValidationResult(
            metrics_of(sums.sum(dim=0).tolist()) | {"sets": sets},
            [row for _, row in sorted(gathered, key=itemgetter(0))],
        )

    def _add_losses(
        self, model: InternVLChatModel, packs: Iterable[Pack | DataError | StorageError], sums: torch.Tensor
    ) -> None:
        """Compute the loss of each record; add it, with weight and counts, to the sums of the dataset."""
        numbers = {records.spec.name: number for number, records in enumerate(self.data.sets)}
        for pack in packs:
            if isinstance(pack, DataError | StorageError):
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
    ) -> list[tuple[tuple[int, int], dict[str, Any]]]:
        """Generate this rank's answers, and add their scores and counts to the sums of their datasets.

        Returns:
            For each sample answer, its dataset number and record index, and its row of `samples.jsonl`.
        """
        numbers = range(len(self.data.sets))
        scored = {(n, i) for n in numbers for i in self.generation_indices(n, self.generate)}
        sampled = {(n, i) for n in numbers for i in self.generation_indices(n, self._samples_of(n))}
        keys = sorted(scored | sampled)
        samples: list[tuple[tuple[int, int], dict[str, Any]]] = []
        for number, group in itertools.groupby(distributed.shard(keys), key=itemgetter(0)):
            records = self.data.sets[number]
            engine = Engine(model, records.encoder.tokenizer, records.encoder.preprocessing)
            parsed = [(key, records.record(key[1])) for key in group]
            questions = [last_question(record, records.images(key[1], record)) for key, record in parsed]
            answers = engine.answer_each((prompt for prompt, _ in questions), max_new_tokens=_MAX_NEW_TOKENS)
            for position, answer in answers:
                if is_stopped():
                    return samples
                (key, record), (prompt, reference) = parsed[position], questions[position]
                if key in scored:
                    scores = [exact_match(answer, reference), rouge(answer, reference)["rougeL"], 1]
                    scores.append(answer.truncated)
                    sums[number, 4:] += torch.tensor(scores, dtype=torch.float64)
                if key in sampled:
                    images = records.image_paths(record)[: len(prompt.images)]
                    samples.append((key, _sample_row(records, key[1], prompt, reference, answer, images)))
        return samples

    def _samples_of(self, number: int) -> int:
        """Return the number of sample answers for dataset `number`."""
        each, more = divmod(self.samples, len(self.data.sets))
        return each + (number < more)

    def generation_indices(self, number: int, count: int) -> list[int]:
        """Return at most `count` evenly spaced indices of records in dataset `number`."""
        indices = self.data.indices(number)
        if self.data.lengths is not None:
            # Exclude truncated records, whose prompt alone may be too long.
            indices = indices[self.data.lengths[number].tokens_truncated[indices] == 0]
        count = min(count, len(indices))
        return indices[np.arange(count) * len(indices) // max(count, 1)].tolist()

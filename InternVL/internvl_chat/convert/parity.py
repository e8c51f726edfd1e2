"""Compare tokens, tiles, pixels, logits and greedy answers of two checkpoints or two formats of a checkpoint.

Only one checkpoint is in memory at a time; the results of the first one are stored on disk.
"""

import gc
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from internvl_chat.convert.parity_runners import Example, Trace, open_runner
from internvl_chat.data.dataset import build_sets
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer import load_tokenizer
from internvl_chat.data.record_set import RecordKey, RecordSet
from internvl_chat.data.sources.meta import load_meta
from internvl_chat.data.synthetic.sample_data import write_sample_data
from internvl_chat.model.configuration import InternVisionConfig, InternVLChatConfig
from internvl_chat.model.io.adapter import find_base
from internvl_chat.model.io.folders import is_adapter, read_config
from internvl_chat.model.io.merged_checkpoint import has_adapters
from internvl_chat.model.io.weights import read_weights, weight_files
from internvl_chat.utils.errors import DataError, ModelError
from internvl_chat.utils.hardware import available_host_memory

Progress = Callable[[Iterable[Example]], Iterable[Example]]


@dataclass(frozen=True)
class Tolerances:
    """Largest accepted differences between two checkpoints.

    Attributes:
        logits: maximum difference between logits, as a fraction of the record's largest absolute logit.
        pixels: maximum difference between normalized pixels.
        same_answers: minimum fraction of identical greedy answers.
    """

    logits: float
    pixels: float = 1e-5
    same_answers: float = 1.0


@dataclass(frozen=True)
class Difference:
    """Differences between two checkpoints on one record.

    Attributes:
        same_ids: whether the token ids of the conversation are identical.
        same_tiles: whether every image has the same number of tiles.
        pixels: largest absolute difference between normalized pixels; None if the tiles differ in number or
            size.
        logits: largest absolute difference between logits; None if the token ids or vocabulary sizes differ.
        largest_logit: largest absolute logit of the first checkpoint.
    """

    dataset: str
    index: int
    id: str | None
    same_ids: bool
    same_tiles: bool
    pixels: float | None
    logits: float | None
    largest_logit: float
    same_answer: bool
    answers: tuple[str, str]

    @property
    def relative_logits(self) -> float | None:
        """`logits` as a fraction of `largest_logit`; infinite if a logit is not finite."""
        if self.logits is None:
            return None
        if not math.isfinite(self.largest_logit):
            return math.inf
        return self.logits / self.largest_logit if self.logits else 0.0


def compare(
    first: Path,
    second: Path,
    examples: Sequence[Example],
    *,
    device: torch.device,
    dtype: torch.dtype,
    bases: tuple[str | Path | None, str | Path | None] = (None, None),
    max_new_tokens: int = 16,
    progress: Progress = iter,
) -> Iterator[Difference]:
    """Yield the differences between two checkpoints on each example.

    Args:
        dtype: dtype of the weights (see `comparison_dtype`).
        bases: for each checkpoint, the new path or Hub id of its base model; None if it has not moved.
        progress: wraps the examples in a progress bar while the first checkpoint runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        runner = open_runner(first, device=device, dtype=dtype, base=bases[0])
        for number, example in enumerate(progress(examples)):
            torch.save(vars(runner.run(example, max_new_tokens)), Path(folder, f"{number}.pt"))
        del runner
        gc.collect()
        runner = open_runner(second, device=device, dtype=dtype, base=bases[1])
        for number, example in enumerate(examples):
            trace = Trace(**torch.load(Path(folder, f"{number}.pt"), weights_only=True))
            yield _difference(example, trace, runner.run(example, max_new_tokens))


def _difference(example: Example, a: Trace, b: Trace) -> Difference:
    same_ids = torch.equal(a.input_ids, b.input_ids)
    same_shapes = a.logits.shape == b.logits.shape
    return Difference(
        *example.key,
        example.record.id,
        same_ids=same_ids,
        same_tiles=a.tiles == b.tiles,
        pixels=_largest(a.pixels, b.pixels) if a.pixels.shape == b.pixels.shape else None,
        logits=_largest(a.logits, b.logits) if same_ids and same_shapes else None,
        largest_logit=_largest(a.logits, torch.zeros(())),
        same_answer=a.answer == b.answer,
        answers=(a.answer, b.answer),
    )


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest absolute difference; NaN counts as infinite."""
    difference = (a - b).abs().nan_to_num(nan=torch.inf)
    return difference.max().item() if difference.numel() else 0.0


def faults(differences: Sequence[Difference], allowed: Tolerances) -> list[str]:
    """Return a message for each difference that exceeds the tolerances."""
    problems = []
    for name, field in (("token ids", "same_ids"), ("tiles", "same_tiles")):
        differing = [d for d in differences if not getattr(d, field)]
        if differing:
            problems.append(f"the {name} differ on {len(differing)} of {len(differences)} records, "
                            f"e.g. on record {differing[0].index} of {differing[0].dataset}")  # fmt: skip
    for name, field in (("pixels", "same_tiles"), ("logits", "same_ids")):
        if any(getattr(d, field) and getattr(d, name) is None for d in differences):
            problems.append(f"the {name} have different shapes: the models differ in size")
    pixels = max((d.pixels for d in differences if d.pixels is not None), default=0.0)
    if not pixels <= allowed.pixels:
        problems.append(f"the pixels differ by up to {pixels:.3g}, more than {allowed.pixels:.3g}")
    measured = (d.relative_logits for d in differences)
    logits = max((value for value in measured if value is not None), default=0.0)
    if not logits <= allowed.logits:
        problems.append(
            f"the logits differ by up to {logits:.3g} of the largest logit, more than {allowed.logits:.3g}"
        )
    same = sum(d.same_answer for d in differences) / max(len(differences), 1)
    if same < allowed.same_answers:
        problems.append(
            f"{same:.0%} of the greedy answers are identical, less than {allowed.same_answers:.0%}"
        )
    return problems


def comparison_dtype(
    folders: Sequence[Path], device: torch.device, bases: Sequence[str | Path | None]
) -> torch.dtype:
    """Return float32 if the larger checkpoint fits in memory in float32, otherwise bfloat16."""
    needed = max(_float32_bytes(folder, base) for folder, base in zip(folders, bases, strict=True))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = available_host_memory()
    return torch.float32 if 1.2 * needed < free else torch.bfloat16


def _float32_bytes(folder: Path, base: str | Path | None) -> float:
    if is_adapter(folder):
        folder, _ = find_base(folder, base)
    stored = sum(file.stat().st_size for file in weight_files(folder))
    return 4 * stored / _stored_dtype(folder).itemsize


def _stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of the first stored weight."""
    return next(iter(read_weights(folder).values()))().dtype


def examples_of(sets: Sequence[RecordSet], limit: int | None, max_tiles: int | None) -> list[Example]:
    """Return the first records of each dataset as examples, with decoded images.

    Args:
        limit: number of records per dataset; None for all.
        max_tiles: tile limit of datasets that do not set one; None for the checkpoint's limit.
    """
    examples = []
    for records in sets:
        for index in records.first(limit):
            record = records.record(index)
            key, images = RecordKey(records.spec.name, index), tuple(records.images(index, record))
            examples.append(Example(key, record, images, records.spec.max_dynamic_patch or max_tiles))
    return examples


def synthetic_examples(folder: Path) -> list[Example]:
    """Return synthetic examples with zero, one and multiple images.

    Records that exceed the checkpoint's `max_seq_length` at their full number of tiles are excluded, because
    transformers does not reduce the number of tiles.

    Raises:
        DataError: all records are excluded.
    """
    tokenizer, _ = load_tokenizer(folder)
    encoder = RecordEncoder(tokenizer, Preprocessing.from_folder(folder, read_config(folder)))
    with tempfile.TemporaryDirectory() as data_root:
        paths = write_sample_data(Path(data_root) / "sample", train=1, held_out=1)
        sets = build_sets(load_meta(paths["held_out"], data_root), encoder)
        examples = examples_of([records for records in sets if _fits(records)], 1, None)
    if not examples:
        raise DataError(
            f"{folder}: max_seq_length is too small for the synthetic records; skip the check (--check False)"
        )
    return examples


def _fits(records: RecordSet) -> bool:
    try:
        return not records.measure(0).tiles_lost
    except DataError:
        return False


def check_same(
    source: Path,
    result: Path,
    *,
    device: torch.device,
    base: str | Path | None = None,
    progress: Progress = iter,
) -> list[Difference]:
    """Compare a checkpoint with its conversion on synthetic examples and return the differences.

    Args:
        base: new path or Hub id of the base model of `source`, if it has moved.
        progress: wraps the examples in a progress bar.

    Raises:
        ModelError: the differences exceed `rounding_tolerances`.
    """
    examples = synthetic_examples(source)
    bases = (base, None)
    dtype = comparison_dtype((source, result), device, bases)
    allowed = rounding_tolerances(source, result, dtype)
    differences = list(
        compare(source, result, examples, device=device, dtype=dtype, bases=bases, progress=progress)
    )
    problems = faults(differences, allowed)
    if problems:
        raise ModelError(
            f"the result differs from {source} and was discarded (comparison on {len(differences)} synthetic "
            f"records in {dtype}): {'; '.join(problems)}; pass --check False to keep the result"
        )
    return differences


def rounding_tolerances(first: Path, second: Path, dtype: torch.dtype) -> Tolerances:
    """Return tolerances that cover the rounding errors of two equivalent checkpoints.

    A model makes n rounding errors of half an epsilon each. If they are independent, they add up to
    sqrt(n) / 2 epsilons, and the difference between two models can be twice as large. The number n depends on
    the dtype:

    - In float32, every addition rounds, so n is the number of terms summed between a pixel and a logit.
    - In 16 bits, products are summed in float32, so n is the number of intermediate results that are stored.

    For InternVL3-8B, the tolerance is 1.2e-4 of the largest logit in float32 (n is about a million), and 0.16
    of the largest logit in bfloat16.

    Merging adapters into 16-bit weights rounds each weight once. This has about the same effect as rounding
    the intermediate results, so the 16-bit tolerance applies even if the comparison is in float32.
    """
    stored = [_stored_dtype(folder) for folder in (first, second) if not is_adapter(folder)]
    if dtype == torch.float32 and (has_adapters(first) or has_adapters(second)):
        dtype = max(stored, key=lambda stored_dtype: torch.finfo(stored_dtype).eps, default=dtype)
    summed, results = _roundings(read_config(first))
    if dtype == torch.float32:
        return Tolerances(logits=torch.finfo(dtype).eps * summed**0.5)
    return Tolerances(logits=torch.finfo(dtype).eps * results**0.5, same_answers=0.0)


def _roundings(config: InternVLChatConfig) -> tuple[int, int]:
    """Return how many terms are summed and how many results are stored between a pixel and a logit."""
    llm, vision = config.build_llm_config(), config.vision_config
    layers: list[PretrainedConfig | InternVisionConfig] = [llm] * llm.num_hidden_layers
    layers += [vision] * vision.num_hidden_layers
    # Per layer: three sums over the hidden size (query, attention output, first MLP matrix) and one over the
    # MLP width.
    summed = sum(3 * layer.hidden_size + layer.intermediate_size for layer in layers) + llm.hidden_size
    # Eight results per layer: a norm, a matrix product and a residual sum in both attention and MLP, the
    # attention weights, and the activation.
    return summed, 8 * len(layers)

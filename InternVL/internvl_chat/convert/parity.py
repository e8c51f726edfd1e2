"""Compare two checkpoints, or two formats of one: tokens, tiles, pixels, logits and greedy answers.

Only one of the two is in memory at a time; the results of the first wait on disk.
"""

import gc
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from internvl_chat.convert.parity_sides import Example, Trace, open_side
from internvl_chat.data.dataset import build_sets
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer import load_tokenizer
from internvl_chat.data.record_set import RecordKey, RecordSet
from internvl_chat.data.sources.meta import load_meta
from internvl_chat.data.synthetic.sample_data import write_sample_data
from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.adapter import find_base
from internvl_chat.model.io.folders import is_adapter, read_config
from internvl_chat.model.io.plain import has_adapters
from internvl_chat.model.io.weights import read_weights, weight_files
from internvl_chat.utils.errors import DataError, ModelError

Progress = Callable[[Iterable[Example]], Iterable[Example]]


@dataclass(frozen=True)
class Tolerances:
    """How much two checkpoints may differ and still pass.

    Attributes:
        logits: largest difference of a logit, as a share of the record's largest logit.
        pixels: largest difference of a normalised pixel.
        same_answers: smallest share of equal greedy answers.
    """

    logits: float
    pixels: float = 1e-5
    same_answers: float = 1.0


@dataclass(frozen=True)
class Difference:
    """How two checkpoints differ on one record.

    Attributes:
        dataset: name of its dataset.
        index: index in the dataset, from 0.
        id: its id in the file.
        same_ids: the conversation's token ids are equal.
        same_tiles: every image has as many tiles.
        pixels: largest difference of a pixel; None where the tiles differ in number or size.
        logits: largest difference of a logit; None where the token ids or the vocabularies differ.
        largest_logit: of the first checkpoint, without its sign.
        same_answer: the greedy answers are equal.
        answers: of the first and of the second checkpoint.
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
        """`logits` as a share of `largest_logit`; infinite where a logit is not finite."""
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
    """Yield how two checkpoints differ on each example.

    Args:
        first: a folder of any kind.
        second: likewise.
        examples: what they are given.
        device: where they run.
        dtype: of `comparison_dtype`.
        bases: for adapters, where the base of each is now.
        max_new_tokens: most tokens of an answer.
        progress: wraps the examples that the first one is given.
    """
    with tempfile.TemporaryDirectory() as waiting:
        side = open_side(first, device=device, dtype=dtype, base=bases[0])
        for number, example in enumerate(progress(examples)):
            torch.save(vars(side.trace(example, max_new_tokens)), Path(waiting, f"{number}.pt"))
        del side
        gc.collect()
        side = open_side(second, device=device, dtype=dtype, base=bases[1])
        for number, example in enumerate(examples):
            before = Trace(**torch.load(Path(waiting, f"{number}.pt"), weights_only=True))
            yield _difference(example, before, side.trace(example, max_new_tokens))


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
    """Return the largest difference; NaN counts as infinite."""
    difference = (a - b).abs().nan_to_num(nan=torch.inf)
    return difference.max().item() if difference.numel() else 0.0


def faults(differences: Sequence[Difference], allowed: Tolerances) -> list[str]:
    """Return the differences beyond what is allowed, one sentence each."""
    found = []
    for name, field in (("token ids", "same_ids"), ("tiles", "same_tiles")):
        differing = [d for d in differences if not getattr(d, field)]
        if differing:
            found.append(f"the {name} of {len(differing)} of {len(differences)} records differ, "
                         f"e.g. {differing[0].dataset} {differing[0].index}")  # fmt: skip
    for name, field in (("pixels", "same_tiles"), ("logits", "same_ids")):
        if any(getattr(d, field) and getattr(d, name) is None for d in differences):
            found.append(f"the {name} are of another shape, so the two are models of different sizes")
    pixels = max((d.pixels for d in differences if d.pixels is not None), default=0.0)
    if not pixels <= allowed.pixels:
        found.append(f"the pixels differ by up to {pixels:.3g}, more than {allowed.pixels:.3g}")
    logits = max((d.relative_logits for d in differences if d.logits is not None), default=0.0)
    if not logits <= allowed.logits:
        found.append(
            f"the logits differ by up to {logits:.3g} of the largest logit, more than {allowed.logits:.3g}"
        )
    same = sum(d.same_answer for d in differences) / max(len(differences), 1)
    if same < allowed.same_answers:
        found.append(f"{same:.0%} of the greedy answers are the same, less than {allowed.same_answers:.0%}")
    return found


def comparison_dtype(
    folders: Sequence[Path], device: torch.device, bases: Sequence[str | Path | None]
) -> torch.dtype:
    """Return float32, or bfloat16 if the larger of two checkpoints does not fit into memory in float32."""
    needed = max(_float32_bytes(folder, base) for folder, base in zip(folders, bases, strict=True))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        import psutil

        free = psutil.virtual_memory().available
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
    """Return the first records of each set as examples, their images decoded.

    Args:
        sets: the datasets; the tile limit of a dataset's own entry wins.
        limit: records of each dataset; None for all.
        max_tiles: most tiles of a record; None for the checkpoint's own limit.
    """
    found = []
    for records in sets:
        for index in records.first(limit):
            record = records.record(index)
            images = tuple(records.images(index, record))
            limit_of_set = records.spec.max_dynamic_patch or max_tiles
            key = RecordKey(records.spec.name, index)
            found.append(Example(key, record, images, limit_of_set))
    return found


def synthetic_examples(folder: Path) -> list[Example]:
    """Return synthetic records of every kind for a checkpoint: without an image, with one, with several.

    Records that would lose tiles to its `max_seq_length` are excluded: other software does not drop tiles.

    Args:
        folder: the checkpoint.

    Raises:
        DataError: none of them fits.
    """
    tokenizer, _ = load_tokenizer(folder)
    encoder = RecordEncoder(tokenizer, Preprocessing.from_folder(folder, read_config(folder)))
    with tempfile.TemporaryDirectory() as place:
        paths = write_sample_data(Path(place) / "sample", train=1, held_out=1)
        sets = build_sets(load_meta(paths["held_out"], place), encoder)
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
    """Compare a checkpoint with what was made from it, on synthetic records; returns the differences.

    Args:
        source: a folder of any kind.
        result: a folder of any kind.
        device: where they run.
        base: for adapters in `source`, where their base is now.
        progress: wraps the records.

    Raises:
        ModelError: they differ by more than rounding explains.
    """
    examples = synthetic_examples(source)
    bases = (base, None)
    dtype = comparison_dtype((source, result), device, bases)
    allowed = rounding_tolerances(source, result, dtype)
    found = list(
        compare(source, result, examples, device=device, dtype=dtype, bases=bases, progress=progress)
    )
    problems = faults(found, allowed)
    if problems:
        raise ModelError(
            f"the result differs from {source} and was not kept: {'; '.join(problems)} "
            f"(compared on {len(found)} synthetic records in {dtype}; --check False would keep it)"
        )
    return found


def rounding_tolerances(first: Path, second: Path, dtype: torch.dtype) -> Tolerances:
    """Return the differences that rounding explains between two checkpoints that should be equal.

    Rounding errors are independent of each other, so n of them add up to sqrt(n) times one. One is half an
    epsilon, and there are two sides. In float32 every addition rounds: n is the number of terms summed on the
    way from a pixel to a logit. In 16 bits, products are summed in float32: n is the number of results stored
    on that way. For InternVL3-8B, with largest logits of about 20, this is 1.2e-4 of them in float32 (n is a
    million) and 0.16 of them in bfloat16.

    Merged adapters stored in 16 bits round every weight once, which is like rounding the layers' results.

    Args:
        first: a folder of any kind.
        second: likewise.
        dtype: what both compute in.
    """
    stored = [_stored_dtype(folder) for folder in (first, second) if not is_adapter(folder)]
    if dtype == torch.float32 and (has_adapters(first) or has_adapters(second)):
        dtype = max(stored, key=lambda kept: torch.finfo(kept).eps, default=dtype)
    summed, results = _roundings(read_config(first))
    if dtype == torch.float32:
        return Tolerances(logits=torch.finfo(dtype).eps * summed**0.5)
    return Tolerances(logits=torch.finfo(dtype).eps * results**0.5, same_answers=0.0)


def _roundings(config: InternVLChatConfig) -> tuple[int, int]:
    """Return the number of terms summed, and of results stored, on the way from a pixel to a logit."""
    llm, vision = config.build_llm_config(), config.vision_config
    layers = [*[llm] * llm.num_hidden_layers, *[vision] * vision.num_hidden_layers]
    # Three sums over the width (queries, output of attention, first matrix of the MLP), one over the MLP's.
    summed = sum(3 * layer.hidden_size + layer.intermediate_size for layer in layers) + llm.hidden_size
    # Norm, product and sum with the residual of both halves, weights of attention, activation.
    return summed, 8 * len(layers)

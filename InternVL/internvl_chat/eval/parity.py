"""Do two checkpoints, or two formats of one, do the same? Tokens, tiles, pixels, logits and answers.

Only one of the two is in memory at a time; what the first one made waits on the disk.
"""

import gc
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from internvl_chat.data.dataset import build_sets
from internvl_chat.data.encoding import RecordEncoder
from internvl_chat.data.meta import load_meta
from internvl_chat.data.preprocessing import Preprocessing
from internvl_chat.data.record_set import RecordKey, RecordSet
from internvl_chat.data.synthetic import write_sample_data
from internvl_chat.data.tokenizer import load_tokenizer
from internvl_chat.eval.parity_sides import Example, Trace, open_side
from internvl_chat.model.adapter import find_base
from internvl_chat.model.folders import is_adapter, read_config
from internvl_chat.model.plain import has_adapters
from internvl_chat.model.weights import read_weights, weight_files
from internvl_chat.utils.errors import DataError, ModelError

Progress = Callable[[Iterable[Example]], Iterable[Example]]


@dataclass(frozen=True)
class Tolerances:
    """How much two checkpoints may differ and still pass.

    Attributes:
        pixels: largest difference of a normalised pixel.
        logits: largest difference of a logit.
        same_answers: least share of equal greedy answers.
    """

    pixels: float = 1e-5
    logits: float = 1e-4
    same_answers: float = 1.0


@dataclass(frozen=True)
class Difference:
    """How two checkpoints differ on one record.

    Attributes:
        dataset: name of its set.
        index: in the set, from 0.
        id: in the file.
        same_ids: the conversation's token ids are equal.
        same_tiles: every image has as many tiles.
        pixels: largest difference of a pixel; None where the tiles differ in number or size.
        logits: largest difference of a logit; None where the token ids or the vocabularies differ.
        same_answer: the greedy answers are equal.
        answers: of the first and of the second.
    """

    dataset: str
    index: int
    id: str | None
    same_ids: bool
    same_tiles: bool
    pixels: float | None
    logits: float | None
    same_answer: bool
    answers: tuple[str, str]


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
        same_answer=a.answer == b.answer,
        answers=(a.answer, b.answer),
    )


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference; one that is no number anywhere is infinite."""
    difference = (a - b).abs().nan_to_num(nan=torch.inf)
    return difference.max().item() if difference.numel() else 0.0


def faults(differences: Sequence[Difference], allowed: Tolerances) -> list[str]:
    """Return in what two checkpoints differ by more than is allowed, one sentence each."""
    found = []
    for name, field in (("token ids", "same_ids"), ("tiles", "same_tiles")):
        differing = [d for d in differences if not getattr(d, field)]
        if differing:
            found.append(f"the {name} of {len(differing)} of {len(differences)} records differ, "
                         f"e.g. {differing[0].dataset} {differing[0].index}")  # fmt: skip
    for name, field in (("pixels", "same_tiles"), ("logits", "same_ids")):
        if any(getattr(d, field) and getattr(d, name) is None for d in differences):
            found.append(f"the {name} are of another shape, so the two are models of different sizes")
    for name, limit in (("pixels", allowed.pixels), ("logits", allowed.logits)):
        most = max((getattr(d, name) for d in differences if getattr(d, name) is not None), default=0.0)
        if not most <= limit:
            found.append(f"the {name} differ by up to {most:.3g}, more than {limit:g}")
    same = sum(d.same_answer for d in differences) / max(len(differences), 1)
    if same < allowed.same_answers:
        found.append(f"{same:.0%} of the greedy answers are the same, less than {allowed.same_answers:.0%}")
    return found


def comparison_dtype(
    folders: Sequence[Path], device: torch.device, bases: Sequence[str | Path | None]
) -> torch.dtype:
    """Return float32, or bfloat16 where the larger of two checkpoints would not fit into memory so."""
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
    return 4 * stored / _itemsize(folder)


def _itemsize(folder: Path) -> int:
    """Return the bytes of a stored weight, as its first matrix has them."""
    return next(iter(read_weights(folder).values()))().dtype.itemsize


def examples_of(sets: Sequence[RecordSet], limit: int | None, max_tiles: int | None) -> list[Example]:
    """Return the first records of each set as examples, their images decoded.

    Args:
        sets: the data sets; the tile limit of a set's own entry wins.
        limit: records of each set; None for all.
        max_tiles: of all images of a record; None for the checkpoint's own limit.
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


def made_up_examples(folder: Path) -> list[Example]:
    """Return made-up records of every kind for a checkpoint: without an image, with one, with several.

    Left out are those that its `max_seq_length` would cost tiles, which other software does not do.

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
            f"{folder}: max_seq_length is too small for made-up records; leave the check out (--check False)"
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
    """Compare a checkpoint with what was made of it, on made-up records; returns how they differ.

    Args:
        source: a folder of any kind.
        result: a folder of any kind.
        device: where they run.
        base: for adapters in `source`, where their base is now.
        progress: wraps the records.

    Raises:
        ModelError: they differ by more than `expected_tolerances` allows.
    """
    examples = made_up_examples(source)
    bases = (base, None)
    dtype = comparison_dtype((source, result), device, bases)
    allowed = expected_tolerances(source, result, dtype)
    found = list(
        compare(source, result, examples, device=device, dtype=dtype, bases=bases, progress=progress)
    )
    problems = faults(found, allowed)
    if problems:
        raise ModelError(
            f"the result does not do what {source} does, and was not kept: {'; '.join(problems)} "
            f"(compared on {len(found)} made-up records in {dtype}; --check False would keep it)"
        )
    return found


def expected_tolerances(source: Path, result: Path, dtype: torch.dtype) -> Tolerances:
    """Return how much a checkpoint may differ from what it was made from.

    The same weights under other names do the same. Folded adapters add up in another order, and are rounded
    once more where weights have 16 bits; in bfloat16 arithmetic every sum is rounded.
    """
    if dtype == torch.bfloat16:
        return Tolerances(logits=2.0, same_answers=0.0)
    if not has_adapters(source):
        return Tolerances()
    return Tolerances(logits=1e-3) if _itemsize(result) == 4 else Tolerances(logits=0.5, same_answers=0.0)

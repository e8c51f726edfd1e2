"""Sanity checks before training: of the data set, the checkpoint, and this machine's attention kernels."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from internvl_chat.data.batching.collator import Pack, pack_samples
from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.encode.encoder import supervised_spans
from internvl_chat.data.encode.preprocessing import PREPROCESSING_FILE, Preprocessing
from internvl_chat.data.record_set import Sample
from internvl_chat.inference.token_losses import pack_losses
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils.errors import DataError, TrainingError, UsageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Characters of a supervised span that are shown, and records of a set that are tried to find a usable one.
_SHOWN, _TRIED = 160, 100
# Packed losses may differ from single ones by so many times the rounding error of the pack.
_ROUNDING_FACTOR, _SHIFTS = 4, range(1, 9)
# What cannot change from a checkpoint to a run that starts from it, and the flags that decide it.
_FIXED = {
    "template": "--conv_style",
    "system_text": "--conv_style",
    "normalize_type": "--normalize_type",
    "tile_size": "--force_image_size",
    "tokens_per_tile": "--force_image_size and --down_sample_ratio",
}


def run_sanity_checks(
    source: Path,
    model: InternVLChatModel,
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    preprocessing: Preprocessing,
) -> None:
    """Run all checks of a run that starts from the checkpoint `source`; a collective of a sharded model.

    Raises:
        UsageError, DataError, TrainingError: of the functions below.
    """
    check_preprocessing(source, preprocessing)
    show_supervision(data, tokenizer)
    samples = first_samples(data, 0, 4)
    if samples:
        check_packing(model, samples, preprocessing.normalize_type)


def check_preprocessing(source: Path, preprocessing: Preprocessing) -> None:
    """Compare a run's preprocessing with that of its checkpoint, if it has a `preprocessing.json`.

    Raises:
        UsageError: names what differs.
    """
    file = source / PREPROCESSING_FILE
    if not file.is_file():
        return
    stored, problems = Preprocessing.read(file), []
    for name, flag in _FIXED.items():
        before, now = getattr(stored, name), getattr(preprocessing, name)
        if before != now:
            problems.append(f"{file}: {name} was {before!r} there, and is {now!r} here ({flag})")
    if problems:
        raise UsageError(problems)


def first_samples(data: TrainingData, number: int, count: int) -> list[Sample]:
    """Return the first usable records of data set `number`, up to `count`.

    Raises:
        DataError: one cannot be used, and bad records are not skipped.
    """
    found: list[Sample] = []
    for index in data.indices(number)[:_TRIED].tolist():
        try:
            found.append(data.sets[number].load(index))
        except DataError:
            if not data.skip_bad:
                raise
        if len(found) == count:
            break
    return found


def show_supervision(data: TrainingData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Log the first supervised span of each data set.

    Raises:
        DataError: of `first_samples`.
        TrainingError: the first record of a set has no labels.
    """
    for number, records in enumerate(data.sets):
        for sample in first_samples(data, number, 1):
            spans = supervised_spans(sample.encoded)
            if not spans:
                raise TrainingError(f"{records.spec.name}: the first record has no supervised tokens")
            text = tokenizer.decode(spans[0])
            shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
            logger.info("%s: first supervised span: %r", records.spec.name, shown)


def check_packing(model: InternVLChatModel, samples: Sequence[Sample], normalization: str) -> None:
    """Compare the token losses of packed records with those of single records.

    Raises:
        TrainingError: they differ by more than rounding, so records see one another.
    """

    def losses(pack: Pack) -> torch.Tensor:
        return torch.cat(pack_losses(model, pack, normalization))

    pack, was_training = pack_samples([(sample, True) for sample in samples]), model.training
    model.eval()
    try:
        # Compiled blocks would be compiled for evaluation, and again for training.
        with torch.compiler.set_stance("force_eager"):
            packed = losses(pack)
            single = torch.cat([losses(pack_samples([(sample, True)])) for sample in samples])
            # Rotary embeddings encode distances only, so shifting all positions changes nothing but rounding:
            # it shows the error of this model's dtype, depth and logits, in losses of this size (where a loss
            # is near 0, so is its error). A leak is 10 (bf16) to a million (float32) times as large.
            moved = [dataclasses.replace(pack, position_ids=pack.position_ids + shift) for shift in _SHIFTS]
            rounding = max((losses(other) - packed).abs().sum() for other in moved)
    finally:
        model.train(was_training)
    # The losses themselves are rounded to float32.
    rounding += 2 * torch.finfo(packed.dtype).eps * single.sum()
    difference = (packed - single).abs().sum()
    shown = f"differ by {difference:.2g} in a sum of {single.sum():.4g} (rounding error: {rounding:.2g})"
    if not difference <= _ROUNDING_FACTOR * rounding:
        raise TrainingError(
            f"token losses of packed and single records {shown}: the attention {model.attn!r} mixes records "
            "on this machine; use another (--attn) or --packing False"
        )
    logger.info("packing: token losses of packed and single records %s", shown)

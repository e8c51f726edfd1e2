"""Sanity checks before training: preprocessing, supervised text, and isolation of packed records."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from internvl_chat.data.batching.collator import Pack, pack_samples
from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.encode.encoder import supervised_spans
from internvl_chat.data.encode.preprocessing import Preprocessing, stored_options
from internvl_chat.data.record_set import Sample
from internvl_chat.inference.token_losses import pack_losses
from internvl_chat.model.io.folders import read_json
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.monitor.nan_guard import format_records
from internvl_chat.utils.errors import DataError, TrainingError, UsageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Maximum length of a logged span, and maximum number of records that are tried to find usable ones.
_MAX_CHARACTERS, _MAX_TRIED = 160, 100
# Tolerance of the packing check, as a multiple of the rounding error, and the position shifts with which this
# error is measured.
_ROUNDING_FACTOR, _SHIFTS = 4, range(1, 9)
# Flags that set the preprocessing options. The first five options must match the checkpoint.
_FLAGS = {
    "template": "--conv_style",
    "system_text": "--conv_style",
    "normalize_type": "--normalize_type",
    "tile_size": "--force_image_size",
    "tokens_per_tile": "--force_image_size and --down_sample_ratio",
    "dynamic_image_size": "--dynamic_image_size",
    "use_thumbnail": "--use_thumbnail",
    "pad2square": "--pad2square",
    "min_dynamic_patch": "--min_dynamic_patch",
    "max_dynamic_patch": "--max_dynamic_patch and the meta file",
    "image_background": "--image_background",
    "exif_transpose": "--exif_transpose",
    "escape_control_tokens": "--escape_control_tokens",
    "max_seq_length": "--max_seq_length",
}
_FIXED = tuple(_FLAGS)[:5]


def run_sanity_checks(
    source: Path,
    model: InternVLChatModel,
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    preprocessing: Preprocessing,
) -> None:
    """Run all sanity checks of a run that starts from the checkpoint `source`.

    If the model is sharded, this is collective: call on all ranks.
    """
    check_preprocessing(source, preprocessing)
    show_supervision(data, tokenizer)
    samples = first_samples(data, 0, 4)
    if samples:
        check_packing(model, samples, preprocessing.normalize_type)


def check_preprocessing(source: Path, preprocessing: Preprocessing) -> None:
    """Check that the template, normalization and tile size match the initial checkpoint.

    Raises:
        UsageError: they differ; the message lists all differences.
    """
    changes = preprocessing_changes(source, preprocessing)
    if problems := [changes[name] for name in _FIXED if name in changes]:
        raise UsageError(problems)


def preprocessing_changes(source: Path, preprocessing: Preprocessing) -> dict[str, str]:
    """Return the differences from the initial checkpoint's preprocessing: option -> message."""
    file, options = stored_options(source) or _configured_options(source)
    now = dataclasses.asdict(preprocessing)
    return {
        name: f"{name} is {now[name]!r}, but the checkpoint has {options[name]!r} in {file} (set by {flag})"
        for name, flag in _FLAGS.items()
        if options.get(name, now[name]) != now[name]
    }


def _configured_options(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the image options in the `config.json` of a folder without a preprocessing file.

    The tile limits are omitted: the published models store 12, but the recipes use other limits.
    """
    content = read_json(folder / "config.json")
    config = content if isinstance(content, dict) else {}
    names = ("dynamic_image_size", "use_thumbnail", "pad2square")
    return folder / "config.json", {name: config[name] for name in names if name in config}


def first_samples(data: TrainingData, number: int, count: int) -> list[Sample]:
    """Return up to `count` usable records from the start of dataset `number`.

    Raises:
        DataError: a record is unusable and `data.skip_bad` is False.
    """
    samples: list[Sample] = []
    for index in data.indices(number)[:_MAX_TRIED].tolist():
        try:
            samples.append(data.sets[number].load(index))
        except DataError:
            if not data.skip_bad:
                raise
        if len(samples) == count:
            break
    return samples


def show_supervision(data: TrainingData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Log the first supervised span of each dataset.

    Raises:
        DataError: see `first_samples`.
        TrainingError: the first record of a dataset has no supervised tokens.
    """
    for number, records in enumerate(data.sets):
        for sample in first_samples(data, number, 1):
            spans = supervised_spans(sample.encoded)
            if not spans:
                raise TrainingError(f"{records.spec.name}: the first record has no supervised tokens")
            text = tokenizer.decode(spans[0])
            text = text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} ..."
            logger.info("%s: first supervised span: %r", records.spec.name, text)


def _require_finite(samples: Sequence[Sample], losses: Sequence[torch.Tensor]) -> None:
    """Check that the losses of unpacked records are finite.

    Raises:
        TrainingError: losses are not finite; the message lists the records.
    """
    bad = [
        sample.key
        for sample, of_record in zip(samples, losses, strict=True)
        if not of_record.isfinite().all()
    ]
    if bad:
        raise TrainingError(
            f"{len(bad)} of the first {len(samples)} records have non-finite losses, even unpacked and "
            f"before the first step ({format_records(bad)}): the model overflows on them; try float32 (no "
            "--bf16) or a different base model"
        )


def check_packing(model: InternVLChatModel, samples: Sequence[Sample], normalization: str) -> None:
    """Check that packing does not change the token losses of records.

    Raises:
        TrainingError: unpacked records have non-finite losses, or packing changes the losses by more than
            rounding, which means that attention leaks between records.
    """

    def losses(pack: Pack) -> torch.Tensor:
        return torch.cat(pack_losses(model, pack, normalization))

    pack, was_training = pack_samples([(sample, True) for sample in samples]), model.training
    model.eval()
    try:
        # Run eagerly; otherwise compiled blocks would also be compiled for evaluation mode.
        with torch.compiler.set_stance("force_eager"):
            packed = losses(pack)
            by_record = [losses(pack_samples([(sample, True)])) for sample in samples]
            _require_finite(samples, by_record)
            single = torch.cat(by_record)
            # Rotary embeddings encode only relative positions, so shifting all positions changes the losses
            # only by rounding, which measures the rounding error. The effect of a leak is 10 (bf16) to a
            # million (float32) times larger.
            shifted = [dataclasses.replace(pack, position_ids=pack.position_ids + shift) for shift in _SHIFTS]
            rounding = max((losses(other) - packed).abs().sum() for other in shifted)
    finally:
        model.train(was_training)
    # The losses themselves are rounded to float32.
    rounding += 2 * torch.finfo(packed.dtype).eps * single.sum()
    difference = (packed - single).abs().sum()
    text = f"differ by {difference:.2g} in a sum of {single.sum():.4g} (rounding error: {rounding:.2g})"
    if not difference <= _ROUNDING_FACTOR * rounding:
        raise TrainingError(
            f"attention {model.attn!r} leaks between packed records on this machine: token losses of packed "
            f"and single records {text}, more than {_ROUNDING_FACTOR} times the rounding error; use a "
            "different kernel (--attn) or --packing False"
        )
    logger.info("packing: token losses of packed and single records %s", text)

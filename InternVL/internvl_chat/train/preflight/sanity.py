"""A look at what training is about to do, before it does: seconds that save hours.

What is compared here is compared in earnest by the tests; this finds what is particular to a machine, its
libraries, a checkpoint or a data set.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from internvl_chat.data.collator import pack_samples
from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.encoding import supervised_spans
from internvl_chat.data.preprocessing import PREPROCESSING_FILE, Preprocessing
from internvl_chat.data.record_set import Sample
from internvl_chat.inference.token_losses import pack_losses
from internvl_chat.model.modeling import InternVLChatModel
from internvl_chat.utils.errors import DataError, TrainingError, UsageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Share by which the mean losses of packed and single records may differ: float32 has 24 bits, bf16 8.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_SHOWN = 160
# Records of a set that are looked at for one that can be used.
_TRIED = 100
# What a checkpoint was trained with and cannot be changed by going on from it, and the flag that decides it.
_LASTING = {
    "template": "--conv_style",
    "system_text": "--conv_style",
    "normalize_type": "--normalize_type",
    "tile_size": "--force_image_size",
    "tokens_per_tile": "--force_image_size and --down_sample_ratio",
}


def check_preprocessing(source: Path, preprocessing: Preprocessing) -> None:
    """Compare a run's inputs with what the checkpoint that it starts from was trained with.

    Args:
        source: folder of the checkpoint; one without `preprocessing.json` says nothing.
        preprocessing: of the run.

    Raises:
        UsageError: names what differs.
    """
    file = source / PREPROCESSING_FILE
    if not file.is_file():
        return
    stored = Preprocessing.read(file)
    problems = [
        f"{file}: {name} was {getattr(stored, name)!r} there, and is {getattr(preprocessing, name)!r} here "
        f"({flag})"
        for name, flag in _LASTING.items()
        if getattr(stored, name) != getattr(preprocessing, name)
    ]
    if problems:
        raise UsageError(problems)


def first_samples(data: TrainingData, number: int, count: int) -> list[Sample]:
    """Return the first records of a set that are used, or all of fewer.

    Raises:
        DataError: one cannot be used, and such records are not to be left out.
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
    """Log what is learnt of the first record of each data set.

    Raises:
        DataError: of `first_samples`.
        TrainingError: nothing of it is learnt.
    """
    for number, records in enumerate(data.sets):
        samples = first_samples(data, number, 1)
        if not samples:
            continue
        spans = [tokenizer.decode(span) for span in supervised_spans(samples[0].encoded)]
        if not spans:
            raise TrainingError(f"data set {records.spec.name}: nothing of its first record is learnt")
        shown = [span if len(span) <= _SHOWN else f"{span[:_SHOWN]} ..." for span in spans]
        logger.info("data set %s learns %s", records.spec.name, "; ".join(map(repr, shown)))


def check_packing(model: InternVLChatModel, samples: Sequence[Sample], normalization: str) -> None:
    """Compare the losses of records packed behind one another with those of each alone.

    Raises:
        TrainingError: they differ by more than rounding, so that records see one another.
    """
    was_training = model.training
    model.eval()
    try:
        packs = [pack_samples([(sample, True) for sample in samples])]
        packs += [pack_samples([(sample, True)]) for sample in samples]
        losses = [pack_losses(model, pack, normalization) for pack in packs]
    finally:
        model.train(was_training)
    means = torch.stack([loss.mean() for loss in itertools.chain.from_iterable(losses)])
    together, alone = means.split(len(samples))
    dtype = next(model.language_model.parameters()).dtype
    if not torch.allclose(together, alone, rtol=_TOLERANCE[dtype], atol=_TOLERANCE[dtype]):
        raise TrainingError(
            f"packed records have the losses {_shown(together)}, but each alone {_shown(alone)}: the "
            f"attention {model.attn!r} mixes records on this machine; use another (--attn) or --packing False"
        )
    logger.info("packed and single records have the losses %s and %s", _shown(together), _shown(alone))


def _shown(values: torch.Tensor) -> str:
    return ", ".join(f"{value:.4f}" for value in values.tolist())

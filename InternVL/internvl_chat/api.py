"""High-level functions of the public Python API; see docs/python_api.md."""

import atexit
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from internvl_chat.data.dataset import build_sets
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer import load_tokenizer
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.meta import load_meta
from internvl_chat.inference.engine import Engine
from internvl_chat.model.io.folders import model_folder, read_config
from internvl_chat.utils import paths
from internvl_chat.utils.errors import TrainingError


def load(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
    max_dynamic_patch: int | None = None,
) -> Engine:
    """Load a model in any supported format, with its tokenizer and preprocessing, ready to answer questions.

    Args:
        model: model folder, adapter folder or Hub id.
        device: `cpu`, `cuda:0`, or `auto` for all GPUs (default: GPU if available).
        dtype: dtype of the weights (default: bfloat16 on a GPU, float32 on a CPU).
        base: base model of an adapter, if it has been moved.
        max_dynamic_patch: maximum tiles per prompt (default: from the checkpoint).
    """
    return Engine.from_checkpoint(
        model, device=device, dtype=dtype, base=base, max_dynamic_patch=max_dynamic_patch
    )


def open_datasets(
    meta: str | Path,
    model: str | Path,
    *,
    data_root: str | Path | None = None,
    image_root: str | Path | None = None,
    max_dynamic_patch: int | None = None,
    image_background: str | None = None,
    exif_transpose: bool | None = None,
    escape_control_tokens: bool | None = None,
) -> list[RecordSet]:
    """Open the datasets of a meta file with a model's preprocessing, without loading its weights.

    Args:
        meta: meta file, such as PMC-data.json.
        model: model folder, adapter folder or hub id.
        data_root: base folder for relative paths in the meta file (default: `$DATA_ROOT`, or the
            repository).
        image_root: folder of the images, if `meta` is an annotation file instead of a meta file.
        max_dynamic_patch: maximum tiles per record (default: from the checkpoint).
        image_background: color behind transparent pixels; `none` ignores transparency (default: from the
            checkpoint).
        exif_transpose: apply the EXIF orientation (default: from the checkpoint).
        escape_control_tokens: treat control tokens in records as plain text (default: from the checkpoint).
    """
    folder = model_folder(model)
    tokenizer, _ = load_tokenizer(folder)
    preprocessing = Preprocessing.from_folder(
        folder, read_config(folder), max_dynamic_patch=max_dynamic_patch
    )
    preprocessing = preprocessing.with_options(
        image_background=image_background,
        exif_transpose=exif_transpose,
        escape_control_tokens=escape_control_tokens,
    )
    specs = load_meta(meta, data_root or paths.data_root(), image_root)
    return build_sets(specs, RecordEncoder(tokenizer, preprocessing))


def evaluate(
    engine: Engine, datasets: Sequence[RecordSet], *, limit: int | None = None, max_new_tokens: int = 128
) -> list[dict[str, Any]]:
    """Answer the last question of each record; return one row of scores per dataset (see `score_dataset`).

    Args:
        engine: model, from `load`.
        datasets: the datasets, from `open_datasets`.
        limit: use the first `limit` records of each dataset (default: all).
        max_new_tokens: maximum tokens per answer.
    """
    from internvl_chat.eval.exact_match import answer_records, score_dataset

    answers = list(answer_records(engine, datasets, limit=limit, max_new_tokens=max_new_tokens))
    return [score_dataset(records.spec.name, answers) for records in datasets]


def finetune(recipe: str | Path | None = None, **flags: Any) -> Path:
    """Train in this process and return the folder of the trained model.

    Args:
        recipe: YAML or JSON file with flags of `m3llm train`.
        flags: additional flags, which override the recipe.

    Raises:
        TrainingError: training failed, or was stopped by a signal (call `finetune` again to resume).
    """
    from internvl_chat.data.batching.dataloader import kill_workers
    from internvl_chat.train.arguments import as_tokens, parse_arguments
    from internvl_chat.train.internvl_chat_finetune import train
    from internvl_chat.utils.logging import configure_logging

    configure_logging()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # dataloader workers run in parallel
    atexit.register(kill_workers)
    config = parse_arguments([*([str(recipe)] if recipe else []), *as_tokens(flags)])
    if code := train(config):
        raise TrainingError(
            f"training ended with exit code {code} (see the log); to resume, call finetune again"
        )
    return Path(config.run.output_dir)

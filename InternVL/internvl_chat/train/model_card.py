"""Write the model card of a finished run: data, recipe, training and validation."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from internvl_chat import __version__
from internvl_chat.convert.model_card import CARD, base_licence, base_names, render_card
from internvl_chat.data.dataset import TrainingData
from internvl_chat.model.io.adapter import read_base
from internvl_chat.model.io.folders import is_adapter
from internvl_chat.model.lora.quantization import parameter_count
from internvl_chat.train.checkpoint.fingerprint import fingerprint
from internvl_chat.train.checkpoint.run_folder import METRICS, may_write_card
from internvl_chat.train.config import TrainConfig
from internvl_chat.train.monitor.loss_curves import read_steps
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.markdown import markdown_table
from internvl_chat.utils.text import counted

logger = get_logger(__name__)


def write_model_card(
    config: TrainConfig,
    data: TrainingData,
    eval_data: TrainingData | None,
    parameters: tuple[int, int],
    validation: Mapping[str, float],
) -> None:
    """Write the model card to `README.md` in the output folder, unless a user has written this file.

    Args:
        config: configuration of the run.
        data: training data.
        eval_data: validation data; None without validation.
        parameters: result of `count_parameters`.
        validation: result of `read_validation`.
    """
    folder = Path(config.run.output_dir)
    if not may_write_card(folder):
        logger.warning("%s is kept, because it was not written by a training run", folder / CARD)
        return
    paths = _base_paths(config)
    card = render_card(
        folder.name,
        base_names(paths),
        base_licence(paths),
        adapters=bool(config.model.use_llm_lora or config.model.use_backbone_lora),
        sections={
            "Data": _data_section(data),
            "Recipe": markdown_table(("setting", "value"), _recipe(config, parameters).items()),
            "Training": markdown_table(("", ""), _training(config, read_steps(folder / METRICS)).items()),
            "Validation": _validation_section(eval_data, validation),
        },
    )
    (folder / CARD).write_text(card, encoding="utf-8")


def describe_run(config: TrainConfig) -> str:
    """Return a one-line description of a run's model and recipe, for the loss plot."""
    model, run = config.model, config.run
    ranks = {"language model": model.use_llm_lora, "vision tower": model.use_backbone_lora}
    frozen = {
        "vision tower": model.freeze_backbone or model.use_backbone_lora,
        "projector": model.freeze_mlp,
        "language model": model.freeze_llm or model.use_llm_lora,
    }
    kind = ("Q" if model.load_in_4bit else "") + ("DoRA" if model.use_dora else "LoRA")
    trained = [f"{kind} of rank {rank} in the {part}" for part, rank in ranks.items() if rank]
    trained += [part for part, is_frozen in frozen.items() if not is_frozen]
    rate = f"{run.learning_rate:.2g}".replace("e-0", "e-")
    name = " and ".join(base_names(_base_paths(config)))
    return (
        f"{name}, trained: {', '.join(trained) or 'selected layers'}; "
        f"learning rate {rate}, {counted(run.records_per_step, 'record')} per step"
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the total and trainable parameter counts of a model."""
    # ZeRO-3 replaces sharded parameters with empty tensors and stores their size in `ds_numel`.
    sizes = [(getattr(p, "ds_numel", parameter_count(p)), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def read_validation(file: Path, step: int | None) -> dict[str, float]:
    """Return the validation metrics of a step, with keys such as "loss, all"; empty without validation.

    Args:
        file: `validation.jsonl` of the run.
        step: step of the saved model; None for the last validation.
    """
    rows = [row for row in read_steps(file) if step in (None, row["step"])]
    parts = {"all": rows[-1]} | rows[-1]["sets"] if rows else {}
    return {
        f"{kind}, {name}": part[kind]
        for name, part in parts.items()
        for kind in ("loss", "em", "rougeL")
        if part.get(kind) is not None
    }


def _base_paths(config: TrainConfig) -> list[str]:
    """Return the path to the base model, or to each part if the model was assembled from parts."""
    model = config.model
    if model.model_name_or_path is None:
        return list(model.parts)
    folder = Path(model.model_name_or_path)
    if is_adapter(folder):
        return [model.base_model_path or read_base(folder).path]
    return [model.model_name_or_path]


def _data_section(data: TrainingData) -> str:
    rows = [
        (records.spec.name, f"{size:,}", records.encoder.preprocessing.max_dynamic_patch,
         records.spec.annotation.name, f"`{digest}`")
        for records, size, digest in zip(data.sets, data.sizes, data.digests, strict=True)
    ]  # fmt: skip
    header = ("dataset", "records per epoch", "maximum tiles", "file", "SHA-256 of the file")
    excluded = f"\n\n{len(data.excluded):,} unusable records were excluded." * bool(data.excluded)
    return markdown_table(header, rows) + excluded


def _recipe(config: TrainConfig, parameters: tuple[int, int]) -> dict[str, Any]:
    """Return table rows with the settings of the run; none of them contains a secret."""
    run = config.run
    length = {"max_steps": run.max_steps} if run.max_steps > 0 else {"epochs": run.num_train_epochs}
    return {
        "parameters": f"{parameters[0]:,}",
        "trained parameters": f"{parameters[1]:,}",
        **length,
        **fingerprint(config),
    }


def _training(config: TrainConfig, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return table rows with the hardware, duration, final loss and software versions of the run."""
    run = config.run
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    rows: dict[str, Any] = {"hardware at the end": f"{run.world_size} x {device}"}
    if steps:
        seconds = sum(step.get("seconds") or 0 for step in steps)
        applied = [step for step in steps if "skipped_because" not in step]
        losses = [step["loss"] for step in applied if step.get("loss") is not None]
        skipped = len(steps) - len(applied)
        rows |= {
            "steps": f"{steps[-1]['step']:,}" + (f", {skipped:,} of them skipped" if skipped else ""),
            "records": f"{sum(step.get('records') or 0 for step in steps):,}",
            "tokens": f"{sum(step.get('tokens') or 0 for step in steps):,}",
            "time in steps": str(timedelta(seconds=round(seconds))),
        }
        if losses:
            last = losses[-max(1, len(losses) // 10) :]
            rows[f"loss, mean of the last {len(last)} step(s)"] = f"{sum(last) / len(last):.4f}"
    software = f"m3llm {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return rows | {"software": software}


def _validation_section(eval_data: TrainingData | None, metrics: Mapping[str, float]) -> str:
    if eval_data is None or not metrics:
        return "There was no validation during training."
    table = markdown_table(("metric", ""), [(key, f"{value:.4g}") for key, value in metrics.items()])
    return f"{_data_section(eval_data)}\n\n{table}"

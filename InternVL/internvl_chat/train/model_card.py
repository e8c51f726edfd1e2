"""The model card: what a finished run says of its model, from what it did and nothing else.

Written as the `README.md` that model hubs show, with the front matter that they read.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import nn

from internvl_chat import __version__
from internvl_chat.data.dataset import TrainingData
from internvl_chat.model.io.adapter import read_base
from internvl_chat.model.io.card import ADAPTERS_FOR, CARD, CARD_MARK, VERSION_OF
from internvl_chat.model.io.folders import is_adapter, model_folder
from internvl_chat.train.checkpoint.fingerprint import fingerprint
from internvl_chat.train.checkpoint.run_folder import METRICS, may_write_card
from internvl_chat.train.config import TrainConfig
from internvl_chat.utils.errors import ModelError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

_UNKNOWN = "unknown"

_USE = """\
For research on questions about medical figures and their panels, in the form of the training data. It is not
a medical device: answers may be wrong in ways that read well, and no diagnosis or treatment may rest on them.
What it does on data of another kind, in another language or from another source than below is not known.
Limits of the base model and of the training data are limits of this model."""

_COMMANDS = """\
```bash
m3llm generate --model FOLDER --image figure.jpg "What does panel A show?"
{merge}m3llm export FOLDER FOLDER-hf
```"""


def write_model_card(
    config: TrainConfig,
    data: TrainingData,
    eval_data: TrainingData | None,
    parameters: tuple[int, int],
    validation: Mapping[str, float],
) -> None:
    """Write `README.md` into the folder of a finished run, unless somebody's own is there.

    Args:
        config: of the run.
        data: what was trained on.
        eval_data: the validation data, if any.
        parameters: of the model, all and trained.
        validation: the last figure of each kind; empty where nothing was validated.
    """
    folder = Path(config.run.output_dir)
    if not may_write_card(folder):
        logger.warning("%s: is not of an earlier run, so no model card is written", folder / CARD)
        return
    steps = _read_steps(folder / METRICS)
    base, licence = _base_names(config), _licence(config)
    adapters = bool(config.model.use_llm_lora or config.model.use_backbone_lora)
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(base, licence, adapters), sort_keys=False)}---\n{CARD_MARK}",
        f"# {folder.name}",
        f"{ADAPTERS_FOR if adapters else VERSION_OF} {' and '.join(base)}.",
        f"**Licence of the base:** {licence}.",
        f"## Intended use and limits\n\n{_USE}",
        "## Use\n\n" + _COMMANDS.format(merge="m3llm merge FOLDER FOLDER-merged\n" if adapters else ""),
        "## Data\n\n" + _data(data),
        "## Recipe\n\n" + _table(("setting", "value"), _recipe(config, parameters).items()),
        "## Training\n\n" + _table(("", ""), _course(config, steps).items()),
        "## Validation\n\n" + _validation(eval_data, validation),
    ]
    (folder / CARD).write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return a model's parameters, all and trained; also where DeepSpeed has spread them."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def read_validation(file: Path, step: int | None) -> dict[str, float]:
    """Return the figures of the validation after a step, or of the last one; nothing if there was none.

    Args:
        file: `validation.jsonl` of the run.
        step: of the model that the card is of; None for the newest.
    """
    rows = [row for row in _read_steps(file) if step in (None, row["step"])]
    parts = {"all": rows[-1]} | rows[-1]["sets"] if rows else {}
    return {
        f"{kind}, {name}": part[kind]
        for name, part in parts.items()
        for kind in ("loss", "em", "rougeL")
        if part.get(kind) is not None
    }


def _front_matter(base: Sequence[str], licence: str, adapters: bool) -> dict[str, Any]:
    """Return what a hub reads; a base is named only by an id that the hub knows."""
    ids = [name for name in base if name.count("/") == 1]
    matter = {
        "license": licence,
        "pipeline_tag": "image-text-to-text",
        "tags": ["internvl_chat", "medical", "m3llm", "lora" if adapters else "full-fine-tuning"],
    }
    if adapters:
        matter["library_name"] = "peft"
    if ids:
        relation = "adapter" if adapters else "finetune"
        matter |= {"base_model": ids[0] if len(ids) == 1 else ids, "base_model_relation": relation}
    return matter


def _base_paths(config: TrainConfig) -> list[str]:
    """Return the model that the run began from, or the parts that it was assembled from."""
    model = config.model
    if model.model_name_or_path is None:
        return [model.vision_path, model.llm_path]
    start = Path(model.model_name_or_path)
    if is_adapter(start):
        return [model.base_model_path or read_base(start).path]
    return [model.model_name_or_path]


def _base_names(config: TrainConfig) -> list[str]:
    """Return hub ids as they are, and of folders the name alone, which tells nothing of their place."""
    return [Path(path).resolve().name if Path(path).exists() else path for path in _base_paths(config)]


def _licence(config: TrainConfig) -> str:
    """Return what the base's README or configuration says of its licence."""
    found = {_licence_of(path) for path in _base_paths(config)}
    return found.pop() if len(found) == 1 else _UNKNOWN


def _licence_of(path: str) -> str:
    try:
        folder = model_folder(path)
        card, config = folder / "README.md", folder / "config.json"
        matter = {}
        if card.is_file() and (text := card.read_text(encoding="utf-8")).startswith("---"):
            matter = yaml.safe_load(text.split("---")[1]) or {}
        named = matter.get("license") or json.loads(config.read_text(encoding="utf-8")).get("license")
    except (ModelError, OSError, ValueError, AttributeError, yaml.YAMLError):
        return _UNKNOWN
    return named if isinstance(named, str) else _UNKNOWN


def _data(data: TrainingData) -> str:
    rows = [
        (records.spec.name, f"{size:,}", records.encoder.preprocessing.max_dynamic_patch,
         records.spec.annotation.name, f"`{digest}`")
        for records, size, digest in zip(data.sets, data.sizes, data.digests, strict=True)
    ]  # fmt: skip
    header = ("data set", "records an epoch", "most tiles", "file", "SHA-256 of the file")
    excluded = f"\n\n{len(data.excluded):,} records could not be used and were left out." * bool(
        data.excluded
    )
    return _table(header, rows) + excluded


def _recipe(config: TrainConfig, parameters: tuple[int, int]) -> dict[str, Any]:
    """Return the settings that a run depends on; none of them can hold a secret."""
    run = config.run
    length = {"max_steps": run.max_steps} if run.max_steps > 0 else {"epochs": run.num_train_epochs}
    return {
        "parameters": f"{parameters[0]:,}",
        "trained parameters": f"{parameters[1]:,}",
        **length,
        **fingerprint(config),
    }


def _course(config: TrainConfig, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the run took and where its loss ended."""
    run = config.run
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    course: dict[str, Any] = {"hardware at the end": f"{run.world_size} x {device}"}
    if steps:
        seconds = sum(step.get("seconds") or 0 for step in steps)
        losses = [step["loss"] for step in steps if step.get("loss") is not None]
        course |= {
            "steps": f"{steps[-1]['step']:,}",
            "records": f"{sum(step.get('records') or 0 for step in steps):,}",
            "tokens": f"{sum(step.get('tokens') or 0 for step in steps):,}",
            "time in steps": str(timedelta(seconds=round(seconds))),
        }
        if losses:
            last = losses[-max(1, len(losses) // 10) :]
            course[f"loss, mean of the last {len(last)} step(s)"] = f"{sum(last) / len(last):.4f}"
    software = {"m3llm": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return course | {"software": ", ".join(f"{name} {number}" for name, number in software.items())}


def _validation(eval_data: TrainingData | None, figures: Mapping[str, float]) -> str:
    if eval_data is None or not figures:
        return "Nothing was validated while training."
    table = _table(("figure", ""), [(key, f"{value:.4g}") for key, value in figures.items()])
    return f"{_data(eval_data)}\n\n{table}"


def _read_steps(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "step" in row]


def _table(header: Sequence[str], rows: Any) -> str:
    """Return a Markdown table; what would break out of its cell is escaped."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in rows:
        cells = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

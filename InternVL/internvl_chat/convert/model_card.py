"""Model cards: the `README.md` that model hubs display.

A training run writes a model card when it ends. Merging and exporting copy the card to the new folder.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from internvl_chat.model.io.folders import model_folder
from internvl_chat.utils.errors import ModelError

CARD = "README.md"
CARD_MARK = "<!-- Written by m3llm when the run ended; a card without this line is never written over. -->"
# Start of a card's first sentence, for adapters and for full models; the names of the base models follow.
ADAPTERS_FOR = "Adapters (LoRA) for"
VERSION_OF = "A fine-tuned version of"

_UNKNOWN = "unknown"

_CACHED = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/[^/]+$")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PUBLISHED = re.compile(r"InternVL[23](_5)?-\d+B(-A\d+B)?(-(Pretrained|Instruct|MPO))?(-hf|-HF)?")
# Files that identify the output of a run or a conversion.
_RESULTS = ("train_results.json", "trainer_state.json", "made_from.json", "adapter_config.json")

_USE = """\
For research on question answering about medical figures and their panels, in the format of the training data.
This model is not a medical device: answers can be plausible but wrong and must not be used for diagnosis or
treatment. It has not been evaluated on other kinds of data, other languages, or sources not listed below. It
inherits the limitations of its base model and of its training data."""

_COMMANDS = """\
```bash
m3llm generate --model FOLDER --image figure.jpg "What does panel A show?"
{merge}m3llm export FOLDER FOLDER-hf
```"""


def carry_card(source: Path, target: Path, *, merged: bool) -> None:
    """Copy the model card of `source`, if there is one.

    If adapters were merged, a card that was written by a run is changed to describe a full model.
    """
    file = source / CARD
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8", errors="replace")
    if not (merged and CARD_MARK in text):
        shutil.copyfile(file, target / CARD)
        return
    base = f"Merged from LoRA adapters: {VERSION_OF.lower()}"
    card = ModelCard(text.replace(ADAPTERS_FOR, base, 1))
    card.data.pop("library_name", None)
    if card.data.get("base_model_relation"):
        card.data["base_model_relation"] = "finetune"
    (target / CARD).write_text(str(card), encoding="utf-8")


def render_card(
    title: str, base: Sequence[str], licence: str, *, adapters: bool, sections: Mapping[str, str]
) -> str:
    """Return the Markdown text of a run's model card.

    Args:
        title: heading of the card.
        base: Hub id or folder name of the base model, or of each part that it was assembled from.
        licence: license of the base model.
        adapters: whether the run trained adapters rather than the full model.
        sections: text of additional sections, keyed by heading.
    """
    ids = [name for name in base if name.count("/") == 1]  # Hub ids, not names of local folders
    data = ModelCardData(
        license=licence,
        pipeline_tag="image-text-to-text",
        tags=["internvl_chat", "medical", "m3llm", "lora" if adapters else "full-fine-tuning"],
        library_name="peft" if adapters else None,
        base_model=ids[0] if len(ids) == 1 else ids or None,
        base_model_relation=("adapter" if adapters else "finetune") if ids else None,
    )
    commands = _COMMANDS.format(merge="m3llm merge FOLDER FOLDER-merged\n" if adapters else "")
    parts = [
        f"---\n{data.to_yaml()}\n---\n{CARD_MARK}",
        f"# {title}",
        f"{ADAPTERS_FOR if adapters else VERSION_OF} {' and '.join(base)}.",
        f"**License of the base:** {licence}.",
        f"## Intended use and limits\n\n{_USE}",
        f"## Use\n\n{commands}",
        *(f"## {heading}\n\n{text}" for heading, text in sections.items()),
    ]
    return "\n\n".join(parts) + "\n"


def base_names(paths: Sequence[str]) -> list[str]:
    """Return the Hub id of each base model, or its folder name if the id is unknown."""
    return [
        _hub_id(Path(path)) or Path(path).resolve().name if Path(path).exists() else path for path in paths
    ]


def _hub_id(folder: Path) -> str | None:
    """Return the Hub id of a model in a local folder; None if it is unknown.

    The id is derived from the path in the Hub cache (`models--organization--name/snapshots/revision`), from
    `_name_or_path` in `config.json`, or from a folder name that matches a published InternVL model. The
    output of a run or conversion has no Hub id, because its `_name_or_path` refers to a different model.
    """
    folder = folder.resolve()
    cached = _CACHED.search(folder.as_posix())
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if any((folder / name).exists() for name in _RESULTS):
        return None
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        named = None
    if isinstance(named, str) and _HUB_ID.fullmatch(named):
        return named
    return f"OpenGVLab/{folder.name}" if _PUBLISHED.fullmatch(folder.name) else None


def base_licence(paths: Sequence[str]) -> str:
    """Return the license of the base models, or "unknown" if it is missing or differs between them.

    The license is read from each model's `README.md` or `config.json`.
    """
    licenses = {_license_of(path) for path in paths}
    return licenses.pop() if len(licenses) == 1 else _UNKNOWN


def _license_of(path: str) -> str:
    try:
        folder = model_folder(path)
        card, config = folder / "README.md", folder / "config.json"
        matter: dict[str, Any] = {}
        if card.is_file() and (text := card.read_text(encoding="utf-8")).startswith("---"):
            matter = yaml.safe_load(text.split("---")[1]) or {}
        named = matter.get("license") or json.loads(config.read_text(encoding="utf-8")).get("license")
    except (ModelError, OSError, ValueError, AttributeError, yaml.YAMLError):
        return _UNKNOWN
    return named if isinstance(named, str) else _UNKNOWN

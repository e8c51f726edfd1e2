"""The model card of a folder, and what becomes of it when the folder's model is written in another way."""

import shutil
from pathlib import Path

import yaml

CARD = "README.md"
CARD_MARK = "<!-- Written by m3llm when the run ended; a card without this line is never written over. -->"
# How the cards of adapters and of whole models begin; the names of their bases follow.
ADAPTERS_FOR = "Adapters (LoRA) for"
VERSION_OF = "A fine-tuned version of"


def carry_card(source: Path, target: Path, *, merged: bool) -> None:
    """Copy the card of a folder, if it has one, into the folder that is made of it.

    Args:
        source: of a model or of adapters.
        target: must exist.
        merged: the adapters of the source are a part of the weights now, which a card of ours then says.
    """
    card = source / CARD
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8", errors="replace")
    if merged and CARD_MARK in text:
        (target / CARD).write_text(_of_merged(text), encoding="utf-8")
    else:
        shutil.copyfile(card, target / CARD)


def _of_merged(text: str) -> str:
    """Return the card of adapters as that of the model that they were merged into."""
    begin, front, body = text.split("---\n", 2)
    matter = yaml.safe_load(front)
    matter.pop("library_name", None)
    if "base_model_relation" in matter:
        matter["base_model_relation"] = "finetune"
    body = body.replace(ADAPTERS_FOR, f"From adapters (LoRA), which are merged: {VERSION_OF.lower()}", 1)
    return f"{begin}---\n{yaml.safe_dump(matter, sort_keys=False)}---\n{body}"

"""Arguments and objects that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_chat.utils.paths import REPOSITORY

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from internvl_chat.data.encode.preprocessing import Preprocessing
    from internvl_chat.data.record_set import RecordSet


def add_data_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the arguments of commands that go through the records of a meta file with a model.

    Args:
        parser: of the command.
        required: whether it always takes a meta file and a model.
    """
    count = None if required else "?"
    parser.add_argument("meta", metavar="META", nargs=count, help="meta file (as PMC-data.json)")
    parser.add_argument("--model", required=required, help="model or adapter folder, or hub id")
    parser.add_argument(
        "--data_root",
        default=REPOSITORY,
        type=Path,
        help="folder that relative paths in the meta file count from [the repository]",
    )
    parser.add_argument("--max_dynamic_patch", type=positive, help="most tiles of a record [the model's]")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N records of each set")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of commands that run the model."""
    parser.add_argument("--base", help="for adapters: where their base model is now")
    parser.add_argument(
        "--device", help="cpu, cuda:0, or auto: spread over all GPUs [the GPU if there is one]"
    )


def positive(text: str) -> int:
    """Parse a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


def boolean(text: str) -> bool:
    """Parse True or False."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be True or False, found {text}")
    return text.lower() == "true"


def find_device(name: str | None) -> torch.device:
    """Return the device of `--device`, by default the GPU if there is one."""
    from internvl_chat.inference import devices

    return devices.find_device(name)


def open_sets(args: argparse.Namespace) -> tuple[list[RecordSet], PreTrainedTokenizerBase, Preprocessing]:
    """Open the data sets of a command with `add_data_arguments`; needs no weights."""
    from internvl_chat.data.dataset import build_sets
    from internvl_chat.data.encode.encoder import RecordEncoder
    from internvl_chat.data.encode.preprocessing import Preprocessing
    from internvl_chat.data.encode.tokenizer import load_tokenizer
    from internvl_chat.data.sources.meta import load_meta
    from internvl_chat.model.io.folders import model_folder, read_config

    folder = model_folder(args.model)
    tokenizer, _ = load_tokenizer(folder)
    preprocessing = Preprocessing.from_folder(folder, read_config(folder))
    encoder = RecordEncoder(tokenizer, preprocessing).with_max_tiles(args.max_dynamic_patch)
    return build_sets(load_meta(args.meta, args.data_root), encoder), tokenizer, preprocessing


def count(sets: Sequence[RecordSet], limit: int | None) -> int:
    """Return how many records the first `limit` of each set are."""
    return sum(len(records.first(limit)) for records in sets)

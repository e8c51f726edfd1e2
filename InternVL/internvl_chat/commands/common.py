"""Arguments and setup shared by the subcommands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_chat.utils.paths import REPOSITORY

if TYPE_CHECKING:
    from internvl_chat.data.record_set import RecordSet


def add_data_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the arguments of commands that run a model over the records of a meta file.

    Args:
        parser: parser of the command.
        required: whether META and `--model` are mandatory.
    """
    add = parser.add_argument
    nargs = None if required else "?"
    add("meta", metavar="META", nargs=nargs, help="meta file (like PMC-data.json)")
    add("--model", required=required, help="model folder, adapter folder or hub id")
    add_data_root(parser)
    add_tile_limit(parser)
    add("--limit", type=positive, metavar="N", help="use the first N records of each dataset")
    add("--json", action="store_true", help="print one JSON object per line")


def add_data_root(parser: argparse.ArgumentParser) -> None:
    """Add `--data_root`."""
    parser.add_argument("--data_root", default=REPOSITORY, type=Path,
        help="folder that relative paths in the meta file start from (default: the repository)")  # fmt: skip


def add_tile_limit(parser: argparse.ArgumentParser) -> None:
    """Add `--max_dynamic_patch`."""
    parser.add_argument("--max_dynamic_patch", type=positive, metavar="N",
        help="maximum tiles per record (default: from the checkpoint)")  # fmt: skip


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of commands that run the model."""
    parser.add_argument("--base", help="base model of an adapter, if it has moved since training")
    parser.add_argument("--device", help="cpu, cuda:0, or auto for all GPUs (default: GPU if available)")


def positive(text: str) -> int:
    """Parse a positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


def boolean(text: str) -> bool:
    """Parse True or False."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be True or False, found {text}")
    return text.lower() == "true"


def comma_separated(text: str) -> list[str]:
    """Parse comma-separated names."""
    return [name.strip() for name in text.split(",") if name.strip()]


def open_sets(args: argparse.Namespace) -> list[RecordSet]:
    """Open the datasets of a command with `add_data_arguments`, without reading weights."""
    from internvl_chat.api import open_datasets

    return open_datasets(
        args.meta, args.model, data_root=args.data_root, max_dynamic_patch=args.max_dynamic_patch
    )


def count_records(sets: Sequence[RecordSet], limit: int | None) -> int:
    """Return the number of records if at most `limit` of each dataset are used."""
    return sum(len(records.first(limit)) for records in sets)

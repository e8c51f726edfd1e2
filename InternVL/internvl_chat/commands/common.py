"""Arguments and setup shared by the subcommands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_chat.commands.output import progress
from internvl_chat.constants import BACKGROUNDS
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.paths import data_root

# Preprocessing options on the command line, except the tile limit.
_PREPROCESSING = ("image_background", "exif_transpose", "escape_control_tokens")

if TYPE_CHECKING:
    from internvl_chat.data.encode.encoder import RecordEncoder
    from internvl_chat.data.encode.preprocessing import Preprocessing
    from internvl_chat.data.record_set import RecordSet
    from internvl_chat.inference.sampling import Sampling


def add_data_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the arguments of commands that process the records of a meta file for a given model.

    Args:
        parser: parser of the command.
        required: whether META and `--model` are required.
    """
    add = parser.add_argument
    nargs = None if required else "?"
    add("meta", metavar="META", nargs=nargs, help="meta file (like PMC-data.json)")
    add("--model", required=required, help="model folder, adapter folder or hub id")
    add_data_root(parser)
    add_preprocessing_arguments(parser)
    add("--limit", type=positive, metavar="N", help="use the first N records of each dataset")
    add("--json", action="store_true", help="print one JSON object per line")


def add_data_root(parser: argparse.ArgumentParser) -> None:
    """Add `--data_root` and `--image_root`."""
    parser.add_argument("--data_root", default=data_root(), type=Path,
        help="base folder of relative paths in the meta file (default: $DATA_ROOT, or the "
        "repository)")  # fmt: skip
    parser.add_argument("--image_root", metavar="DIR",
        help="folder, shards or URL of the images, if META is an annotation file instead of a meta "
        "file")  # fmt: skip


def add_tile_limit(parser: argparse.ArgumentParser) -> None:
    """Add `--max_dynamic_patch`."""
    parser.add_argument("--max_dynamic_patch", type=positive, metavar="N",
        help="maximum tiles per record (default: from the checkpoint)")  # fmt: skip


def add_preprocessing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that override preprocessing options of the checkpoint."""
    add_tile_limit(parser)
    add = parser.add_argument
    add("--image_background", choices=BACKGROUNDS,
        help="color behind transparent pixels; none ignores transparency (default: from the "
        "checkpoint)")  # fmt: skip
    add("--exif_transpose", type=boolean, metavar="BOOL",
        help="apply the rotation stored as EXIF orientation (default: from the checkpoint)")  # fmt: skip
    add("--escape_control_tokens", type=boolean, metavar="BOOL",
        help="treat control tokens such as <|im_end|> in records as plain text (default: from the "
        "checkpoint)")  # fmt: skip


def add_tokenizer_model(parser: argparse.ArgumentParser) -> None:
    """Add an optional `--model`, for commands that use only its tokenizer and preprocessing."""
    parser.add_argument("--model",
        help="model whose tokenizer counts the tokens: model folder, adapter folder or hub id (default: "
        "do not count tokens)")  # fmt: skip


def add_length_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--max_seq_length` and `--truncate_text`."""
    add = parser.add_argument
    add("--max_seq_length", type=positive, metavar="N",
        help="maximum tokens per record (default: from the checkpoint)")  # fmt: skip
    add("--truncate_text", action="store_true", help="check as if training used --truncate_text True")


def preprocessing_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the preprocessing options on the command line (None if not given), without the tile limit."""
    return {name: vars(args).get(name) for name in _PREPROCESSING}


def load_preprocessing(args: argparse.Namespace, folder: Path) -> Preprocessing:
    """Return the preprocessing of a checkpoint, with the options from the command line applied."""
    from internvl_chat.data.encode.preprocessing import Preprocessing
    from internvl_chat.model.io.folders import read_config

    preprocessing = Preprocessing.from_folder(
        folder, read_config(folder), max_dynamic_patch=args.max_dynamic_patch
    )
    return preprocessing.with_options(**preprocessing_options(args))


def model_name(given: str, folder: Path) -> str:
    """Return the display name of a model: the name of its folder, or its hub id.

    Args:
        given: folder or hub id on the command line.
        folder: folder of the model.
    """
    return folder.resolve().name if Path(given).expanduser().is_dir() else given


def load_encoder(args: argparse.Namespace) -> RecordEncoder:
    """Return the record encoder of the model; without `--model`, an encoder that only counts tiles.

    The arguments are those of `add_tokenizer_model`, `add_preprocessing_arguments` and
    `add_length_arguments`.

    Raises:
        UsageError: an argument about tokens is given without a model.
    """
    from internvl_chat.data.encode.encoder import RecordEncoder
    from internvl_chat.data.encode.preprocessing import Preprocessing
    from internvl_chat.data.encode.tokenizer import load_tokenizer
    from internvl_chat.model.io.folders import model_folder

    if args.model is None:
        if args.max_seq_length or args.truncate_text:
            raise UsageError(
                "--max_seq_length and --truncate_text require --model, whose tokenizer counts the tokens"
            )
        preprocessing = Preprocessing().with_tile_limit(args.max_dynamic_patch)
        return RecordEncoder(None, preprocessing.with_options(**preprocessing_options(args)))
    folder = model_folder(args.model)
    preprocessing = load_preprocessing(args, folder).with_options(max_seq_length=args.max_seq_length)
    tokenizer, _ = load_tokenizer(folder)
    return RecordEncoder(tokenizer, preprocessing, truncate_text=args.truncate_text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--base` and `--device`, for commands that run the model."""
    parser.add_argument("--base", help="base model of an adapter, if it has been moved since training")
    parser.add_argument("--device", help="cpu, cuda:0, or auto for all GPUs (default: GPU if available)")


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--system` and the options of generated answers."""
    add = parser.add_argument
    add("--system", metavar="TEXT", help="system prompt (default: from the checkpoint)")
    add("--max_new_tokens", type=positive, metavar="N", default=512,
        help="maximum tokens per answer (default: 512)")  # fmt: skip
    add("--temperature", type=float, default=0.0,
        help="sampling temperature, for example 0.7; 0 is greedy decoding (default: 0)")  # fmt: skip
    add("--top_p", type=float, help="probability mass of nucleus sampling (default: 1)")
    add("--seed", type=int, help="seed for reproducible sampling")


def sampling_options(args: argparse.Namespace) -> Sampling | None:
    """Return the sampling options of `add_generation_arguments`, or None for greedy decoding.

    Raises:
        UsageError: the options are invalid.
    """
    from internvl_chat.inference.sampling import Sampling

    if args.temperature:
        return Sampling(args.temperature, 1.0 if args.top_p is None else args.top_p, args.seed)
    if args.top_p is not None or args.seed is not None:
        raise UsageError("--top_p and --seed require --temperature; without it, decoding is greedy")
    return None


def add_server_arguments(parser: argparse.ArgumentParser, port: int) -> None:
    """Add `--host` and `--port`.

    Args:
        parser: parser of the command.
        port: default port.
    """
    parser.add_argument("--host", default="127.0.0.1",
        help="address to listen on; 0.0.0.0 also serves other machines (default: 127.0.0.1)")  # fmt: skip
    parser.add_argument("--port", type=_port, default=port,
        help=f"TCP port; 0 chooses a free one (default: {port})")  # fmt: skip


def require_packages(command: str, *packages: str) -> None:
    """Check that packages of the extra `ui` are installed.

    Raises:
        UsageError: a package is missing.
    """
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UsageError(f"m3llm {command} requires {' and '.join(missing)}: pip install 'm3llm[ui]'")


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535, found {value}")
    return value


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
    """Open the datasets given by the arguments of `add_data_arguments`, without loading weights."""
    from internvl_chat.api import open_datasets

    return open_datasets(
        args.meta,
        args.model,
        data_root=args.data_root,
        image_root=args.image_root,
        max_dynamic_patch=args.max_dynamic_patch,
        **preprocessing_options(args),
    )


def count_records(sets: Sequence[RecordSet], limit: int | None) -> int:
    """Return the number of records in all datasets, counting at most `limit` per dataset.

    Raises:
        DataError: there are none, because `repeat_time` is too small.
    """
    from internvl_chat.utils.errors import DataError

    if not (count := sum(len(records.first(limit)) for records in sets)):
        raise DataError("no records are selected; increase 'repeat_time' in the meta file")
    return count


def log_warnings(sets: Sequence[RecordSet], limit: int | None) -> None:
    """Log warnings about the first `limit` records of each dataset: a line per type, with an example."""
    from internvl_chat.data.sources.problems import describe_by_kind
    from internvl_chat.utils.errors import DataError
    from internvl_chat.utils.logging import get_logger

    found, unusable = [], set()
    keys = [(records, index) for records in sets for index in records.first(limit)]
    for records, index in progress(keys):
        if records.spec.name not in unusable:
            try:
                found += records.warnings(index)
            except DataError:
                unusable.add(records.spec.name)  # reported by the command itself
    for line in describe_by_kind(found):
        get_logger(__name__).warning("%s", line)

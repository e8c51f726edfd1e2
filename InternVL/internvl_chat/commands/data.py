"""`m3llm data inspect` and `m3llm sample-data`."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_chat.commands.common import add_data_arguments, open_sets, positive
from internvl_chat.commands.output import emit, progress, say
from internvl_chat.utils.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from internvl_chat.data.record_set import RecordSet


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `data inspect`."""
    add_data_arguments(parser)
    parser.add_argument("--ids", action="store_true",
                        help="also the token ids, the labels, and a hash of the tiles")  # fmt: skip


def inspect(args: argparse.Namespace) -> int:
    """Show each record's tiles, tokens and decoded supervised spans."""
    sets, tokenizer, _ = open_sets(args)
    for records in sets:
        indices = records.first(args.limit)
        for index in progress(indices) if args.json else indices:
            row = _inspect_record(records, index, tokenizer, with_ids=args.ids)
            if args.json:
                emit(row)
            else:
                _print_record(row)
    return 0


def _inspect_record(
    records: RecordSet, index: int, tokenizer: PreTrainedTokenizerBase, *, with_ids: bool
) -> dict[str, Any]:
    """Return what a record becomes, under the names that programs read."""
    from internvl_chat.data.encode.encoder import supervised_spans

    record, encoded = records.encode(index)
    tiles = [grid.tiles for grid in encoded.grids]
    row = {
        "dataset": records.spec.name,
        "index": index,
        "id": record.id,
        "tiles": tiles,
        "num_tiles": sum(tiles),
        "num_tokens": len(encoded.input_ids),
        "num_supervised": encoded.num_supervised,
        "supervised": [tokenizer.decode(span) for span in supervised_spans(encoded)],
    }
    if with_ids:
        pixels = records.load(index).tiles.numpy()
        row["input_ids"] = encoded.input_ids.tolist()
        row["labels"] = encoded.labels.tolist()
        row["tiles_u8"] = hashlib.sha256(pixels.tobytes()).hexdigest()[:16]
    return row


def _print_record(row: dict[str, Any]) -> None:
    say(f"{row['dataset']} {row['index']} (id {row['id']}): {row['num_tokens']} tokens, "
        f"{row['num_supervised']} supervised, tiles {row['tiles']}")  # fmt: skip
    for span in row["supervised"]:
        say(f"    learns {span!r}")
    if "input_ids" in row:
        say(f"    ids {row['input_ids']}")
        say(f"    labels {row['labels']}")
        say(f"    tiles {row['tiles_u8']}")


def add_sample_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sample-data`."""
    parser.add_argument("folder", type=Path, help="new folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn [0]")
    parser.add_argument("--train", type=positive, default=60, help="training records a category [60]")
    parser.add_argument("--held-out", type=positive, default=20, help="held-out records a category [20]")
    parser.add_argument("--json", action="store_true", help="print the paths of the meta files as JSON")


def sample_data(args: argparse.Namespace) -> int:
    """Write a sample data set."""
    from internvl_chat.data.synthetic.sample_data import write_sample_data

    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: must be at least 0")
    try:
        paths = write_sample_data(
            args.folder, seed=args.seed, train=args.train, held_out=args.held_out,
            progress=lambda items: progress(items, unit="figure"),
        )  # fmt: skip
    except FileExistsError as error:
        raise UsageError(str(error)) from None
    if args.json:
        emit({name: str(path) for name, path in paths.items()})
    else:
        for name, path in paths.items():
            say(f"{name}: {path}")
    return 0

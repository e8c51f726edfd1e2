"""`m3llm data inspect`: print the tiles, tokens and supervised text of each record."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from internvl_chat.commands.common import add_data_arguments, log_warnings, open_sets
from internvl_chat.commands.output import echo, print_json, progress
from internvl_chat.utils.files import sha256

if TYPE_CHECKING:
    from internvl_chat.data.record_set import RecordSet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `data inspect`."""
    add_data_arguments(parser)
    parser.add_argument("--ids", action="store_true", help="also print token ids, labels and a tile hash")


def run(args: argparse.Namespace) -> int:
    """Print the tiles, token counts and decoded supervised spans of each record."""
    sets = open_sets(args)
    log_warnings(sets, args.limit)
    for records in sets:
        indices = records.first(args.limit)
        for index in progress(indices) if args.json else indices:
            row = _inspect_record(records, index, with_ids=args.ids)
            if args.json:
                print_json(row)
            else:
                _print_record(row)
    return 0


def _inspect_record(records: RecordSet, index: int, *, with_ids: bool) -> dict[str, Any]:
    """Return the JSON row of a record; `with_ids` adds token IDs, labels and a hash of the tiles."""
    from internvl_chat.data.encode.encoder import supervised_spans

    record, encoded = records.encode(index)
    tokenizer = records.encoder.template.tokenizer
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
        row["tiles_u8"] = sha256(pixels.tobytes())[:16]
    return row


def _print_record(row: dict[str, Any]) -> None:
    echo(
        f"{row['dataset']} {row['index']} (id {row['id']}): {row['num_tokens']} tokens, "
        f"{row['num_supervised']} supervised, tiles {row['tiles']}"
    )
    for span in row["supervised"]:
        echo(f"    supervised: {span!r}")
    if "input_ids" in row:
        echo(f"    ids: {row['input_ids']}")
        echo(f"    labels: {row['labels']}")
        echo(f"    tiles: {row['tiles_u8']}")

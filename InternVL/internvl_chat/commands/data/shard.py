"""`m3llm data shard`: write the images of a meta file to tar shards."""

import argparse
import sys
from functools import partial
from pathlib import Path

from internvl_chat.commands.common import add_data_root, positive
from internvl_chat.commands.output import echo, print_json, progress
from internvl_chat.utils.text import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `data shard`."""
    add = parser.add_argument
    help_text = "meta file (like PMC-data.json), or annotation file with --image_root"
    add("meta", metavar="META", type=Path, help=help_text)
    add(
        "folder",
        metavar="DIR",
        type=Path,
        help="output folder for the shards, the annotation files and the new meta file",
    )
    add_data_root(parser)
    add("--shard_mb", type=positive, metavar="N", default=1000,
        help="maximum size of the images in a shard in MB (default: 1000)")  # fmt: skip
    add("--on_bad_record", choices=("fail", "skip"), default="fail",
        help="skip excludes unusable images, such as missing ones (default: fail)")  # fmt: skip
    add("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Write the shards and print the path to the new meta file."""
    from internvl_chat.data.dataset import build_sets
    from internvl_chat.data.encode.encoder import RecordEncoder
    from internvl_chat.data.encode.preprocessing import Preprocessing
    from internvl_chat.data.shard_writer import write_shards
    from internvl_chat.data.sources.meta import load_meta

    specs = load_meta(args.meta, args.data_root, args.image_root)
    try:
        result = write_shards(
            build_sets(specs, RecordEncoder(None, Preprocessing())),
            args.folder,
            meta_name=f"{args.meta.name.split('.')[0]}.json",
            shard_bytes=args.shard_mb * 1_000_000,
            skip_unusable=args.on_bad_record == "skip",
            progress=partial(progress, unit="shard"),
        )
    except KeyboardInterrupt:
        sys.stderr.write("m3llm: interrupted; run the same command again to continue\n")
        return 130
    if args.json:
        print_json({**result._asdict(), "meta": str(result.meta)})
    else:
        images, shards = counted(result.images, "image"), counted(result.shards, "shard")
        echo(f"{images} in {shards}, {result.bytes / 1e9:.2f} GB")
        echo(f"meta file: {result.meta}")
    return 0

"""`m3llm sample-data`: create a small synthetic dataset."""

import argparse
from pathlib import Path

from internvl_chat.commands.common import positive
from internvl_chat.commands.output import echo, print_json, progress
from internvl_chat.utils.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sample-data`."""
    add = parser.add_argument
    add("folder", type=Path, help="folder to create")
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    add("--train", type=positive, metavar="N", default=60,
        help="training records per task (default: 60); the text-only task has at most 75")  # fmt: skip
    add("--held-out", type=positive, metavar="N", default=20,
        help="held-out records per task (default: 20); the text-only task has at most 25")  # fmt: skip
    add("--json", action="store_true", help="print the paths to the meta files as JSON")


def run(args: argparse.Namespace) -> int:
    """Write the dataset and print the paths to its meta files."""
    from internvl_chat.data.synthetic.sample_data import write_sample_data

    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: must be at least 0")
    try:
        paths = write_sample_data(
            args.folder,
            seed=args.seed,
            train=args.train,
            held_out=args.held_out,
            progress=lambda items: progress(items, unit="figure"),
        )
    except FileExistsError as error:
        raise UsageError(str(error)) from None
    if args.json:
        print_json({name: str(path) for name, path in paths.items()})
    else:
        for name, path in paths.items():
            echo(f"{name}: {path}")
    return 0

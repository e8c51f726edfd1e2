"""`m3llm export`: convert a checkpoint to the transformers format, or back to the reference format."""

import argparse

from internvl_chat.commands import merge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    parser.add_argument("source", help="model folder, adapter folder or hub id")
    merge.add_target_arguments(parser)
    parser.add_argument(
        "--format",
        choices=("hf", "internvl"),
        default="hf",
        help="hf: transformers' format, without remote code; internvl: the reference's format (default: hf)",
    )


def run(args: argparse.Namespace) -> int:
    """Convert the checkpoint and print a summary."""
    from internvl_chat.convert.export import export_hf

    if args.format == "internvl":
        return merge.run(args)
    check = merge.ResultCheck(args)
    result = export_hf(args.source, args.target, base=args.base, check=check if args.check else None)
    summary = "already exported" if result.already_done else "exported to the transformers format"
    check.report(result.folder, {"already_exported": result.already_done}, summary)
    return 0

"""`m3llm merge` and `m3llm export`, each with a check that the result does what its source does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from internvl_chat.commands.common import add_model_arguments, boolean, find_device
from internvl_chat.commands.output import emit, progress, say


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merge`."""
    parser.add_argument("source", help="adapter folder, or a checkpoint wrapped in LoRA by the reference")
    _add_common_arguments(parser)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    parser.add_argument("source", help="model or adapter folder, or hub id")
    _add_common_arguments(parser)
    parser.add_argument(
        "--format",
        choices=("hf", "internvl"),
        default="hf",
        help="hf: what transformers loads without remote code; internvl: the reference's format [hf]",
    )


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=Path, help="folder to write")
    add_model_arguments(parser)
    parser.add_argument(
        "--check",
        type=boolean,
        default=True,
        help="compare source and result on synthetic records, and keep no result that differs [True]",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run_merge(args: argparse.Namespace) -> int:
    """Merge adapters into their base."""
    from internvl_chat.convert.merge import merge

    check = _Check(args)
    result = merge(args.source, args.target, base=args.base, check=check if args.check else None)
    row = {"merged_layers": result.merged_layers, "already_merged": result.already_merged}
    if result.already_merged:
        said = "is merged already"
    else:
        merged = f"{result.merged_layers} layers merged" if result.merged_layers else "no adapters to merge"
        said = f"{merged}; written in the reference's format"
    _report(args, result.folder, row, said, check)
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Write a checkpoint in the other format."""
    from internvl_chat.convert.export import export_hf

    if args.format == "internvl":
        return run_merge(args)
    check = _Check(args)
    result = export_hf(args.source, args.target, base=args.base, check=check if args.check else None)
    said = "is exported already" if result.already_exported else "exported to transformers' format"
    _report(args, result.folder, {"already_exported": result.already_exported}, said, check)
    return 0


class _Check:
    """Compares the source of a command with its result; remembers how they differ.

    Args:
        args: of a command with `_add_common_arguments`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.found = args, []

    def __call__(self, result: Path) -> None:
        from internvl_chat.convert.parity import check_same
        from internvl_chat.model.io.folders import model_folder

        self.found = check_same(
            model_folder(self.args.source),
            result,
            device=find_device(self.args.device),
            base=self.args.base,
            progress=lambda records: progress(records, total=len(records)),
        )

    @property
    def row(self) -> dict[str, Any]:
        """What it found, for programs."""
        if not self.found:
            return {}
        return {"checked_records": len(self.found), "logits_difference": max(d.logits for d in self.found)}


def _report(args: argparse.Namespace, folder: Path, row: dict[str, Any], said: str, check: _Check) -> None:
    if args.json:
        emit({"folder": str(folder)} | row | check.row)
        return
    say(f"{folder}: {said}")
    if check.found:
        say("checked on {checked_records} synthetic records: the same tokens, tiles and pixels; logits "
            "differ by at most {logits_difference:.2g}".format(**check.row))  # fmt: skip

"""`m3llm merge`: merge LoRA adapters into their base model and compare the result with the source."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_chat.commands.common import add_model_arguments, boolean
from internvl_chat.commands.output import echo, print_json, progress

if TYPE_CHECKING:
    from internvl_chat.convert.parity import Difference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merge`."""
    parser.add_argument("source", help="adapter folder, or LoRA-wrapped checkpoint in the reference's format")
    add_target_arguments(parser)


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments shared by `merge` and `export`."""
    add = parser.add_argument
    add("target", type=Path, help="output folder")
    add_model_arguments(parser)
    add("--check", type=boolean, default=True,
        help="run source and result on synthetic records, and delete the result if they differ "
        "(default: True)")  # fmt: skip
    add("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> int:
    """Merge the adapters and print a summary."""
    from internvl_chat.convert.merge import merge

    check = ResultCheck(args)
    result = merge(args.source, args.target, base=args.base, check=check if args.check else None)
    row = {"merged_layers": result.merged_layers, "already_merged": result.already_done}
    if result.already_done:
        summary = "already merged"
    else:
        merged = f"merged {result.merged_layers} layers" if result.merged_layers else "no adapters to merge"
        summary = f"{merged}; written in the reference format"
    check.report(result.folder, row, summary)
    return 0


class ResultCheck:
    """Compares the source of a conversion with its result, and prints the outcome.

    Args:
        args: parsed arguments of `add_target_arguments`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.differences: Sequence[Difference] = ()

    def __call__(self, result: Path) -> None:
        """Compare the source with the result.

        Raises:
            ModelError: they differ; the caller then deletes the result.
        """
        from internvl_chat.convert.parity import check_same
        from internvl_chat.inference.devices import find_device
        from internvl_chat.model.io.folders import model_folder

        self.differences = check_same(
            model_folder(self.args.source),
            result,
            device=find_device(self.args.device),
            base=self.args.base,
            progress=progress,
        )

    def report(self, folder: Path, row: dict[str, Any], summary: str) -> None:
        """Print the outcome of the conversion and of the comparison.

        Args:
            folder: folder of the result.
            row: fields for `--json`.
            summary: text that is printed without `--json`.
        """
        count, largest = len(self.differences), max((d.logits or 0.0 for d in self.differences), default=0.0)
        if self.args.json:
            checked = {"checked_records": count, "logits_difference": largest} if count else {}
            print_json({"folder": str(folder)} | row | checked)
            return
        echo(f"{folder}: {summary}")
        if count:
            echo(
                f"checked on {count} synthetic records: identical tokens, tiles and pixels; "
                f"maximum logit difference {largest:.2g}"
            )

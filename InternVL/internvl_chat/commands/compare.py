"""`m3llm eval compare`: compare the evaluations of several models with significance tests."""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path

from internvl_chat.commands.common import comma_separated
from internvl_chat.commands.output import echo, print_json, print_table, progress
from internvl_chat.utils.errors import UsageError

PAGE = "comparison.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `eval compare`."""
    add = parser.add_argument
    add("folders", metavar="OUT", type=Path, nargs="+",
        help="output folders of m3llm eval --bench; the first is the baseline")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help=f"write {PAGE}, with the answers to every item side by side")
    add("--common", action="store_true",
        help="compare only the items that all evaluations have; also accept different protocols")  # fmt: skip
    add("--metrics", type=comma_separated, metavar="NAMES",
        help="comma-separated metrics (default: accuracy,judge,em,recall,bleu4,rougeL,bertscore,sts; those "
        "that the evaluations have)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object per line")


def run(args: argparse.Namespace) -> int:
    """Compare the evaluations."""
    from internvl_chat.eval.compare import MAIN_METRICS, compare, read_evaluations, read_images
    from internvl_chat.eval.report.side_by_side import HEADER, comparison_row, method_note, side_by_side_page
    from internvl_chat.eval.significance import RESAMPLES, SEED
    from internvl_chat.utils.files import write_text

    _check_arguments(args)
    evaluations = read_evaluations(args.folders, common=args.common)
    comparisons = compare(evaluations, args.metrics or MAIN_METRICS, partial(progress, unit="comparison"))
    if args.json:
        for row in comparisons:
            print_json(dataclasses.asdict(row))
        summary = {"comparisons": len(comparisons), "correction": "holm"}
        print_json(summary | {"bootstrap_resamples": RESAMPLES, "seed": SEED})
    else:
        print_table(HEADER, [comparison_row(row) for row in comparisons])
        echo(f"\n{method_note(comparisons)}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        first, images = read_images(args.folders, evaluations)
        page = side_by_side_page([first, *evaluations[1:]], comparisons, images)
        write_text(args.out / PAGE, page)
        if not args.json:
            echo(f"report: {args.out / PAGE}")
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    from internvl_chat.eval.report.table import LABELS

    problems = []
    if len(args.folders) < 2:
        problems.append("give at least two output folders of m3llm eval --bench")
    if len({folder.resolve() for folder in args.folders}) < len(args.folders):
        problems.append("a folder is given twice")
    unknown = [name for name in args.metrics or () if name not in LABELS]
    if unknown:
        problems.append(f"--metrics {','.join(unknown)}: unknown; the choices are {', '.join(LABELS)}")
    if problems:
        raise UsageError(problems)

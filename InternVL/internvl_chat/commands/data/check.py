"""`m3llm data check`: check every record and image of the datasets before training."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_chat.commands.common import (
    add_data_root,
    add_length_arguments,
    add_preprocessing_arguments,
    add_tokenizer_model,
    load_encoder,
    positive,
)
from internvl_chat.commands.output import echo, print_json, print_table
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.text import counted

if TYPE_CHECKING:
    from internvl_chat.data.audit.checks import Audit
    from internvl_chat.data.sources.problems import Problem

_EXAMPLES_PER_KIND = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `data check`."""
    add = parser.add_argument
    add("meta", nargs="?", metavar="META", help="meta file (like PMC-data.json)")
    add_tokenizer_model(parser)
    add_data_root(parser)
    add("--check", choices=("fast", "full"), default="fast",
        help="fast reads the header and the end of each image; full decodes it (default: fast)")  # fmt: skip
    add_preprocessing_arguments(parser)
    add_length_arguments(parser)
    add("--against", nargs="+", type=Path, metavar="PATH", default=[],
        help="benchmarks to check for contamination: meta files, JSON, tables, other text files, images, or "
        "folders of such files")  # fmt: skip
    add("--report", type=Path, metavar="DIR", help="write problems.jsonl, report.html and lengths.png here")
    add("--workers", type=positive, metavar="N", help="worker processes (default: one per core)")
    add("--json", action="store_true", help="print one JSON object per dataset")


def run(args: argparse.Namespace) -> int:
    """Check the datasets of a meta file; return 1 if any record is unusable or occurs in a benchmark."""
    from internvl_chat.data.audit.checks import audit
    from internvl_chat.data.audit.report import write_report
    from internvl_chat.data.sources.meta import load_meta
    from internvl_chat.data.sources.problems import WARNINGS

    if args.meta is None:
        if len(args.against) < 2:
            raise UsageError("META (the meta file to check) is required")
        args.meta = args.against.pop()  # `--against PATH META`
    specs, encoder = load_meta(args.meta, args.data_root, args.image_root), load_encoder(args)
    if args.report:
        _create_folder(args.report)
    result = audit(specs, encoder, decode=args.check == "full", workers=args.workers)
    leaks = _leaks(args, result) if args.against else []
    page = write_report(args.report, result, leaks, inputs=_inputs(args)) if args.report else None
    problems = [*result.problems, *leaks]
    if args.json:
        _print_rows(result, problems, page)
    else:
        _print_summary(result, problems, page)
    return int(any(problem.kind not in WARNINGS for problem in problems))


def _inputs(args: argparse.Namespace) -> dict[str, str]:
    """Return the lines at the top of the report: data, model, benchmarks and command."""
    benchmarks = {"compared with": ", ".join(map(str, args.against))} if args.against else {}
    return {
        "data": str(args.meta),
        "model": args.model or "none (tokens were not counted)",
        **benchmarks,
        "command": shlex.join(["m3llm", *sys.argv[1:]]),
    }


def _create_folder(folder: Path) -> None:
    """Create the report folder before the check, so that an invalid path fails early."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(
            f"--report {folder}: the path or one of its parents is a file; choose a different folder"
        ) from None
    except OSError as error:
        raise UsageError(f"--report {folder}: cannot create the folder: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--report {folder}: not writable; choose a different folder")


def _leaks(args: argparse.Namespace, result: Audit) -> list[Problem]:
    from internvl_chat.data.audit.benchmark_files import read_benchmark
    from internvl_chat.data.audit.contamination import find_leaks

    benchmark = read_benchmark(args.against, args.data_root)
    if not args.json:
        articles, images = counted(len(benchmark.articles), "PMC id"), counted(len(benchmark.images), "image")
        echo(f"compared with {articles} and {images}")
    return find_leaks(result.opened, benchmark, workers=args.workers)


def _print_rows(result: Audit, problems: Sequence[Problem], page: Path | None) -> None:
    from internvl_chat.data.audit.statistics import set_statistics, severity
    from internvl_chat.data.sources.problems import LEAKS

    for dataset in result.sets:
        row = set_statistics(dataset, with_tokens=result.max_seq_length is not None)
        leaks = [p.kind for p in problems if p.dataset == dataset.spec.name and p.kind in LEAKS]
        print_json(row | {"leaks": {kind: leaks.count(kind) for kind in LEAKS if kind in leaks}})
    counts = Counter(severity(problem.kind) for problem in problems)
    print_json(
        {
            "dataset": "all",
            "used": sum(dataset.used for dataset in result.sets),
            "usable": sum(dataset.usable for dataset in result.sets),
            "errors": counts["error"],
            "warnings": counts["warning"],
            "leaks": counts["leak"],
            "not_compared": sum(problem.kind == "not compared" for problem in problems),
            "decoded": result.decoded,
            "max_seq_length": result.max_seq_length,
            "report": None if page is None else str(page),
        }
    )


def _print_summary(result: Audit, problems: Sequence[Problem], page: Path | None) -> None:
    from internvl_chat.data.audit.statistics import SET_HEADER, group_by_kind, set_rows, severity, summary
    from internvl_chat.data.sources.problems import KINDS

    print_table(SET_HEADER, set_rows(result))
    groups = group_by_kind(problems)
    if groups:
        echo()
        rows = [(kind, severity(kind), f"{len(of_kind):,}", KINDS[kind]) for kind, of_kind in groups.items()]
        print_table(("kind", "severity", "count", "meaning"), rows)
        echo()
    for kind, of_kind in groups.items():
        for problem in of_kind[:_EXAMPLES_PER_KIND]:
            echo(f"{severity(kind)}: {problem}")
        if len(of_kind) > _EXAMPLES_PER_KIND:
            echo(f"    ... and {len(of_kind) - _EXAMPLES_PER_KIND:,} more of this kind")
    echo()
    echo(summary(result, problems))
    if page is not None:
        echo(f"report: {page}")
    elif groups:
        echo("Use --report DIR to write all problems and plots to a folder.")

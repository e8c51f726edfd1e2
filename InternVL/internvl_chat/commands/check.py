"""`m3llm data check`: every record and image looked at before a GPU is rented."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_chat.commands.common import positive
from internvl_chat.commands.output import emit, print_table, say
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.paths import REPOSITORY

if TYPE_CHECKING:
    from internvl_chat.data.audit.checks import Audit
    from internvl_chat.data.encode.encoder import RecordEncoder
    from internvl_chat.data.sources.problems import Problem

_SHOWN_OF_A_KIND = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `data check`."""
    parser.add_argument("meta", help="meta file (as PMC-data.json)")
    parser.add_argument(
        "--model", help="model or adapter folder, or hub id, whose tokenizer counts [tokens are not counted]"
    )
    parser.add_argument(
        "--data_root",
        default=REPOSITORY,
        type=Path,
        help="folder that relative paths in the meta file count from [the repository]",
    )
    parser.add_argument(
        "--check",
        choices=("fast", "full"),
        default="fast",
        help="full decodes every image, fast reads only its header and its end [fast]",
    )
    parser.add_argument("--max_dynamic_patch", type=positive, help="most tiles of a record [the model's]")
    parser.add_argument("--max_seq_length", type=positive, help="most tokens of a record [the model's]")
    parser.add_argument(
        "--truncate_text", action="store_true", help="as if trained with --truncate_text True"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        type=Path,
        metavar="PATH",
        default=[],
        help="benchmarks that nothing may be trained on: meta files, JSON, tables, other text, images, and "
        "folders of these",
    )
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write problems.jsonl, report.html and lengths.png there"
    )
    parser.add_argument("--workers", type=positive, help="processes that look at records [one a core]")
    parser.add_argument("--json", action="store_true", help="one JSON object a data set")


def run(args: argparse.Namespace) -> int:
    """Check the data sets of a meta file; returns 1 if anything in them cannot be used, or leaks."""
    from internvl_chat.data.audit.checks import audit
    from internvl_chat.data.audit.report import write_report
    from internvl_chat.data.sources.meta import load_meta
    from internvl_chat.data.sources.problems import WARNINGS

    if args.model is None and (args.max_seq_length or args.truncate_text):
        raise UsageError("--max_seq_length and --truncate_text need --model, whose tokenizer counts")
    specs, encoder = load_meta(args.meta, args.data_root), _encoder(args)
    if args.report:
        _make_folder(args.report)
    found = audit(specs, encoder, decode=args.check == "full", workers=args.workers)
    leaks = _leaks(args, found) if args.against else []
    page = write_report(args.report, found, leaks) if args.report else None
    problems = [*found.problems, *leaks]
    if args.json:
        _emit(found, problems, page)
    else:
        _show(found, problems, page)
    return int(any(problem.kind not in WARNINGS for problem in problems))


def _encoder(args: argparse.Namespace) -> RecordEncoder:
    """Return how records would be encoded with the model, or what only counts tiles without one."""
    import dataclasses

    from internvl_chat.data.encode.encoder import RecordEncoder, TileCounter
    from internvl_chat.data.encode.preprocessing import Preprocessing
    from internvl_chat.data.encode.tokenizer import load_tokenizer
    from internvl_chat.model.io.folders import model_folder, read_config

    if args.model is None:
        return TileCounter(Preprocessing()).with_max_tiles(args.max_dynamic_patch)
    folder = model_folder(args.model)
    preprocessing = Preprocessing.from_folder(folder, read_config(folder))
    if args.max_seq_length:
        preprocessing = dataclasses.replace(preprocessing, max_seq_length=args.max_seq_length)
    tokenizer, _ = load_tokenizer(folder)
    encoder = RecordEncoder(tokenizer, preprocessing, truncate_text=args.truncate_text)
    return encoder.with_max_tiles(args.max_dynamic_patch)


def _make_folder(folder: Path) -> None:
    """Make the folder of the report, before the work that it reports on."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"--report {folder}: a file is in the way; give a folder, new or not") from None
    except OSError as error:
        raise UsageError(f"--report {folder}: the folder cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--report {folder}: nothing can be written there; give another folder")


def _leaks(args: argparse.Namespace, found: Audit) -> list[Problem]:
    from internvl_chat.data.audit.benchmark_files import read_benchmark
    from internvl_chat.data.audit.contamination import find_leaks

    benchmark = read_benchmark(args.against, args.data_root)
    if not args.json:
        say(f"compared with {len(benchmark.articles):,} PMC ids and {len(benchmark.images):,} images")
    return find_leaks(found.opened, benchmark, workers=args.workers)


def _emit(found: Audit, problems: Sequence[Problem], page: Path | None) -> None:
    from internvl_chat.data.audit.report import set_figures, severity
    from internvl_chat.data.sources.problems import LEAKS

    for one in found.sets:
        row = set_figures(one, with_tokens=found.max_seq_length is not None)
        of_set = [p.kind for p in problems if p.dataset == one.spec.name and p.kind in LEAKS]
        emit(row | {"leaks": {kind: of_set.count(kind) for kind in LEAKS if kind in of_set}})
    counts = Counter(severity(problem.kind) for problem in problems)
    emit(
        {
            "dataset": "all",
            "used": sum(one.used for one in found.sets),
            "usable": sum(one.usable for one in found.sets),
            "errors": counts["error"],
            "warnings": counts["warning"],
            "leaks": counts["leak"],
            "not_compared": sum(problem.kind == "not compared" for problem in problems),
            "decoded": found.decoded,
            "max_seq_length": found.max_seq_length,
            "report": None if page is None else str(page),
        }
    )


def _show(found: Audit, problems: Sequence[Problem], page: Path | None) -> None:
    from internvl_chat.data.audit.report import SET_HEADER, group_by_kind, set_rows, severity, summary
    from internvl_chat.data.sources.problems import KINDS

    print_table(SET_HEADER, set_rows(found))
    groups = group_by_kind(problems)
    if groups:
        say()
        rows = [(kind, severity(kind), f"{len(of_kind):,}", KINDS[kind]) for kind, of_kind in groups.items()]
        print_table(("kind", "", "number", "what it means"), rows)
        say()
    for kind, of_kind in groups.items():
        for problem in of_kind[:_SHOWN_OF_A_KIND]:
            say(f"{severity(kind)}: {problem}")
        if len(of_kind) > _SHOWN_OF_A_KIND:
            say(f"    ... and {len(of_kind) - _SHOWN_OF_A_KIND:,} more of this kind")
    say()
    say(summary(found, problems))
    if page is not None:
        say(f"report: {page}")
    elif groups:
        say("All of them, with plots, are written by --report DIR.")

"""`m3llm eval`: evaluate a model on a benchmark, or with exact match on the records of a meta file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_chat.commands.common import (
    add_data_arguments,
    add_model_arguments,
    comma_separated,
    count_records,
    load_preprocessing,
    log_warnings,
    open_sets,
    positive,
    preprocessing_options,
)
from internvl_chat.commands.output import echo, print_json, print_table, progress
from internvl_chat.data.sources.skip_policy import POLICIES
from internvl_chat.utils.errors import DataError, ModelError, UsageError
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.text import counted

if TYPE_CHECKING:
    from internvl_chat.eval.benchmarks.item import Benchmark, Key
    from internvl_chat.eval.scoring import Scores

logger = get_logger(__name__)

_MAX_NEW_TOKENS = 128
# Enough for a verbose answer to any benchmark question.
_BENCHMARK_MAX_NEW_TOKENS = 1024
# Arguments that require --bench.
_BENCHMARK_ONLY = (
    "data", "out", "predictions", "tasks", "metrics", "bertscore_model", "sts_model", "prompts",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `eval`."""
    add = parser.add_argument
    add_data_arguments(parser, required=False)
    add_model_arguments(parser)
    add("--max_new_tokens", type=positive, metavar="N",
        help="maximum tokens per answer (default: 128 with META, 1024 with --bench)")  # fmt: skip
    add("--batch_size", type=positive, metavar="N", default=8,
        help="questions per batch with META (default: 8)")  # fmt: skip
    add("--on_bad_record", choices=POLICIES, default="fail",
        help="fail: stop at an unusable record or item; skip: log and exclude it "
        "(default: fail)")  # fmt: skip
    add("--require-above-chance", type=float, metavar="P",
        help="fail unless closed questions are answered better than by chance at significance "
        "level P")  # fmt: skip
    add = parser.add_argument_group("with --bench instead of META").add_argument
    add("--bench", help="pmc-mi, omnimedvqa, mmmu-med, vqa, or a folder in PMC-MI-Bench format")
    add("--data", type=Path, help="benchmark folder, or JSONL file for --bench vqa")
    add("--out", type=Path, help="output folder for answers, metrics and report")
    add("--predictions", type=Path, metavar="FILE",
        help="score the answers in this JSONL file (task, index, prediction) instead of running "
        "a model")  # fmt: skip
    add("--tasks", type=comma_separated, help="comma-separated tasks (default: all)")
    add("--metrics", type=comma_separated,
        help="metrics to compute, comma-separated: bleu,rouge,overlap,cider,bertscore,sts,macro; each "
        "must be available (default: all available)")  # fmt: skip
    add("--bertscore_model",
        help="BERTScore encoder: folder or hub id (default: microsoft/deberta-xlarge-mnli)")  # fmt: skip
    add("--sts_model", help="sentence encoder: folder or hub id (default: all-MiniLM-L6-v2)")
    add("--prompts", type=Path, help="YAML or JSON file with a system prompt per task (default: built in)")


def run(args: argparse.Namespace) -> int:
    """Evaluate a model, or existing answers."""
    if args.bench:
        return _run_benchmark(args)
    if not args.meta:
        raise UsageError("META (a meta file) or --bench (a benchmark) is required")
    if not args.model:
        raise UsageError("--model is required with META")
    given = [f"--{name} requires --bench" for name in _BENCHMARK_ONLY if getattr(args, name) is not None]
    if given:
        raise UsageError(given)
    return _run_exact_match(args)


def _run_exact_match(args: argparse.Namespace) -> int:
    """Print the exact match of each dataset, and test the accuracy on closed questions against chance."""
    from internvl_chat.data.sources.skip_policy import SkippedRecord
    from internvl_chat.eval.exact_match import Answer, answer_records, compare_with_chance, score_dataset
    from internvl_chat.inference.engine import Engine
    from internvl_chat.model.io.folders import model_folder

    sets = open_sets(args)
    log_warnings(sets, args.limit)
    preprocessing = load_preprocessing(args, model_folder(args.model))
    engine = Engine.from_checkpoint(
        args.model, device=args.device, base=args.base, preprocessing=preprocessing
    )
    answers: list[Answer] = []
    skipped: list[SkippedRecord] | None = [] if args.on_bad_record == "skip" else None
    max_new_tokens = args.max_new_tokens or _MAX_NEW_TOKENS
    iterator = answer_records(
        engine,
        sets,
        limit=args.limit,
        max_new_tokens=max_new_tokens,
        batch_size=args.batch_size,
        skipped=skipped,
    )
    for answer in progress(iterator, total=count_records(sets, args.limit)):
        answers.append(answer)
        if args.json:
            print_json(dataclasses.asdict(answer) | {"correct": answer.correct})
    if skipped and not answers:
        raise DataError(f"all {len(skipped)} records were skipped; see the warnings above")
    _warn_about_truncated(sum(answer.truncated for answer in answers), max_new_tokens)
    rows = [score_dataset(records.spec.name, answers, skipped or ()) for records in sets]
    chance = compare_with_chance(answers)
    if args.json:
        for row in rows:
            print_json(row)
        closed = dataclasses.asdict(chance) if chance else {"questions": 0}
        print_json({"dataset": "closed questions", **closed})
    else:
        header: tuple[str, ...] = ("dataset", "records", "exact match", "closed", "closed accuracy")
        if skipped:
            header = (*header, "skipped")
        print_table(header, [[_percent(v) for v in row.values()] for row in rows])
        if chance:
            echo(
                f"closed questions: {chance.correct} of {chance.questions} correct; expected by chance: "
                f"{chance.chance * chance.questions:.1f} (binomial test, p = {chance.p_value:.2g})"
            )
    level = args.require_above_chance
    if level is not None and (chance is None or chance.p_value >= level):
        raise ModelError(f"{args.model}: accuracy on closed questions is not above chance (p >= {level})")
    return 0


def _percent(value: Any) -> Any:
    """Format a float as a percentage and None as a dash; return other values unchanged."""
    return "-" if value is None else f"{value:.1%}" if isinstance(value, float) else value


def _run_benchmark(args: argparse.Namespace) -> int:
    """Answer a benchmark or read existing answers, then score and report them."""
    from internvl_chat.eval.answering import answer_benchmark
    from internvl_chat.eval.benchmarks.catalog import open_benchmark, system_prompts
    from internvl_chat.eval.predictions import read_answers
    from internvl_chat.eval.scoring import score
    from internvl_chat.metrics.suite import build_suite
    from internvl_chat.utils.distributed import rank

    _check_benchmark_arguments(args)
    benchmark = open_benchmark(
        args.bench, args.data, tasks=args.tasks, images=not args.predictions, on_bad_record=args.on_bad_record
    )
    selected = benchmark.select(args.tasks, args.limit)
    system = system_prompts(benchmark, args.prompts)
    labeled = selected.labeled
    if args.predictions and not labeled.items:
        raise DataError("no reference answers to score against", file=args.data or args.bench)
    max_new_tokens = args.max_new_tokens or _BENCHMARK_MAX_NEW_TOKENS
    is_first = rank() == 0
    if is_first and labeled.items:  # before answering, so that an unavailable metric fails early
        suite = build_suite(
            args.metrics,
            has_open=any(not item.choices for item in labeled.items),
            bertscore_model=args.bertscore_model,
            sts_model=args.sts_model,
            device=args.device,
        )
    if args.predictions:
        known = (*benchmark.items, *benchmark.excluded)
        answers = read_answers(args.predictions, selected.items, known, args.tasks)
    else:
        answers = answer_benchmark(
            benchmark,
            selected,
            system,
            model=args.model,
            out=args.out,
            base=args.base,
            device=args.device,
            max_new_tokens=max_new_tokens,
            max_dynamic_patch=args.max_dynamic_patch,
            options=preprocessing_options(args),
            progress=partial(progress, unit="item"),
            on_bad_record=args.on_bad_record,
        )
    if not is_first:
        return 0
    answered = selected.keep(answers)
    _report_exclusions(args, benchmark, selected, answered)
    truncated = sum(answers[item.key].truncated for item in answered.items)
    _warn_about_truncated(truncated, max_new_tokens if args.model else None)
    if not answered.items:
        raise DataError("all items were skipped; see the warnings above")
    if answered.labeled.items:
        _report(args, answered.labeled, answers, score(answered.labeled, answers, suite))
    return 0


def _report_exclusions(
    args: argparse.Namespace, benchmark: Benchmark, selected: Benchmark, answered: Benchmark
) -> None:
    """Report the number of skipped items and the number of answers without a reference."""
    skipped = len(benchmark.excluded) + len(selected.items) - len(answered.items)
    unlabeled = len(answered.items) - len(answered.labeled.items)
    file = f"{args.out}/predictions.jsonl" if args.out else args.predictions
    if args.json and (skipped or unlabeled):
        print_json({"skipped": skipped, "without_reference": unlabeled})
    if skipped:
        echo(f"{counted(skipped, 'item')} skipped; see the warnings above", stream=sys.stderr)
    if unlabeled:
        echo(f"{file}: {counted(unlabeled, 'answer')} not scored (no reference)", stream=sys.stderr)


def _warn_about_truncated(count: int, limit: int | None) -> None:
    """Report the number of answers that were cut off."""
    if count:
        flag = "--max_new_tokens" if limit is None else f"--max_new_tokens {limit}"
        logger.warning("%s cut off at %s; raise it for complete answers", counted(count, "answer"), flag)


def _check_benchmark_arguments(args: argparse.Namespace) -> None:
    from internvl_chat.eval.benchmarks.catalog import location_problem
    from internvl_chat.eval.predictions import SETTINGS
    from internvl_chat.metrics.suite import FAMILIES

    location = location_problem(args.bench, args.data)
    problems = [location] if location else []
    if args.meta:
        problems.append(f"META {args.meta} and --bench {args.bench} are mutually exclusive")
    if args.require_above_chance is not None:
        problems.append("--require-above-chance requires META instead of --bench")
    if bool(args.model) == bool(args.predictions):
        problems.append(
            "give either --model (to answer the questions) or --predictions (to score existing answers)"
        )
    if args.model and not args.out:
        problems.append("--out DIR is required with --model")
    if args.predictions and args.out and (args.out / SETTINGS).exists():
        problems.append(
            f"--out {args.out}: contains answers from a different evaluation; choose a different folder"
        )
    unknown = [name for name in args.metrics or () if name not in FAMILIES]
    if unknown:
        problems.append(f"--metrics {','.join(unknown)}: unknown; the choices are {', '.join(FAMILIES)}")
    if problems:
        raise UsageError(problems)


def _has_more_items(folder: Path, scores: Scores) -> bool:
    """Return whether the metrics in a folder cover more items than the scores."""
    try:
        before = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        counts = [sum(int(task["items"] or 0) for task in tasks.values()) for tasks in (before, scores.tasks)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
    return counts[0] > counts[1]


def _report(
    args: argparse.Namespace, benchmark: Benchmark, answers: Mapping[Key, str], scores: Scores
) -> None:
    from internvl_chat.eval.report.files import PAGE, write_report
    from internvl_chat.eval.report.table import metric_tables, paper_tables

    source = Path(args.model or args.predictions)
    model = source.name or str(source)
    writes = args.out and not (args.model and _has_more_items(args.out, scores))
    if writes:
        write_report(args.out, benchmark, answers, scores, model=model)
    elif args.out:
        logger.warning(
            "%s: the report covers more items and is kept; run the command without --limit and --tasks to "
            "update it", args.out,
        )  # fmt: skip
    if args.json:
        for task, metrics in scores.tasks.items():
            print_json({"task": task, **metrics})
        return
    tables = metric_tables(scores.tasks)
    if benchmark.name == "pmc-mi":
        tables = [*paper_tables(scores.tasks, model), *tables]
    for header, rows in tables:
        print_table(header, [tuple(cell.replace("**", "") for cell in row) for row in rows])
        echo()
    if writes:
        echo(f"report: {args.out / PAGE}")

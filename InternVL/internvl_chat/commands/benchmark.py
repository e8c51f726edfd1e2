"""`m3llm eval --bench`: answer a benchmark, or read existing answers, then score and report them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_chat.commands.common import comma_separated, preprocessing_options
from internvl_chat.commands.output import echo, print_json, print_table, progress
from internvl_chat.constants import PROTOCOLS, PUBLISHED_PROTOCOL, STANDARD_PROTOCOL
from internvl_chat.utils.errors import DataError, UsageError
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.text import counted

if TYPE_CHECKING:
    from internvl_chat.eval.benchmarks.item import Benchmark, Key
    from internvl_chat.eval.judge import Verdict
    from internvl_chat.eval.scoring import Scores
    from internvl_chat.inference.engine import Reply
    from internvl_chat.metrics.suite import Suite

logger = get_logger(__name__)

# Arguments that require --bench.
ARGUMENTS = (
    "data", "out", "predictions", "tasks", "metrics", "bertscore_model", "sts_model", "prompts", "protocol",
    "judge", "judge_model",
)  # fmt: skip
# 1024 is enough for a verbose answer to any benchmark question; 512 is the limit of the published wrapper.
_MAX_NEW_TOKENS = {STANDARD_PROTOCOL: 1024, PUBLISHED_PROTOCOL: 512}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `eval` that require `--bench`."""
    add = parser.add_argument_group("with --bench instead of META").add_argument
    add("--bench", metavar="NAME",
        help="pmc-mi, medframeqa, medxpertqa-mm, mmmu-med, omnimedvqa, pathvqa, pmc-vqa, slake, vqa, "
        "vqa-rad, or a folder in PMC-MI-Bench format")  # fmt: skip
    add("--data", type=Path, help="benchmark folder; a file for --bench vqa and pmc-vqa")
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
    add("--prompts", type=Path,
        help="YAML or JSON file with a system prompt per task, or the published task_config.py of "
        "PMC-MI-Bench (default: built in)")  # fmt: skip
    add("--protocol", choices=PROTOCOLS,
        help="published: prompts as in the published InternVL wrapper of PMC-MI-Bench, to compare with the "
        "paper (default: standard)")  # fmt: skip
    add("--judge", metavar="URL",
        help="also grade the open answers with a language model: base URL of an OpenAI-compatible API, with "
        "the key in OPENAI_API_KEY")  # fmt: skip
    add("--judge_model", metavar="NAME", help="model that grades the answers")


def run(args: argparse.Namespace) -> int:
    """Answer the questions of a benchmark or read existing answers; then score and report them."""
    from internvl_chat.eval.benchmarks.catalog import open_benchmark
    from internvl_chat.eval.scoring import score
    from internvl_chat.utils.distributed import rank

    args.protocol = args.protocol or STANDARD_PROTOCOL
    _check_arguments(args)
    benchmark = open_benchmark(
        args.bench, args.data, tasks=args.tasks, images=not args.predictions, on_bad_record=args.on_bad_record
    )
    selected = benchmark.select(args.tasks, args.limit)
    labeled = selected.labeled
    if args.predictions and not labeled.items:
        raise DataError("no reference answers to score against", file=args.data or args.bench)
    is_first = rank() == 0
    suite = _suite(args, labeled) if is_first and labeled.items else None
    answers, protocol = _answers(args, benchmark, selected)
    if not is_first:
        return 0
    answered = selected.keep(answers)
    _report_exclusions(args, benchmark, selected, answered)
    if not answered.items:
        raise DataError("all items were skipped; see the warnings above")
    if answered.labeled.items and suite is not None:
        verdicts = _verdicts(args, answered.labeled, answers)
        scores = score(answered.labeled, answers, suite, verdicts)
        _report(args, answered.labeled, answers, scores, protocol)
    return 0


def _suite(args: argparse.Namespace, labeled: Benchmark) -> Suite:
    """Return the metrics; called before answering, so that an unavailable one fails early."""
    from internvl_chat.metrics.suite import build_suite

    return build_suite(
        args.metrics,
        has_open=any(not item.choices for item in labeled.items),
        bertscore_model=args.bertscore_model,
        sts_model=args.sts_model,
        device=args.device,
    )


def _answers(
    args: argparse.Namespace, benchmark: Benchmark, selected: Benchmark
) -> tuple[dict[Key, Reply], str]:
    """Return all answers (none on ranks other than 0), and the protocol as shown in the report."""
    from internvl_chat.eval.answering import answer_benchmark
    from internvl_chat.eval.benchmarks.catalog import system_prompts
    from internvl_chat.eval.predictions import read_answers
    from internvl_chat.eval.protocol import are_published, find_published_prompts

    if args.predictions:
        known = (*benchmark.items, *benchmark.excluded)
        answers = read_answers(args.predictions, selected.items, known, args.tasks, args.protocol)
        warn_about_truncated(sum(answers[item.key].truncated for item in selected.items), None)
        return answers, args.protocol
    is_published, prompts = args.protocol == PUBLISHED_PROTOCOL, args.prompts
    if is_published and prompts is None:
        prompts = find_published_prompts(args.data)
        logger.info("system prompts: %s", prompts or "built in")
    system = system_prompts(benchmark, prompts)
    other_prompts = is_published and not are_published(system)
    if other_prompts:
        logger.warning(
            "the system prompts are not the published ones, so the results are not comparable with the "
            "paper's; pass the file task_config.py of the published benchmark with --prompts"
        )
    max_new_tokens = args.max_new_tokens or _MAX_NEW_TOKENS[args.protocol]
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
        protocol=args.protocol,
    )
    truncated = sum(answers[item.key].truncated for item in selected.items if item.key in answers)
    warn_about_truncated(truncated, max_new_tokens)
    return answers, f"{args.protocol}, other system prompts" if other_prompts else args.protocol


def _report_exclusions(
    args: argparse.Namespace, benchmark: Benchmark, selected: Benchmark, answered: Benchmark
) -> None:
    """Print how many items were skipped, and how many answers are not scored for lack of a reference."""
    skipped = len(benchmark.excluded) + len(selected.items) - len(answered.items)
    unlabeled = len(answered.items) - len(answered.labeled.items)
    file = f"{args.out}/predictions.jsonl" if args.out else args.predictions
    if args.json and (skipped or unlabeled):
        print_json({"skipped": skipped, "without_reference": unlabeled})
    if skipped:
        echo(f"{counted(skipped, 'item')} skipped; see the warnings above", stream=sys.stderr)
    if unlabeled:
        echo(f"{file}: {counted(unlabeled, 'answer')} not scored (no reference)", stream=sys.stderr)


def warn_about_truncated(count: int, limit: int | None) -> None:
    """Warn that `count` answers were cut off, unless it is 0."""
    if count:
        flag = "--max_new_tokens" if limit is None else f"--max_new_tokens {limit}"
        logger.warning("%s cut off at %s; raise it for complete answers", counted(count, "answer"), flag)


def _check_arguments(args: argparse.Namespace) -> None:
    from internvl_chat.eval.benchmarks.catalog import location_problem
    from internvl_chat.eval.judge import judge_problems
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
    problems += _protocol_problems(args) + judge_problems(args.judge, args.judge_model, args.out)
    if problems:
        raise UsageError(problems)


def _protocol_problems(args: argparse.Namespace) -> list[str]:
    """Return an error message for each option that contradicts the published protocol."""
    if args.protocol != PUBLISHED_PROTOCOL:
        return []
    fixed = {"max_dynamic_patch": args.max_dynamic_patch, **preprocessing_options(args)}
    problems = [
        f"--{name} has no effect with --protocol published, which fixes the preprocessing"
        for name, value in fixed.items()
        if value is not None
    ]
    if args.bench != "pmc-mi":
        problems.append("--protocol published requires --bench pmc-mi")
    return problems


def _verdicts(
    args: argparse.Namespace, labeled: Benchmark, answers: Mapping[Key, str]
) -> dict[Key, Verdict] | None:
    """Return the judge's verdict on each open answer, or None without a judge."""
    from internvl_chat.eval.judge import judge_answers

    if not args.judge:
        return None
    return judge_answers(
        labeled,
        answers,
        url=args.judge,
        model=args.judge_model,
        folder=args.out,
        progress=partial(progress, unit="verdict"),
    )


def _has_more_items(folder: Path, scores: Scores) -> bool:
    """Return whether the existing metrics in a folder cover more items than the new scores."""
    try:
        before = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        counts = [sum(int(task["items"] or 0) for task in tasks.values()) for tasks in (before, scores.tasks)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
    return counts[0] > counts[1]


def _report(
    args: argparse.Namespace, benchmark: Benchmark, answers: Mapping[Key, str], scores: Scores, protocol: str
) -> None:
    from internvl_chat.eval.report.files import PAGE, write_report
    from internvl_chat.eval.report.table import metric_tables, paper_tables

    source = Path(args.model or args.predictions)
    model = source.name or str(source)
    writes = args.out and not (args.model and _has_more_items(args.out, scores))
    if writes:
        shown = partial(progress, unit="image")
        write_report(args.out, benchmark, answers, scores, model=model, protocol=protocol, progress=shown)
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
        tables = [*paper_tables(scores.tasks, model, protocol), *tables]
    for header, rows in tables:
        print_table(header, [tuple(cell.replace("**", "") for cell in row) for row in rows])
        echo()
    if writes:
        echo(f"report: {args.out / PAGE}")

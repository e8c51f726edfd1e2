"""`m3llm eval --bench`: a model's answers to a benchmark, or answers made elsewhere, scored and reported."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_chat.commands.output import emit, print_table, progress, say
from internvl_chat.utils.errors import UsageError

if TYPE_CHECKING:
    from internvl_chat.eval.benchmarks.item import Benchmark, Key
    from internvl_chat.eval.scoring import Scores
    from internvl_chat.metrics.suite import Suite

# Longer than any right answer of the benchmarks, and long enough for a wordy one.
_MAX_NEW_TOKENS = 1024


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `eval` that only a benchmark has."""
    group = parser.add_argument_group("with --bench instead of META")
    group.add_argument(
        "--bench", help="pmc-mi, omnimedvqa, mmmu-med, vqa, or a folder in PMC-MI-Bench's format"
    )
    group.add_argument("--data", type=Path, help="where a named benchmark is: a folder; of vqa a JSONL file")
    group.add_argument("--out", type=Path, help="folder of the answers, figures and report")
    group.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="score these answers instead of asking a model: JSONL of task, index, prediction",
    )
    group.add_argument("--tasks", type=_names, help="only these tasks, comma-separated [all]")
    group.add_argument(
        "--metrics",
        type=_names,
        help="of bleu,rouge,overlap,cider,bertscore,sts,macro; what is named must be there "
        "[all that can be computed here]",
    )
    group.add_argument(
        "--bertscore_model", help="encoder of BERTScore, folder or hub id [microsoft/deberta-xlarge-mnli]"
    )
    group.add_argument("--sts_model", help="sentence encoder, folder or hub id [all-MiniLM-L6-v2]")
    group.add_argument("--prompts", type=Path, help="YAML or JSON: system text of each task [the package's]")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def run_benchmark(args: argparse.Namespace) -> int:
    """Answer a benchmark, or read answers to it, score them and report."""
    from internvl_chat.eval.benchmarks.catalog import open_benchmark, system_texts
    from internvl_chat.eval.predictions import read_answers
    from internvl_chat.eval.scoring import score
    from internvl_chat.inference.parallel import process_index

    _check(args)
    whole = open_benchmark(args.bench, args.data)
    unknown = [task for task in args.tasks or () if task not in whole.tasks]
    if unknown:
        raise UsageError(f"--tasks {','.join(unknown)}: {whole.name} has {', '.join(whole.tasks)}")
    benchmark = whole.select(args.tasks, args.limit)
    system = system_texts(whole, args.prompts)
    suite = _suite(args, benchmark) if process_index() == 0 else None
    if args.predictions:
        answers = read_answers(args.predictions, benchmark.items, whole.items)
    else:
        answers = _answer(args, whole, benchmark, system)
    if suite is None:
        return 0
    scores = score(benchmark, answers, suite)
    _report(args, benchmark, answers, scores)
    return 0


def _check(args: argparse.Namespace) -> None:
    from internvl_chat.eval.predictions import SETTINGS
    from internvl_chat.metrics.suite import FAMILIES

    problems = []
    if args.meta:
        problems.append(f"META {args.meta} and --bench {args.bench}: give one of them")
    if args.require_above_chance is not None:
        problems.append("--require-above-chance goes with META, not with --bench")
    if bool(args.model) == bool(args.predictions):
        problems.append("give --model, whose answers are evaluated, or --predictions, answers made elsewhere")
    if args.model and not args.out:
        problems.append("--out DIR is needed, where the answers go")
    if args.predictions and args.out and (args.out / SETTINGS).exists():
        problems.append(f"--out {args.out}: holds the answers of another evaluation; choose another")
    unknown = [name for name in args.metrics or () if name not in FAMILIES]
    if unknown:
        problems.append(f"--metrics {','.join(unknown)}: known are {', '.join(FAMILIES)}")
    if problems:
        raise UsageError(problems)


def _suite(args: argparse.Namespace, benchmark: Benchmark) -> Suite:
    from internvl_chat.metrics.suite import build_suite

    return build_suite(
        args.metrics,
        has_open=any(not item.choices for item in benchmark.items),
        bertscore_model=args.bertscore_model,
        sts_model=args.sts_model,
        device=args.device,
    )


def _answer(
    args: argparse.Namespace, whole: Benchmark, benchmark: Benchmark, system: Mapping[str, str | None]
) -> Mapping[Key, str]:
    """Answer what is not yet answered, with the other processes of torchrun; returns all answers."""
    from internvl_chat.eval.answering import answer_items, own_items, settings_of
    from internvl_chat.eval.predictions import PredictionLog, bring_together
    from internvl_chat.eval.processes import wait_for_all
    from internvl_chat.inference.engine import Engine
    from internvl_chat.inference.parallel import process_index
    from internvl_chat.model.io.folders import model_folder

    length = args.max_new_tokens or _MAX_NEW_TOKENS
    folder = model_folder(args.model).resolve()
    settings = settings_of(
        whole, system, folder, max_new_tokens=length, max_dynamic_patch=args.max_dynamic_patch
    )
    with PredictionLog(args.out, settings, process_index()) as log:
        items = own_items(benchmark.items, log)
        if items:
            engine = Engine.from_checkpoint(
                folder,
                device=args.device,
                base=args.base,
                max_dynamic_patch=args.max_dynamic_patch,
            )
            answered = answer_items(engine, items, system, log, max_new_tokens=length)
            shown = progress(answered, total=len(items), unit="item") if process_index() == 0 else answered
            for _ in shown:
                pass
    wait_for_all()
    return bring_together(args.out, whole.items) if process_index() == 0 else {}


def _report(
    args: argparse.Namespace, benchmark: Benchmark, answers: Mapping[Key, str], scores: Scores
) -> None:
    from internvl_chat.eval.report.files import PAGE, write_report
    from internvl_chat.eval.report.table import all_figures, paper_layout

    source = Path(args.model or args.predictions)
    model = source.name or str(source)
    if args.out:
        write_report(args.out, benchmark, answers, scores, model=model)
    if args.json:
        for task, figures in scores.tasks.items():
            emit({"task": task, **figures})
        return
    tables = all_figures(scores.tasks)
    if benchmark.name == "pmc-mi":
        tables = [*paper_layout(scores.tasks, model), *tables]
    for header, rows in tables:
        print_table(header, [tuple(cell.strip("*") for cell in row) for row in rows])
        say()
    if args.out:
        say(f"{args.out / PAGE}: every item with its figures, answer and scores")

"""`m3llm eval`: evaluate a model on a benchmark, or with exact match on the records of a meta file."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from internvl_chat.commands import benchmark
from internvl_chat.commands.common import (
    add_data_arguments,
    add_model_arguments,
    count_records,
    load_preprocessing,
    log_warnings,
    open_sets,
    positive,
)
from internvl_chat.commands.output import echo, print_json, print_table, progress
from internvl_chat.data.sources.skip_policy import POLICIES
from internvl_chat.utils.errors import DataError, ModelError, UsageError

_MAX_NEW_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `eval`."""
    add = parser.add_argument
    add_data_arguments(parser, required=False)
    add_model_arguments(parser)
    add("--max_new_tokens", type=positive, metavar="N",
        help="maximum tokens per answer (default: 128 with META, 1024 with --bench, 512 with --protocol "
        "published)")  # fmt: skip
    add("--batch_size", type=positive, metavar="N", default=8,
        help="questions per batch with META (default: 8)")  # fmt: skip
    add("--on_bad_record", choices=POLICIES, default="fail",
        help="fail: stop at an unusable record or item; skip: log and exclude it "
        "(default: fail)")  # fmt: skip
    add("--require-above-chance", type=float, metavar="P",
        help="fail unless closed questions are answered better than by chance at significance "
        "level P")  # fmt: skip
    benchmark.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate a model or existing answers, on a benchmark or on a meta file."""
    if args.bench:
        return benchmark.run(args)
    if not args.meta:
        raise UsageError("META (a meta file) or --bench (a benchmark) is required")
    if not args.model:
        raise UsageError("--model is required with META")
    given = [f"--{name} requires --bench" for name in benchmark.ARGUMENTS if getattr(args, name) is not None]
    if given:
        raise UsageError(given)
    return _run_exact_match(args)


def _run_exact_match(args: argparse.Namespace) -> int:
    """Print the exact match of each dataset, and test whether closed questions are answered above chance."""
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
    benchmark.warn_about_truncated(sum(answer.truncated for answer in answers), max_new_tokens)
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

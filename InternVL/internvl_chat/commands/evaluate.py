"""`m3llm loss` and `m3llm eval`."""

import argparse
import dataclasses
from collections import defaultdict

from internvl_chat.commands.benchmark import add_benchmark_arguments, run_benchmark
from internvl_chat.commands.common import add_data_arguments, add_model_arguments, count, open_sets, positive
from internvl_chat.commands.output import emit, print_table, progress, say
from internvl_chat.utils.errors import ModelError, UsageError

_MAX_NEW_TOKENS = 128


def add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `loss`."""
    add_data_arguments(parser)
    add_model_arguments(parser)


def loss(args: argparse.Namespace) -> int:
    """Print the loss of each record, each data set, and all."""
    from internvl_chat.eval.losses import losses
    from internvl_chat.inference.engine import Engine

    sets, _, preprocessing = open_sets(args)
    engine = Engine.from_checkpoint(args.model, device=args.device, base=args.base)
    found: dict[str, list[float]] = defaultdict(list)
    rows = losses(engine.model, sets, preprocessing.normalize_type, args.limit)
    for row in progress(rows, total=count(sets, args.limit)):
        found[row.dataset].append(row.loss)
        if args.json:
            emit(dataclasses.asdict(row))
    everything = [value for values in found.values() for value in values]
    summary = [*found.items(), ("all", everything)]
    if args.json:
        for name, values in summary:
            emit({"dataset": name, "records": len(values), "loss": sum(values) / len(values)})
    else:
        print_table(
            ("data set", "records", "loss"),
            [(name, len(values), f"{sum(values) / len(values):.4f}") for name, values in summary],
        )
    return 0


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `eval`."""
    add_data_arguments(parser, required=False)
    add_model_arguments(parser)
    parser.add_argument(
        "--max_new_tokens", type=positive, help="most tokens of an answer [128; of a benchmark 1024]"
    )
    parser.add_argument("--batch_size", type=positive, default=8, help="questions answered at once [8]")
    parser.add_argument(
        "--require-above-chance", type=float, metavar="P",
        help="fail unless the closed questions are answered better than chance at this level, e.g. 0.01",
    )  # fmt: skip
    add_benchmark_arguments(parser)


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate a model on a benchmark, or by exact match on the records of a meta file."""
    if args.bench:
        return run_benchmark(args)
    if not args.meta:
        raise UsageError("give META, the meta file of records to be answered, or --bench, a benchmark")
    if not args.model:
        raise UsageError("--model is needed, whose answers are evaluated")
    only = ("data", "out", "predictions", "tasks", "metrics", "bertscore_model", "sts_model", "prompts")
    given = [f"--{name} goes with --bench" for name in only if getattr(args, name) is not None]
    if given:
        raise UsageError(given)
    return exact_match(args)


def exact_match(args: argparse.Namespace) -> int:
    """Print the share of exact matches by data set, and how the closed questions compare with chance."""
    from internvl_chat.eval.exact_match import Answer, answer_records, beats_chance
    from internvl_chat.inference.engine import Engine

    sets, _, _ = open_sets(args)
    engine = Engine.from_checkpoint(args.model, device=args.device, base=args.base)
    answers: list[Answer] = []
    length = args.max_new_tokens or _MAX_NEW_TOKENS
    iterator = answer_records(
        engine, sets, limit=args.limit, max_new_tokens=length, batch_size=args.batch_size
    )
    for answer in progress(iterator, total=count(sets, args.limit)):
        answers.append(answer)
        if args.json:
            emit(dataclasses.asdict(answer) | {"correct": answer.correct})
    rows = []
    for name in [records.spec.name for records in sets]:
        of_set = [answer for answer in answers if answer.dataset == name]
        closed = [answer for answer in of_set if answer.choices]
        rows.append((name, len(of_set), _share(of_set), len(closed), _share(closed)))
    test = beats_chance(answers)
    if args.json:
        keys = ("dataset", "records", "exact_match", "closed", "closed_accuracy")
        for row in rows:
            emit(dict(zip(keys, row, strict=True)))
        emit({"dataset": "closed questions", **(dataclasses.asdict(test) if test else {"questions": 0})})
    else:
        shown = [(n, r, _percent(m), c, _percent(a)) for n, r, m, c, a in rows]
        print_table(("data set", "records", "exact match", "closed", "closed accuracy"), shown)
        if test:
            say(f"closed questions: {test.correct} of {test.questions} right, by chance "
                f"{test.chance * test.questions:.1f} (binomial test p = {test.p_value:.2g})")  # fmt: skip
    if args.require_above_chance is None:
        return 0
    if test is None or test.p_value >= args.require_above_chance:
        raise ModelError(
            f"{args.model}: the closed questions are not answered better than chance "
            f"(p >= {args.require_above_chance})"
        )
    return 0


def _share(answers: list) -> float | None:
    return sum(answer.correct for answer in answers) / len(answers) if answers else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"

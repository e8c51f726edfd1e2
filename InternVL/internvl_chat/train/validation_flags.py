"""What must hold of the flags of validation before a run begins."""

import difflib
from collections.abc import Sequence
from importlib.util import find_spec

from internvl_chat.data.meta import DatasetSpec
from internvl_chat.train.arguments import Arguments, RunArguments
from internvl_chat.train.validation import metric_names
from internvl_chat.utils.errors import UsageError


def check_validation(args: Arguments, sets: Sequence[DatasetSpec] | None) -> None:
    """Check the flags of validation.

    Args:
        args: the command line.
        sets: the held-out data sets; None if they cannot be read, which is told elsewhere.

    Raises:
        UsageError: lists every problem.
    """
    run = args.run
    if run.eval_strategy == "no":
        problems = [
            f"--{flag} {value}: there is no validation without --eval_strategy steps (or epoch)"
            for flag, value in _given(args).items()
        ]
    else:
        problems = _problems(run, sets)
        if args.data.eval_meta_path is None:
            problems.append(f"--eval_strategy {run.eval_strategy.value} needs --eval_meta_path")
    if problems:
        raise UsageError(problems)


def _given(args: Arguments) -> dict[str, object]:
    """Return the flags that mean nothing without validation, as far as they are given."""
    run = args.run
    values = {
        "eval_meta_path": args.data.eval_meta_path,
        "eval_generate": run.eval_generate,
        "early_stopping_patience": run.early_stopping_patience,
        "load_best_model_at_end": run.ends_with_best,
        "do_eval": run.do_eval,
        "save_strategy": "best" if run.save_strategy == "best" else None,
    }
    found = {flag: value for flag, value in values.items() if value}
    # With some of the others it is set by itself.
    if not found and run.metric_for_best_model:
        found["metric_for_best_model"] = run.metric_for_best_model
    return found


def _problems(run: RunArguments, sets: Sequence[DatasetSpec] | None) -> list[str]:
    problems = [
        f"--{flag} {value} must be at least 0"
        for flag, value in (
            ("eval_generate", run.eval_generate),
            ("early_stopping_patience", run.early_stopping_patience),
        )
        if value < 0
    ]
    if run.eval_generate > 0:
        zero3 = run.deepspeed and run.hf_deepspeed_config.is_zero3()
        if run.sharded or zero3:
            how = "--fsdp" if run.sharded else "ZeRO-3"
            problems.append(
                f"--eval_generate {run.eval_generate}: with {how} no process has all weights, and answers "
                "differ in length; leave it out, or spread less"
            )
        if find_spec("rouge") is None:
            problems.append(
                f"--eval_generate {run.eval_generate}: the package rouge is not installed (pip install rouge)"
            )
    if run.metric_for_best_model and sets is not None:
        problems += _metric_problem(run, [spec.name for spec in sets])
    return problems


def _metric_problem(run: RunArguments, sets: Sequence[str]) -> list[str]:
    """Say what is wrong with the figure that is to choose the best model; empty if nothing is."""
    known, of_answers = (metric_names(sets, generate=generate) for generate in (False, True))
    wanted = f"eval_{run.metric_for_best_model.removeprefix('eval_')}"
    if wanted in (of_answers if run.eval_generate > 0 else known):
        return []
    near = difflib.get_close_matches(wanted, of_answers, n=1)
    if wanted in of_answers:
        advice = "it needs --eval_generate"
    else:
        advice = f"did you mean {near[0]}?" if near else f"use one of {', '.join(of_answers)}"
    return [f"--metric_for_best_model {run.metric_for_best_model}: not measured; {advice}"]

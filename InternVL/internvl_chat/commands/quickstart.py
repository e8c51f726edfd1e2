"""Last step of quickstart.sh: print the results and check that training had an effect."""

import json
import sys
from pathlib import Path
from typing import Any

from internvl_chat.commands.output import echo, print_table

MAX_LOSS_RATIO = 0.5
SIGNIFICANCE = 0.01


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def first_and_last_loss(metrics: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the mean loss over the first and over the last tenth of the steps."""
    tenth = max(1, len(metrics) // 10)
    first, last = metrics[:tenth], metrics[-tenth:]
    return sum(r["loss"] for r in first) / len(first), sum(r["loss"] for r in last) / len(last)


def failures(work: Path) -> list[str]:
    """Return the results of a quickstart folder that miss their target."""
    problems = []
    first, last = first_and_last_loss(read_jsonl(work / "full/metrics.jsonl"))
    if not last <= MAX_LOSS_RATIO * first:
        problems.append(f"the training loss fell from {first:.3f} to {last:.3f} only, not by half")
    test = read_jsonl(work / "answers.jsonl")[-1]
    if not test.get("questions") or not test["p_value"] < SIGNIFICANCE:
        problems.append(f"accuracy on closed questions is not above chance: {test}")
    return problems


def report(work: Path) -> None:
    """Print the results and the paths of all outputs."""
    losses = {
        when: {r["dataset"]: r["loss"] for r in read_jsonl(work / f"loss_{when}.jsonl") if "records" in r}
        for when in ("before", "after")
    }
    *rows, test = read_jsonl(work / "answers.jsonl")
    table = [
        (
            row["dataset"],
            row["records"],
            f"{losses['before'][row['dataset']]:.3f}",
            f"{losses['after'][row['dataset']]:.3f}",
            f"{row['exact_match']:.0%}",
            row["closed"],
            f"{row['closed_accuracy']:.0%}" if row["closed"] else "-",
        )
        for row in rows
        if "exact_match" in row
    ]
    header = ("held-out set", "records", "loss before", "after", "exact match", "closed", "closed accuracy")
    print_table(header, table)
    for run in ("full", "lora"):
        first, last = first_and_last_loss(read_jsonl(work / run / "metrics.jsonl"))
        echo(f"training loss, {run:<5} {first:.3f} -> {last:.3f}")
    echo(
        f"closed questions    {test['correct']} of {test['questions']} correct; chance level "
        f"{test['chance'] * test['questions']:.1f} (binomial test, p = {test['p_value']:.1g})"
    )
    for name, path in (
        ("data", "data"),
        ("full model", "full"),
        ("adapters", "lora"),
        ("merged model", "merged"),
        ("loss curve", "full/loss.png"),
        ("answers", "answers.jsonl"),
    ):
        echo(f"{name:<14} {work / path}")


def main() -> int:
    """Report on the folder given on the command line; returns 1 if a result misses its target."""
    work = Path(sys.argv[1])
    report(work)
    problems = failures(work)
    for problem in problems:
        echo(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

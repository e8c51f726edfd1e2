"""The last step of quickstart.sh: print the results, and check that training had an effect."""

import json
import sys
from pathlib import Path
from typing import Any

from internvl_chat.commands.output import print_table, say

LOSS_MUST_FALL_TO = 0.5
SIGNIFICANCE = 0.01


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def loss_at_ends(metrics: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the mean loss of the first and of the last tenth of a run's steps."""
    tenth = max(1, len(metrics) // 10)
    first, last = metrics[:tenth], metrics[-tenth:]
    return sum(r["loss"] for r in first) / len(first), sum(r["loss"] for r in last) / len(last)


def shortcomings(work: Path) -> list[str]:
    """Return the results of a quickstart folder that are too bad; empty if all is well."""
    found = []
    first, last = loss_at_ends(read_jsonl(work / "full/metrics.jsonl"))
    if not last <= LOSS_MUST_FALL_TO * first:
        found.append(f"the training loss fell only from {first:.3f} to {last:.3f}, not by half")
    test = read_jsonl(work / "answers.jsonl")[-1]
    if not test.get("questions") or not test["p_value"] < SIGNIFICANCE:
        found.append(f"the closed questions are answered no better than by chance: {test}")
    return found


def report(work: Path) -> None:
    """Print the tables and the paths."""
    losses = {
        when: {r["dataset"]: r["loss"] for r in read_jsonl(work / f"loss_{when}.jsonl") if "records" in r}
        for when in ("before", "after")
    }
    answers = {r["dataset"]: r for r in read_jsonl(work / "answers.jsonl") if "exact_match" in r}
    rows = []
    for name, row in answers.items():
        closed = f"{row['closed_accuracy']:.0%}" if row["closed"] else "-"
        rows.append(
            (
                name,
                row["records"],
                f"{losses['before'][name]:.3f}",
                f"{losses['after'][name]:.3f}",
                f"{row['exact_match']:.0%}",
                row["closed"],
                closed,
            )
        )
    header = ("held-out set", "records", "loss before", "after", "exact match", "closed", "closed right")
    print_table(header, rows)
    test = read_jsonl(work / "answers.jsonl")[-1]
    for run in ("full", "lora"):
        first, last = loss_at_ends(read_jsonl(work / run / "metrics.jsonl"))
        say(f"training loss, {run:<5} {first:.3f} -> {last:.3f}")
    say(
        f"closed questions    {test['correct']} of {test['questions']} right; guessing gets "
        f"{test['chance'] * test['questions']:.1f} (binomial test, p = {test['p_value']:.1g})"
    )
    for what, path in (
        ("data", "data"),
        ("full model", "full"),
        ("adapters", "lora"),
        ("merged model", "merged"),
        ("loss curve", "full/loss.png"),
        ("answers", "answers.jsonl"),
    ):
        say(f"{what:<14} {work / path}")


def main() -> int:
    """Report on the folder given on the command line; returns 1 if a result is too bad."""
    work = Path(sys.argv[1])
    report(work)
    problems = shortcomings(work)
    for problem in problems:
        say(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

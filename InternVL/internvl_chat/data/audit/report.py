"""Write the report of an audit: `problems.jsonl`, a plot of the lengths, and a self-contained HTML page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_chat.data.audit.checks import Audit
from internvl_chat.data.audit.length_plot import plot_lengths
from internvl_chat.data.audit.page import report_page
from internvl_chat.data.audit.statistics import severity
from internvl_chat.data.sources.problems import Problem
from internvl_chat.utils.files import write_json_lines

PROBLEMS = "problems.jsonl"
PLOT = "lengths.png"
PAGE = "report.html"


def write_report(
    folder: Path, audit: Audit, leaks: Sequence[Problem] = (), *, inputs: Mapping[str, str] | None = None
) -> Path:
    """Write `problems.jsonl`, the plot and the HTML page to a folder; return the path to the page.

    Args:
        folder: created if missing; an earlier report in it is overwritten.
        audit: the findings.
        leaks: overlaps between training data and benchmarks.
        inputs: text that describes what was checked and how, keyed by label (such as `model` and `command`);
            shown at the top of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    problems = [*audit.problems, *leaks]
    write_json_lines(folder / PROBLEMS, map(_problem_row, problems))
    plot_lengths(audit, folder / PLOT)
    page = folder / PAGE
    text = report_page(audit, problems, (folder / PLOT).read_bytes(), inputs or {}, PROBLEMS)
    # Escape lone surrogates, which occur in file names that are not UTF-8.
    page.write_text(text, encoding="utf-8", errors="backslashreplace")
    return page


def _problem_row(problem: Problem) -> dict[str, Any]:
    return {
        "file": str(problem.file),
        "line": problem.line,
        "dataset": problem.dataset,
        "id": problem.id,
        "kind": problem.kind,
        "severity": severity(problem.kind),
        "message": problem.message,
    }

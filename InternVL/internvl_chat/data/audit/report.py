"""Report of an audit: `problems.jsonl`, a plot of the lengths, and a self-contained HTML page."""

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internvl_chat.data.audit.checks import Audit, SetAudit
from internvl_chat.data.audit.length_plot import plot_lengths
from internvl_chat.data.sources.problems import KINDS, LEAKS, WARNINGS, Problem
from internvl_chat.utils.files import write_json_lines
from internvl_chat.utils.html import html_image, html_page, html_table

PROBLEMS = "problems.jsonl"
PLOT = "lengths.png"
PAGE = "report.html"

SET_HEADER = (
    "dataset", "records", "usable", "tiles", "tokens 5 %", "50 %", "95 %", "max", "supervised", "errors",
    "warnings",
)  # fmt: skip
_MAX_SHOWN = 100
_STYLE = """
.error, .leak { color: #a11; } .warning { color: #850; }
"""


def set_statistics(findings: SetAudit, *, with_tokens: bool) -> dict[str, Any]:
    """Return the statistics of a dataset by their JSON keys; None if unknown."""
    tokens, kinds = findings.lengths.tokens, findings.kinds
    percentiles: list[int | None] = [None] * 4
    if with_tokens and len(tokens):
        percentiles = [round(float(p)) for p in np.percentile(tokens, [5, 50, 95, 100])]
    return {
        "dataset": findings.spec.name,
        "file": str(findings.spec.annotation),
        "records": findings.records,
        "used": findings.used,
        "usable": findings.usable,
        "tiles": int(findings.lengths.tiles.sum()),
        "tokens": int(tokens.sum()) if with_tokens else None,
        "tokens_5": percentiles[0],
        "tokens_50": percentiles[1],
        "tokens_95": percentiles[2],
        "tokens_most": percentiles[3],
        "supervised": int(findings.lengths.supervised.sum()) if with_tokens else None,
        "errors": sum(count for kind, count in kinds.items() if kind not in WARNINGS),
        "warnings": sum(count for kind, count in kinds.items() if kind in WARNINGS),
        "problems": dict(sorted(kinds.items())),
    }


def set_rows(audit: Audit) -> list[tuple[Any, ...]]:
    """Return the table rows for `SET_HEADER`."""
    columns = (
        "dataset", "records", "usable", "tiles", "tokens_5", "tokens_50", "tokens_95", "tokens_most",
        "supervised", "errors", "warnings",
    )  # fmt: skip
    rows = []
    for findings in audit.sets:
        statistics = set_statistics(findings, with_tokens=audit.max_seq_length is not None)
        cells = [statistics[name] for name in columns]
        rows.append(tuple("-" if c is None else f"{c:,}" if isinstance(c, int) else c for c in cells))
    return rows


def group_by_kind(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    """Group problems by kind, errors first, in the order of `KINDS`."""
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.kind, []).append(problem)
    order = [kind for kind in KINDS if kind not in WARNINGS] + list(WARNINGS)
    return {kind: groups[kind] for kind in order if kind in groups}


def severity(kind: str) -> str:
    """Return `error`, `warning` or `leak`."""
    return "warning" if kind in WARNINGS else "leak" if kind in LEAKS else "error"


def write_report(folder: Path, audit: Audit, leaks: Sequence[Problem] = ()) -> Path:
    """Write `problems.jsonl`, the plot and the HTML page into a folder; return the page.

    Args:
        folder: created if missing; an earlier report in it is overwritten.
        audit: the findings.
        leaks: overlaps between training data and benchmarks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    problems = [*audit.problems, *leaks]
    write_json_lines(folder / PROBLEMS, map(_problem_row, problems))
    plot_lengths(audit, folder / PLOT)
    page = folder / PAGE
    page.write_text(_page(audit, problems, (folder / PLOT).read_bytes()), encoding="utf-8")
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


def _page(audit: Audit, problems: Sequence[Problem], plot: bytes) -> str:
    groups = group_by_kind(problems)
    parts = [
        f"<p>{html.escape(summary(audit, problems))}</p>",
        html_table(SET_HEADER, set_rows(audit)),
        f"<p>{html_image(plot, 'png', 'Histograms of the record lengths')}</p>",
    ]
    if groups:
        rows = [(kind, severity(kind), f"{len(group):,}", KINDS[kind]) for kind, group in groups.items()]
        parts += ["<h2>Problems by kind</h2>", html_table(("kind", "severity", "count", "meaning"), rows)]
    for kind, group in groups.items():
        rows = [
            (p.dataset, p.file.name, "" if p.line is None else f"{p.line:,}", p.id or "", p.message)
            for p in group[:_MAX_SHOWN]
        ]
        more = len(group) - len(rows)
        rest = f"<p>and {more:,} more; {PROBLEMS} lists all</p>" if more else ""
        parts.append(
            f"<details><summary class='{severity(kind)}'>{html.escape(kind)}: {len(group):,}</summary>"
            f"{html_table(('dataset', 'file', 'line', 'id', 'message'), rows)}{rest}</details>"
        )
    return html_page("Data check", parts, _STYLE)


def summary(audit: Audit, problems: Sequence[Problem]) -> str:
    """Summarise the findings in a few sentences."""
    used, usable = (sum(getattr(findings, name) for findings in audit.sets) for name in ("used", "usable"))
    counts = Counter(severity(problem.kind) for problem in problems)
    images = "decoded" if audit.decoded else "opened, and decoded if the end of the file looks damaged"
    text = f"{usable:,} of {used:,} records can be used; {counts['error']:,} errors, "
    text += f"{counts['warning']:,} warnings, {counts['leak']:,} leaks. Images were {images}."
    if audit.max_seq_length is None:
        return f"{text} Tokens were not counted: pass the model's tokenizer with --model."
    return f"{text} The limit is {audit.max_seq_length:,} tokens per record."

"""What an audit leaves behind: tables, `problems.jsonl`, a plot of the lengths, and one HTML page."""

import html
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internvl_chat.data.audit.checks import Audit, SetAudit
from internvl_chat.data.audit.length_plot import plot_lengths
from internvl_chat.data.sources.problems import KINDS, LEAKS, WARNINGS, Problem
from internvl_chat.utils.html import html_image, html_page, html_table

PROBLEMS = "problems.jsonl"
PLOT = "lengths.png"
PAGE = "report.html"

SET_HEADER = (
    "data set", "records", "usable", "tiles", "tokens 5 %", "50 %", "95 %", "most", "supervised", "errors",
    "warnings",
)  # fmt: skip
_SHOWN_OF_A_KIND = 100
_STYLE = """
.error, .leak { color: #a11; } .warning { color: #850; }
"""


def set_figures(one: SetAudit, *, with_tokens: bool) -> dict[str, Any]:
    """Return a data set's figures under the names that programs read; None for what is not known."""
    tokens, kinds = one.lengths.tokens, one.kinds
    percentiles: list[int | None] = [None] * 4
    if with_tokens and len(tokens):
        percentiles = [round(float(p)) for p in np.percentile(tokens, [5, 50, 95, 100])]
    return {
        "dataset": one.spec.name,
        "file": str(one.spec.annotation),
        "records": one.records,
        "used": one.used,
        "usable": one.usable,
        "tiles": int(one.lengths.tiles.sum()),
        "tokens": int(tokens.sum()) if with_tokens else None,
        "tokens_5": percentiles[0],
        "tokens_50": percentiles[1],
        "tokens_95": percentiles[2],
        "tokens_most": percentiles[3],
        "supervised": int(one.lengths.supervised.sum()) if with_tokens else None,
        "errors": sum(count for kind, count in kinds.items() if kind not in WARNINGS),
        "warnings": sum(count for kind, count in kinds.items() if kind in WARNINGS),
        "problems": dict(sorted(kinds.items())),
    }


def set_rows(audit: Audit) -> list[tuple[Any, ...]]:
    """Return the rows under `SET_HEADER`."""
    columns = (
        "dataset", "records", "usable", "tiles", "tokens_5", "tokens_50", "tokens_95", "tokens_most",
        "supervised", "errors", "warnings",
    )  # fmt: skip
    rows = []
    for one in audit.sets:
        figures = set_figures(one, with_tokens=audit.max_seq_length is not None)
        cells = [figures[name] for name in columns]
        rows.append(tuple("-" if c is None else f"{c:,}" if isinstance(c, int) else c for c in cells))
    return rows


def group_by_kind(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    """Return the problems of each kind, errors first, in the order of `KINDS`."""
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.kind, []).append(problem)
    order = [kind for kind in KINDS if kind not in WARNINGS] + list(WARNINGS)
    return {kind: groups[kind] for kind in order if kind in groups}


def severity(kind: str) -> str:
    """Return `error`, `warning` or `leak`."""
    return "warning" if kind in WARNINGS else "leak" if kind in LEAKS else "error"


def write_report(folder: Path, audit: Audit, leaks: Sequence[Problem] = ()) -> Path:
    """Write `problems.jsonl`, the plot and the page into a folder, which is made; returns the page.

    Args:
        folder: what an earlier report left there is replaced.
        audit: the findings.
        leaks: what training and benchmarks have in common.
    """
    folder.mkdir(parents=True, exist_ok=True)
    problems = [*audit.problems, *leaks]
    with (folder / PROBLEMS).open("w", encoding="utf-8") as stream:
        stream.writelines(_problem_line(problem) for problem in problems)
    plot_lengths(audit, folder / PLOT)
    page = folder / PAGE
    page.write_text(_page(audit, problems, (folder / PLOT).read_bytes()), encoding="utf-8")
    return page


def _problem_line(problem: Problem) -> str:
    row = {
        "file": str(problem.file),
        "line": problem.line,
        "dataset": problem.dataset,
        "id": problem.id,
        "kind": problem.kind,
        "severity": severity(problem.kind),
        "message": problem.message,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _page(audit: Audit, problems: Sequence[Problem], plot: bytes) -> str:
    """Return the report as one HTML page that needs nothing else."""
    groups = group_by_kind(problems)
    parts = [
        f"<p>{html.escape(summary(audit, problems))}</p>",
        html_table(SET_HEADER, set_rows(audit)),
        f"<p>{html_image(plot, 'png', 'How long the records are')}</p>",
    ]
    if groups:
        rows = [(kind, severity(kind), f"{len(found):,}", KINDS[kind]) for kind, found in groups.items()]
        parts += ["<h2>Problems by kind</h2>", html_table(("kind", "", "number", "what it means"), rows)]
    for kind, found in groups.items():
        rows = [
            (p.dataset, p.file.name, "" if p.line is None else f"{p.line:,}", p.id or "", p.message)
            for p in found[:_SHOWN_OF_A_KIND]
        ]
        more = len(found) - len(rows)
        rest = f"<p>and {more:,} more, all of them in {PROBLEMS}</p>" if more else ""
        parts.append(
            f"<details><summary class='{severity(kind)}'>{html.escape(kind)}: {len(found):,}</summary>"
            f"{html_table(('data set', 'file', 'line', 'id', 'message'), rows)}{rest}</details>"
        )
    return html_page("Data check", parts, _STYLE)


def summary(audit: Audit, problems: Sequence[Problem]) -> str:
    """Return the outcome in a sentence or two."""
    used, usable = (sum(getattr(one, name) for one in audit.sets) for name in ("used", "usable"))
    counts = Counter(severity(problem.kind) for problem in problems)
    looked = "decoded" if audit.decoded else "opened, and decoded where a file does not end as it should"
    text = f"{usable:,} of {used:,} records can be used; {counts['error']:,} errors, "
    text += f"{counts['warning']:,} warnings, {counts['leak']:,} leaks. Images were {looked}."
    if audit.max_seq_length is None:
        return f"{text} Tokens were not counted: that takes the model's tokenizer (--model)."
    return f"{text} Records were held against {audit.max_seq_length:,} tokens."

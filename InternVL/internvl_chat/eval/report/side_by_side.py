"""HTML page that compares several models: significance tests, and the answers to every item side by side."""

import html
from collections.abc import Mapping, Sequence

from internvl_chat.eval.compare import Comparison
from internvl_chat.eval.report.items import Evaluation, items_page
from internvl_chat.eval.report.table import LABELS
from internvl_chat.eval.significance import RESAMPLES, SEED

HEADER = (
    "task", "metric", "items", "model", "baseline", "score", "difference", "95% CI", "p", "p (Holm)", "test",
)  # fmt: skip
# Columns in the page: the interval is also drawn, and the tests are described in the text below.
_SHOWN = (*HEADER[:8], "", *HEADER[8:-1])
SIGNIFICANCE = 0.05


def method_note(comparisons: Sequence[Comparison]) -> str:
    """Return a note on the statistical methods of a comparison."""
    return (
        "Scores and differences in percent. Confidence intervals: percentile bootstrap over items "
        f"({RESAMPLES:,} resamples, seed {SEED}), not corrected for multiple comparisons. p: exact McNemar "
        "test if all scores are 0 or 1, otherwise from the bootstrap; two-sided. "
        f"p (Holm): corrected for all {len(comparisons)} comparisons of this table."
    )


def comparison_row(row: Comparison) -> tuple[str, ...]:
    """Return a comparison as table cells, see `HEADER`."""
    difference = row.difference
    interval = "-"
    if difference.low is not None and difference.high is not None:
        interval = f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    return (
        row.task, LABELS[row.metric], f"{row.items:,}", row.model, f"{100 * row.baseline_score:.1f}",
        f"{100 * row.score:.1f}", f"{100 * difference.mean:+.1f}", interval, _p_value(difference.p_value),
        _p_value(row.p_holm), difference.test,
    )  # fmt: skip


def _p_value(value: float) -> str:
    return "<0.0001" if value < 1e-4 else f"{value:.4f}"


def side_by_side_page(
    evaluations: Sequence[Evaluation], comparisons: Sequence[Comparison], images: Mapping[str, str]
) -> str:
    """Return the HTML page.

    Args:
        evaluations: the evaluations, with the same items; the first is the baseline.
        comparisons: the significance tests.
        images: id -> data URL of the images of the first evaluation.
    """
    first = evaluations[0]
    names = [evaluation.model for evaluation in evaluations]
    protocols = ", ".join(dict.fromkeys(evaluation.protocol for evaluation in evaluations))
    lead = f"Baseline: {first.model}. {len(first.items):,} items. Protocol: {protocols}."
    colored = f"Colored: significant (p (Holm) below {SIGNIFICANCE})."
    parts = [
        "<h2>Differences</h2>",
        _table(comparisons),
        f"<p class='lead'>{method_note(comparisons)} {colored}</p>",
    ]
    return items_page(f"{first.benchmark}: {' / '.join(names)}", lead, parts, evaluations, images)


def _table(comparisons: Sequence[Comparison]) -> str:
    head = "".join(f"<th class='{_alignment(name)}'>{html.escape(name)}</th>" for name in _SHOWN)
    ends = [abs(end) for row in comparisons for end in (row.difference.low, row.difference.high) if end]
    rows = "".join(_table_row(row, max(ends, default=1.0)) for row in comparisons)
    table = f"<table class='differences'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<div class='table' tabindex='0'>{table}</div>"


def _table_row(row: Comparison, scale: float) -> str:
    """Return a row with a drawing of the confidence interval; `scale` is the end of its axis."""
    kind = ""
    if row.p_holm < SIGNIFICANCE:
        kind = "better" if row.difference.mean > 0 else "worse"
    cells = dict(zip(HEADER, map(html.escape, comparison_row(row)), strict=True)) | {
        "": _interval(row, scale)
    }
    styles = {name: _alignment(name) for name in _SHOWN}
    for name in ("difference", ""):
        styles[name] = f"{styles[name]} {kind}".strip()
    shown = "".join(f"<td class='{style}'>{cells[name]}</td>" for name, style in styles.items())
    return f"<tr>{shown}</tr>"


def _alignment(column: str) -> str:
    return "" if column in ("task", "metric", "model", "test", "") else "n"


def _interval(row: Comparison, scale: float) -> str:
    """Return an SVG of the difference and its confidence interval around 0."""
    mean, low, high = row.difference.mean, row.difference.low, row.difference.high
    if low is None or high is None:
        return ""
    x, x1, x2 = (f"{60 + 55 * value / scale:.1f}" for value in (mean, low, high))
    return (
        "<svg width='120' height='16' viewBox='0 0 120 16' aria-hidden='true'>"
        f"<path class='axis' d='M60 0V16'/><path class='range' d='M{x1} 8H{x2}'/>"
        f"<circle cx='{x}' cy='8' r='3.5'/></svg>"
    )

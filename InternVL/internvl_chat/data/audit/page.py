"""HTML page of a data check: inputs, datasets, lengths, and problems with example images."""

import html
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version

from internvl_chat import __version__
from internvl_chat.data.audit import gallery
from internvl_chat.data.audit.checks import Audit
from internvl_chat.data.audit.statistics import SET_HEADER, describe_check, group_by_kind, set_rows, severity
from internvl_chat.data.sources.problems import KINDS, REMEDIES, Problem
from internvl_chat.utils.html import html_image, html_page, html_table

_MAX_SHOWN = 100
_LIBRARIES = ("transformers", "tokenizers", "pillow")
_STYLE = """
.head dt { font-weight: 600; float: left; clear: left; width: 9rem; } .head dd { margin: 0 0 .3rem 9.5rem; }
.head code { overflow-wrap: anywhere; }
.counts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.counts div { border: 1px solid var(--line); border-radius: .5rem; background: var(--panel);
  padding: .5rem 1rem; min-width: 7rem; }
.counts b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.counts .ok b { color: var(--good); } .counts .error b, .counts .leak b { color: var(--error); }
.counts .warning b { color: var(--warning); }
summary { cursor: pointer; font-weight: 600; padding: .3rem 0; }
summary.error, summary.leak { color: var(--error); } summary.warning { color: var(--warning); }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .8rem 0; padding: .2rem 1rem; }
@media (max-width: 40rem) { .head dt { float: none; width: auto; } .head dd { margin-left: 0; } }
"""


def report_page(
    audit: Audit, problems: Sequence[Problem], plot: bytes, inputs: Mapping[str, str], problems_file: str
) -> str:
    """Return the HTML page of a data check.

    Args:
        audit: the findings.
        problems: problems of all datasets, and leaks.
        plot: histograms of the lengths, as the content of a PNG file.
        inputs: text that describes what was checked and how, keyed by label; `command` is shown as code.
        problems_file: name of the file that lists all problems.
    """
    groups = group_by_kind(problems)
    # The parent folder distinguishes files with the same name.
    files = ["/".join(findings.spec.annotation.parts[-2:]) for findings in audit.sets]
    rows = [(*row, file) for row, file in zip(set_rows(audit), files, strict=True)]
    parts = [
        _counts(audit, problems),
        f"<p>{html.escape(describe_check(audit))}</p>",
        _head(inputs),
        "<h2>Datasets</h2>",
        html_table((*SET_HEADER, "file"), rows),
        "<h2>Lengths</h2>",
        f"<div class='plot'>{html_image(plot, 'png', 'Histograms of the record lengths')}</div>",
    ]
    if groups:
        kinds = [(kind, severity(kind), f"{len(group):,}", KINDS[kind]) for kind, group in groups.items()]
        parts += ["<h2>Problems by kind</h2>", html_table(("kind", "severity", "count", "meaning"), kinds)]
    parts += [_kind_section(kind, group, audit, problems_file) for kind, group in groups.items()]
    return html_page("Data check", parts, _STYLE + gallery.STYLE)


def _counts(audit: Audit, problems: Sequence[Problem]) -> str:
    counts = Counter(severity(problem.kind) for problem in problems)
    used, usable = (sum(getattr(findings, name) for findings in audit.sets) for name in ("used", "usable"))
    boxes = [("ok" if usable == used else "error", f"{usable:,}", f"of {used:,} records can be used")]
    for name in ("error", "warning", "leak"):
        boxes.append((name if counts[name] else "ok", f"{counts[name]:,}", f"{name}s"))
    shown = (f"<div class='{style}'><b>{number}</b>{text}</div>" for style, number, text in boxes)
    return f"<div class='counts'>{''.join(shown)}</div>"


def _head(inputs: Mapping[str, str]) -> str:
    """Return the inputs, date and versions as an HTML list."""
    versions = [f"m3llm {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {version(name)}" for name in _LIBRARIES]
    date = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    entries = {**inputs, "date": date, "versions": ", ".join(versions)}
    items = []
    for name, text in entries.items():
        shown = f"<code>{html.escape(text)}</code>" if name == "command" else html.escape(text)
        items.append(f"<dt>{html.escape(name)}</dt><dd>{shown}</dd>")
    return f"<dl class='head'>{''.join(items)}</dl>"


def _kind_section(kind: str, group: Sequence[Problem], audit: Audit, problems_file: str) -> str:
    """Return the HTML section of a kind of problem: meaning, remedy, thumbnails and examples."""
    rows = [(_location(p), p.message, p.dataset, p.id or "") for p in group[:_MAX_SHOWN]]
    more = len(group) - len(rows)
    rest = f"<p>and {more:,} more; see {problems_file} for all</p>" if more else ""
    is_open = "" if severity(kind) == "warning" else " open"
    return (
        f"<details{is_open}><summary class='{severity(kind)}'>{html.escape(kind)}: {len(group):,}</summary>"
        f"<p>{html.escape(KINDS[kind])}<br><b>Remedy:</b> {html.escape(REMEDIES[kind])}</p>"
        f"{gallery.gallery(group, audit)}"
        f"{html_table(('file and line', 'message', 'dataset', 'id'), rows)}{rest}</details>"
    )


def _location(problem: Problem) -> str:
    return problem.file.name + ("" if problem.line is None else f":{problem.line}")

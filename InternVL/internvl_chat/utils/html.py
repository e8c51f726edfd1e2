"""Self-contained HTML pages, for the reports of the data check and of evaluations."""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
td.m { overflow-wrap: anywhere; min-width: 6rem; }
td:first-child { min-width: 9rem; }
.table { overflow-x: auto; }
img { max-width: 100%; }
"""


def html_page(title: str, parts: Iterable[str], style: str = "") -> str:
    """Return an HTML page.

    Args:
        title: title and heading, as plain text.
        parts: HTML fragments of the body.
        style: additional CSS.
    """
    name = html.escape(title)
    head = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{name}</title><style>{STYLE}{style}</style></head><body><h1>{name}</h1>"
    )
    return "\n".join([head, *parts, "</body></html>\n"])


def html_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return an HTML table with escaped cells; numbers, and `-` for missing ones, are right-aligned."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<div class='table'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(value: Any) -> str:
    text = str(value)
    kind = "n" if text == "-" or text.replace(",", "").replace(".", "", 1).isdigit() else "m"
    return f"<td class='{kind}'>{html.escape(text)}</td>"


def html_image(content: bytes, kind: str, description: str) -> str:
    """Return an image embedded as a data URL.

    Args:
        content: the image file.
        kind: `png` or `jpeg`.
        description: alternative text.
    """
    data = base64.b64encode(content).decode("ascii")
    alt = html.escape(description, quote=True)
    return f"<img alt='{alt}' title='{alt}' src='data:image/{kind};base64,{data}'>"

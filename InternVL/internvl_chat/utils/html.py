"""Self-contained HTML pages for the data check and evaluation reports."""

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL.Image import Image

_LONG_CELL = 40
# The colors are variables that switch between light and dark mode.
STYLE = """
:root { color-scheme: light dark; --text: #1c2128; --muted: #59636e; --page: #fff; --panel: #f6f8fa;
  --line: #d4d9de; --error: #b3261e; --warning: #8a5a00; --good: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --text: #e3e8ee; --muted: #9aa5b1; --page: #14181d;
  --panel: #1e242b; --line: #363d46; --error: #ff8a80; --warning: #e8b04a; --good: #5fc77a; } }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--text); background: var(--page); }
h1, p, dd, figcaption { overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--muted); font-weight: 600; white-space: nowrap; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
td.long { overflow-wrap: anywhere; min-width: 14rem; }
.table, .plot { overflow-x: auto; }
img { max-width: 100%; }
.plot img { border-radius: .4rem; }
@media (max-width: 40rem) { .plot img { max-width: none; width: 48rem; } }
"""


def html_page(title: str, parts: Iterable[str], style: str = "") -> str:
    """Return an HTML page with the default style.

    Args:
        title: title and heading in plain text.
        parts: HTML fragments of the body.
        style: additional CSS.
    """
    name = html.escape(title)
    head = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{name}</title><style>{STYLE}{style}</style></head><body><h1>{name}</h1>"
    )
    return "\n".join([head, *parts, "</body></html>\n"])


def html_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return an HTML table with escaped cells; numbers and `-` (missing values) are right-aligned.

    Words are broken only in cells with long text, so that narrow columns stay readable.
    """
    rows = list(rows)
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    kinds = [" class='n'" if is_numeric else "" for is_numeric in numeric]
    head = "".join(f"<th{kind}>{html.escape(cell)}</th>" for cell, kind in zip(header, kinds, strict=True))
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<div class='table'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _is_number(value: Any) -> bool:
    text = str(value)
    return text == "-" or text.strip("%").replace(",", "").replace(".", "", 1).isdigit()


def _cell(value: Any) -> str:
    text = str(value)
    kind = " class='n'" if _is_number(value) else " class='long'" if len(text) > _LONG_CELL else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def json_script(name: str, value: Any) -> str:
    """Return a script element with the id `name` that contains JSON data for the scripts of a page."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f"<script type='application/json' id='{name}'>{text}</script>"


def read_json_script(page: str, name: str) -> Any:
    """Return the data that `json_script` embedded in a page.

    Raises:
        ValueError: the page has no such data.
    """
    _, _, rest = page.partition(json_script(name, None).removesuffix("null</script>"))
    return json.loads(rest.partition("</script>")[0])


def html_image(content: bytes, kind: str, description: str) -> str:
    """Return an image embedded as a data URL.

    Args:
        kind: `png` or `jpeg`.
        description: alternative text.
    """
    alt = html.escape(description, quote=True)
    return f"<img alt='{alt}' title='{alt}' src='{image_data_url(content, kind)}'>"


def image_data_url(content: bytes, kind: str) -> str:
    """Return an image file as a data URL; see `html_image`."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def jpeg_thumbnail(image: "Image", pixels: int) -> bytes:
    """Shrink an RGB image in place to at most `pixels` per side; return it as JPEG bytes."""
    image.thumbnail((pixels, pixels))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return stream.getvalue()


def templates(package: str) -> "Environment":
    """Return a Jinja environment for the HTML templates in the folder `templates` of a package."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(files(package) / "templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

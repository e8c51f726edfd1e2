"""Image thumbnails of records with problems, embedded in the HTML report."""

import html
import re
from collections.abc import Iterator, Mapping, Sequence

from internvl_chat.data.audit.checks import Audit
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.images import ImageLocation
from internvl_chat.data.sources.preview import jpeg_preview
from internvl_chat.data.sources.problems import LEAKS, Problem, RecordError
from internvl_chat.data.storage.stores import ImageStore
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.html import html_image

# Kinds of problems for which images are shown; the others concern text.
KINDS_WITH_IMAGES = frozenset(
    {"placeholders", "image missing", "image outside root", "image unreadable", "image depth",
     "image too large", "too long", "changed", "fewer tiles", "duplicate record", *LEAKS}
)  # fmt: skip
MAX_PER_KIND = 12
MAX_PER_RECORD = 3
_PIXELS = 160

STYLE = """
.gallery { display: flex; flex-wrap: wrap; gap: .8rem; margin: .8rem 0; }
.gallery figure { margin: 0; width: 10rem; }
.gallery img, .gallery .broken { width: 100%; height: 7rem; object-fit: contain; display: block;
  border: 1px solid var(--line); border-radius: .4rem; background: var(--panel); box-sizing: border-box; }
.gallery .broken { display: flex; align-items: center; justify-content: center; text-align: center;
  padding: .4rem; color: var(--error); border-style: dashed; font-size: .85rem; }
.gallery figcaption { font-size: .75rem; color: var(--muted); overflow-wrap: anywhere; }
"""


def gallery(problems: Sequence[Problem], audit: Audit) -> str:
    """Return an HTML gallery with images of records that have a problem; empty if there are no images.

    If an image cannot be decoded, the kind of error is shown in its place.

    Args:
        problems: problems of one kind; the gallery shows the first of them.
        audit: audit that contains the records.
    """
    opened = {records.spec.name: records for records in audit.opened}
    figures: dict[ImageLocation, str] = {}
    for problem in problems:
        if problem.kind not in KINDS_WITH_IMAGES or len(figures) >= MAX_PER_KIND:
            break
        for name, path in _affected_images(problem, opened):
            if len(figures) < MAX_PER_KIND and path not in figures:
                figures[path] = _figure(problem, name, path)
    return f"<div class='gallery'>{''.join(figures.values())}</div>" if figures else ""


def _affected_images(
    problem: Problem, opened: Mapping[str, RecordSet]
) -> Iterator[tuple[str, ImageLocation]]:
    """Yield (name, path) of the images to show: those named in the message, or else the record's first."""
    records = opened.get(problem.dataset)
    if records is None or problem.index is None:
        return
    try:
        names = records.record(problem.index).images
    except DataError:
        return
    root = records.root
    images = [(name, root.image(name) if isinstance(root, ImageStore) else root / name) for name in names]
    named = [image for image in images if _is_named(image[0], problem.message)]
    yield from (named or images)[:MAX_PER_RECORD]


def _is_named(name: str, message: str) -> bool:
    """Return whether a message mentions an image name, alone or as the end of a path."""
    return re.search(rf"(^|[\s/]){re.escape(name)}(\s|$)", message) is not None


def _figure(problem: Problem, name: str, path: ImageLocation) -> str:
    try:
        shown = html_image(jpeg_preview(path, _PIXELS), "jpeg", name)
    except RecordError as error:
        shown = f"<div class='broken'>{html.escape(error.kind)}</div>"
    line = "" if problem.line is None else f":{problem.line}"
    caption = f"{html.escape(name)}<br>{html.escape(problem.file.name)}{line}"
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"

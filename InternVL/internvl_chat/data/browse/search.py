"""Search the bytes of all records for a text or an id, without parsing or indexing them."""

import json
import re

import numpy as np

from internvl_chat.data.browse.catalog import Catalog
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.problems import printable_id
from internvl_chat.utils.errors import DataError


def find_text(catalog: Catalog, text: str) -> np.ndarray:
    """Return the positions of the records that contain a text, ignoring the case of ASCII letters.

    The whole record is searched, including its id and image paths.
    """
    patterns = {re.escape(form.lower()) for form in _json_forms(text)}
    found = [np.zeros(0, np.int64)]
    for start, records in zip(catalog.bounds.tolist(), catalog.sets, strict=False):
        for pattern in patterns:
            matches = np.array(records.file.search(re.compile(pattern), lower=True), np.int64)
            found.append(start + matches[matches < records.num_distinct])
    return np.unique(np.concatenate(found))


def find_id(catalog: Catalog, record_id: str) -> list[tuple[int, int]]:
    """Return the dataset number and index of each record with an id.

    Ids in the index are compared first. If none matches, all records are searched, including those that are
    not indexed yet or not used by training.
    """
    known = [position for position, other in enumerate(catalog.ids) if other == record_id]
    if known:
        return [catalog.locate(position) for position in known]
    found: set[tuple[int, int]] = set()
    for form in _json_forms(record_id):
        pattern = re.compile(rb'"id"\s*:\s*"?' + re.escape(form) + rb'"?\s*[,}]')
        for set_number, records in enumerate(catalog.sets):
            indices = records.file.search(pattern)
            found.update((set_number, index) for index in indices if _id_of(records, index) == record_id)
    return sorted(found)


def _json_forms(text: str) -> set[bytes]:
    """Return how a text may be written in a JSON string: non-ASCII characters and slashes may be escaped."""
    plain = {json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)}
    return {form.encode("utf-8", "surrogatepass") for form in plain | {p.replace("/", r"\/") for p in plain}}


def _id_of(records: RecordSet, index: int) -> str | None:
    """Return a record's printable id; None if it has none or cannot be parsed."""
    try:
        raw = records.file[index]
    except DataError:
        return None
    return printable_id(raw.get("id")) if isinstance(raw, dict) else None

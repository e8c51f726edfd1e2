"""Filters and order of the record list."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from urllib.parse import urlencode

import numpy as np

from internvl_chat.data.browse.catalog import Catalog
from internvl_chat.data.encode.encoder import RecordLengths
from internvl_chat.data.sources.problems import ERRORS, KINDS, WARNINGS
from internvl_chat.utils.errors import UsageError

# Order -> label.
SORTS = {
    "file": "file order",
    "longest": "most tokens first",
    "shortest": "fewest tokens first",
    "most_tiles": "most tiles first",
    "fewest_tiles": "fewest tiles first",
}
# Order -> field of the lengths, and sign.
_KEYS = {
    "longest": ("tokens", -1), "shortest": ("tokens", 1),
    "most_tiles": ("tiles", -1), "fewest_tiles": ("tiles", 1),
}  # fmt: skip
# Groups of problem kinds; other values of the filter are single kinds.
GROUPS = {"error": tuple(ERRORS), "warning": tuple(WARNINGS)}
_MAX_NUMBER = 10**9
_MAX_TEXT = 500


@dataclass(frozen=True)
class Query:
    """Filters, order and page of the record list.

    Attributes:
        set: number of the dataset; None for all.
        problem: a key of `GROUPS`, a kind of problem, or "" for all records.
        text: text that the records contain, ignoring the case of ASCII letters.
        id: exact id.
        sort: a key of `SORTS`.
        page: 1-based page.
    """

    set: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    min_tiles: int | None = None
    max_tiles: int | None = None
    problem: str = ""
    text: str = ""
    id: str = ""
    sort: str = "file"
    page: int = 1

    @property
    def needs_index(self) -> bool:
        """Whether the query selects or sorts by values from the index."""
        limits = (self.min_tokens, self.max_tokens, self.min_tiles, self.max_tiles)
        return any(limit is not None for limit in limits) or bool(self.problem) or self.sort != "file"

    def url(self, **changes: int | str | None) -> str:
        """Return the query string (empty, or starting with `?`) after changes."""
        changed = replace(self, **changes)  # type: ignore[arg-type]
        values = {field.name: getattr(changed, field.name) for field in fields(self)}
        different = {name: value for name, value in values.items() if value != getattr(Query, name)}
        return f"?{urlencode(different)}" if different else ""


def parse_query(parameters: Mapping[str, str], num_sets: int) -> Query:
    """Parse the parameters of a request; unknown ones are ignored.

    Raises:
        UsageError: values are invalid; the message lists all of them.
    """
    problems: list[str] = []

    def number(name: str, least: int, most: int) -> int | None:
        text = parameters.get(name, "").strip()
        if not text:
            return None
        if not (text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most):
            problems.append(f"{name}={text[:40]!r}: must be a whole number from {least} to {most:,}")
            return None
        return int(text)

    def choice(name: str, values: Mapping[str, object], default: str) -> str:
        text = parameters.get(name, "") or default
        if text != default and text not in values:
            problems.append(f"{name}={text[:40]!r}: must be one of {', '.join(values)}")
        return text

    def text(name: str) -> str:
        value = parameters.get(name, "").strip()
        if len(value) > _MAX_TEXT:
            problems.append(f"{name}: has {len(value):,} characters, more than {_MAX_TEXT}")
        return value

    query = Query(
        set=number("set", 0, num_sets - 1),
        min_tokens=number("min_tokens", 0, _MAX_NUMBER),
        max_tokens=number("max_tokens", 0, _MAX_NUMBER),
        min_tiles=number("min_tiles", 0, _MAX_NUMBER),
        max_tiles=number("max_tiles", 0, _MAX_NUMBER),
        problem=choice("problem", {**GROUPS, **KINDS}, ""),
        text=text("text"),
        id=text("id"),
        sort=choice("sort", SORTS, "file"),
        page=number("page", 1, _MAX_NUMBER) or 1,
    )
    if problems:
        raise UsageError(problems)
    return query


def select(catalog: Catalog, query: Query, found: np.ndarray | None = None) -> np.ndarray:
    """Return the positions of the selected records in the requested order.

    Unusable records have no lengths: limits exclude them, and they come last when sorting by length.

    Args:
        catalog: all records.
        query: filters and order; `text` and `id` must already have been searched for.
        found: positions of the records that contain the text or id; None without a search.
    """
    keep = np.ones(len(catalog), bool)
    if query.set is not None:
        keep[: catalog.bounds[query.set]] = False
        keep[catalog.bounds[query.set + 1] :] = False
    if found is not None:
        keep &= _mask(found, len(catalog))
    if not query.needs_index:
        return np.flatnonzero(keep)
    keep &= catalog.indexed
    unusable = _mask(catalog.unusable(), len(catalog))
    columns = dict(zip(RecordLengths._fields, catalog.lengths, strict=True))
    for name in ("tokens", "tiles"):
        for limit, sign in ((getattr(query, f"min_{name}"), 1), (getattr(query, f"max_{name}"), -1)):
            if limit is not None:
                keep &= (sign * columns[name] >= sign * limit) & ~unusable
    if query.problem:
        kinds = GROUPS.get(query.problem, (query.problem,))
        keep &= _mask(catalog.with_problem(kinds), len(catalog))
    positions = np.flatnonzero(keep)
    if query.sort == "file":
        return positions
    column, sign = _KEYS[query.sort]
    order = np.lexsort((sign * columns[column][positions], unusable[positions]))
    return positions[order]


def _mask(positions: np.ndarray, size: int) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[positions] = True
    return mask

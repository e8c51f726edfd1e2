"""Render the pages of the data browser from the catalog and single records."""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from internvl_chat.data.browse.catalog import BackgroundIndex, Catalog
from internvl_chat.data.browse.query import GROUPS, SORTS, Query, parse_query, select
from internvl_chat.data.browse.record_view import view_record
from internvl_chat.data.browse.rows import record_rows, set_rows
from internvl_chat.data.browse.search import find_id, find_text
from internvl_chat.data.sources.problems import ERRORS, KINDS, REMEDIES, WARNINGS
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.html import STYLE, templates

PACKAGE = "internvl_chat.data.browse"
PAGE_SIZE = 50
_MAX_CACHED_SEARCHES = 16
# Warnings that result from comparing a record with all others.
_COMPARED = ("duplicate id", "duplicate record")


class Neighbors(NamedTuple):
    """Links to the previous and next record of a list, and the record's 1-based number of `total` in it."""

    previous: str | None
    following: str | None
    number: int | None
    total: int


class Pages:
    """HTML pages of the data browser.

    Args:
        catalog: the records.
        index: thread that fills the catalog.
        title: name of the data.
    """

    def __init__(self, catalog: Catalog, index: BackgroundIndex, title: str) -> None:
        self.catalog, self.index = catalog, index
        self._find_text = lru_cache(_MAX_CACHED_SEARCHES)(partial(find_text, catalog))
        self._templates = templates(PACKAGE)
        self._templates.filters["count"] = "{:,}".format
        self._templates.globals |= {
            "title": title,
            "style": Markup(STYLE),
            "kinds": KINDS,
            "errors": ERRORS,
            "warnings": WARNINGS,
            "remedies": REMEDIES,
        }

    def _render(self, name: str, **values: Any) -> bytes:
        """Render a template; lone surrogates, which occur in records, are escaped."""
        values |= {"changed": self.catalog.changed_files(), "status": self.status()}
        return self._templates.get_template(name).render(values).encode("utf-8", "backslashreplace")

    def status(self) -> dict[str, Any]:
        """Return the progress of the index."""
        return {
            "indexed": int(np.count_nonzero(self.catalog.indexed)),
            "total": len(self.catalog),
            "finished": self.index.finished,
            "error": self.index.error,
        }

    def error(self, heading: str, messages: list[str]) -> bytes:
        """Return an error page."""
        return self._render("error.html", heading=heading, messages=messages)

    def record_list(self, parameters: Mapping[str, str]) -> bytes:
        """Return a page of the record list.

        Raises:
            UsageError: a parameter is invalid.
        """
        query = parse_query(parameters, len(self.catalog.sets))
        positions = self._select(query)
        pages = max(1, -(-len(positions) // PAGE_SIZE))
        page = min(query.page, pages)
        shown = positions[(page - 1) * PAGE_SIZE : page * PAGE_SIZE]
        options = [records.encoder.preprocessing for records in self.catalog.sets]
        tiles = sorted({o.max_dynamic_patch for o in options})  # a dataset may have its own limit
        counts = self.catalog.kinds()
        groups = {group: {kind: counts[kind] for kind in of_group if kind in counts}
                  for group, of_group in GROUPS.items()}  # fmt: skip
        return self._render(
            "list.html",
            catalog=self.catalog,
            query=query,
            page=page,
            pages=pages,
            total=len(positions),
            rows=record_rows(self.catalog, shown),
            sets=set_rows(self.catalog),
            groups=groups,
            sorts=SORTS,
            max_tokens=options[0].max_seq_length,
            tile_limit=str(tiles[0]) if len(tiles) == 1 else f"{tiles[0]} to {tiles[-1]}",
        )

    def record(self, set_number: int, index: int, parameters: Mapping[str, str]) -> bytes:
        """Return the page of a record.

        Args:
            set_number: number of an existing dataset.
            index: index of an existing record.
            parameters: parameters of the list from which the record was opened.

        Raises:
            DataError: the annotation file has changed.
            UsageError: a parameter is invalid.
        """
        self.catalog.check_file(set_number)
        records = self.catalog.sets[set_number]
        query = parse_query(parameters, len(self.catalog.sets))
        position = self.catalog.position(set_number, index)
        known = [] if position is None else self.catalog.problems(position)
        view = view_record(records, index, [problem for problem in known if problem.kind in _COMPARED])
        return self._render(
            "record.html",
            view=view,
            spec=records.spec,
            options=records.encoder.preprocessing,
            set_number=set_number,
            used=position is not None,
            query=query,
            neighbors=self._neighbors(position, query),
            counts_tokens=self.catalog.counts_tokens,
        )

    def jump(self, parameters: Mapping[str, str]) -> str | None:
        """Return the path of a record with an id, or at an index of a dataset; None if no record has the id.

        If several records have the id, the path is that of their list.

        Raises:
            UsageError: a parameter is invalid.
        """
        if record_id := parameters.get("id", "").strip():
            found = find_id(self.catalog, record_id)
            if len(found) > 1:
                return f"/{Query(id=record_id).url()}"
            return "/record/{}/{}".format(*found[0]) if found else None
        numbers = [parameters.get(name, "").strip() for name in ("set", "index")]
        if not all(text.isascii() and text.isdigit() for text in numbers):
            raise UsageError("enter the id of a record, or the index of a record in a dataset")
        return "/record/{}/{}".format(*numbers)

    def _select(self, query: Query) -> np.ndarray:
        """Return the positions of the records that a query selects."""
        found = self._find_text(query.text) if query.text else None
        if query.id:
            located = [self.catalog.position(*key) for key in find_id(self.catalog, query.id)]
            same_id = np.array([position for position in located if position is not None], np.int64)
            found = same_id if found is None else np.intersect1d(found, same_id)
        return select(self.catalog, query, found)

    def _neighbors(self, position: int | None, query: Query) -> Neighbors:
        """Return the neighbors of a record in the list that it was opened from, or else in all records."""
        if position is None:
            return Neighbors(None, None, None, 0)
        positions = self._select(query)
        found = np.flatnonzero(positions == position)
        if not len(found):  # the record is not in the list
            query, positions, found = Query(), np.arange(len(self.catalog)), np.array([position])
        offset = int(found[0])
        links: list[str | None] = []
        for other in (offset - 1, offset + 1):
            inside = 0 <= other < len(positions)
            links.append(self._link(int(positions[other]), query, other) if inside else None)
        return Neighbors(links[0], links[1], offset + 1, len(positions))

    def _link(self, position: int, query: Query, offset: int) -> str:
        """Return the link to a record, with the query and the page of the list that contains it."""
        set_number, index = self.catalog.locate(position)
        return f"/record/{set_number}/{index}{query.url(page=offset // PAGE_SIZE + 1)}"

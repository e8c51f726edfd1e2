"""Filters and order of the record list."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_sets import image_record, noise, text_record

from internvl_chat.data.browse.query import KINDS, SORTS, Query, parse_query, select
from internvl_chat.data.encode.encoder import RecordLengths
from internvl_chat.data.sources.problems import ERRORS
from internvl_chat.utils.errors import UsageError


@pytest.fixture
def catalog(make, tmp_path, catalog_of):
    """A catalog of 9 records with different lengths, two of them unusable."""
    (tmp_path / "images").mkdir(exist_ok=True)
    for name, size in (("wide", (80, 20)), ("small", (20, 20))):
        noise(*size).save(tmp_path / f"images/{name}.png")
    first = [text_record(0, "a cat " * 9), image_record(1, "wide.png"), text_record(2, "a cat " * 400), b"{"]
    second = [image_record(3, "small.png"), text_record(4), image_record(5, "wide.png", "small.png")]
    return catalog_of(make(first, "first"), make([*second, text_record(6, "b")], "second"))


class TestParse:
    def test_all_parameters(self):
        values = {
            "set": "1", "min_tokens": "10", "max_tokens": "20", "min_tiles": "0", "max_tiles": "3",
            "problem": "image missing", "text": " cat ", "id": "x", "sort": "longest", "page": "4",
            "other": "1",
        }  # fmt: skip
        query = parse_query(values, 2)
        assert query == Query(1, 10, 20, 0, 3, "image missing", "cat", "x", "longest", 4)
        assert query.needs_index

    def test_empty_parameters_are_defaults(self):
        empty = dict.fromkeys(["set", "min_tokens", "problem", "text", "id", "sort", "page"], "")
        assert parse_query(empty, 2) == parse_query({}, 2) == Query()
        assert not Query(set=1, text="cat").needs_index

    def test_all_problems_are_named(self):
        values = {
            "set": "2", "min_tiles": "-1", "max_tiles": "1e3", "max_tokens": "9" * 5000, "min_tokens": "²",
            "problem": "<b>", "sort": "id", "text": "x" * 501, "page": "0",
        }  # fmt: skip
        with pytest.raises(UsageError) as caught:
            parse_query(values, 2)
        assert len(caught.value.problems) == len(values)
        assert caught.value.problems[0] == "set='2': must be a whole number from 0 to 1"

    def test_url(self):
        query = Query(set=1, text="a & b", sort="longest", page=3)
        assert query.url() == "?set=1&text=a+%26+b&sort=longest&page=3"
        assert query.url(page=1) == "?set=1&text=a+%26+b&sort=longest"
        assert Query().url() == ""


class TestSelect:
    def test_file_order(self, catalog):
        assert select(catalog, Query()).tolist() == list(range(8))
        assert select(catalog, Query(set=1)).tolist() == [4, 5, 6, 7]

    def test_problems(self, catalog):
        assert select(catalog, Query(problem="error")).tolist() == [2, 3]
        assert select(catalog, Query(problem="json")).tolist() == [3]
        assert select(catalog, Query(problem="warning")).tolist() == []
        assert select(catalog, Query(problem="error", set=1)).tolist() == []

    def test_unusable_records_come_last(self, catalog):
        for sort in set(SORTS) - {"file"}:
            assert set(select(catalog, Query(sort=sort))[-2:]) == {2, 3}
        assert not {2, 3} & set(select(catalog, Query(max_tokens=10**6)).tolist())

    def test_found_records(self, catalog):
        assert select(catalog, Query(text="x"), np.array([5, 1])).tolist() == [1, 5]
        assert select(catalog, Query(text="x", min_tiles=1), np.array([5, 1])).tolist() == [1]
        assert select(catalog, Query(text="x"), np.array([], np.int64)).tolist() == []

    def test_only_indexed_records(self, catalog):
        catalog.indexed[4:] = False
        assert select(catalog, Query(sort="longest")).tolist()[:2] == [1, 0]
        assert len(select(catalog, Query(sort="longest"))) == 4
        assert len(select(catalog, Query())) == 8
        catalog.indexed[4:] = True

    def test_brute_force(self, catalog):
        rows = [RecordLengths(*column) for column in catalog.lengths.T.tolist()]
        bad = set(catalog.with_problem(ERRORS).tolist())
        limit = st.none() | st.integers(0, 80)

        @settings(max_examples=40)
        @given(limit, limit, limit, limit, st.sampled_from(["longest", "shortest", "most_tiles"]))
        def check(low, high, fewest, most, sort):
            query = Query(min_tokens=low, max_tokens=high, min_tiles=fewest, max_tiles=most, sort=sort)
            limited = any(value is not None for value in (low, high, fewest, most))
            expected = [
                i for i, row in enumerate(rows)
                if (i not in bad or not limited)
                and (low is None or row.tokens >= low) and (high is None or row.tokens <= high)
                and (fewest is None or row.tiles >= fewest) and (most is None or row.tiles <= most)
            ]  # fmt: skip
            keys = {
                "longest": lambda r: -r.tokens,
                "shortest": lambda r: r.tokens,
                "most_tiles": lambda r: -r.tiles,
            }
            expected.sort(key=lambda i: (i in bad, keys[sort](rows[i])))
            assert select(catalog, query).tolist() == expected

        check()


def test_every_kind_can_be_selected(catalog):
    for kind in KINDS:
        assert parse_query({"problem": kind}, 1).problem == kind

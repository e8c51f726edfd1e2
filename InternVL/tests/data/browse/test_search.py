"""Search for a text or an id without an index."""

import json

import pytest
from small_sets import text_record

from internvl_chat.data.browse.search import find_id, find_text


class TestText:
    def test_case_and_position(self, make, catalog_of):
        records = [text_record(0, "A Cat"), text_record(1, "dog"), text_record(2, "cat", note="DOG")]
        catalog = catalog_of(make(records), make([text_record(3, "hotdog")], "other"), indexed=False)
        assert find_text(catalog, "Dog").tolist() == [1, 2, 3]
        assert find_text(catalog, "a cat").tolist() == [0]
        assert find_text(catalog, "bird").tolist() == []

    @pytest.mark.parametrize("text", ["größe", "左肺", 'say "yes"', "a\\b", "line\nbreak", "\ud800"])
    @pytest.mark.parametrize("escaped", [True, False])
    def test_json_escapes(self, make, catalog_of, text, escaped):
        line = json.dumps(text_record(0, f"see {text} here"), ensure_ascii=escaped)
        catalog = catalog_of(make([line.encode("utf-8", "surrogatepass"), text_record(1)]), indexed=False)
        assert find_text(catalog, text).tolist() == [0]

    @pytest.mark.parametrize("line", ['{"image": "figures/a.png"}', r'{"image": "figures\/a.png"}'])
    def test_escaped_slashes(self, make, catalog_of, line):
        catalog = catalog_of(make([line.encode(), text_record(1)]), indexed=False)
        assert find_text(catalog, "figures/a").tolist() == [0]

    def test_unused_and_malformed_records(self, make, catalog_of):
        records = [b'{"cat"', b'"cat"', text_record(0, "cat"), text_record(1, "cat")]
        assert find_text(catalog_of(make(records, repeat_time=0.75)), "cat").tolist() == [0, 1, 2]


class TestId:
    RECORDS = (
        text_record(0),
        text_record(1, id="r10"),
        {**text_record(2), "id": 7},
        {**text_record(3), "id": "7"},
        {**text_record(4), "id": 'a "quoted" id / größe'},
        {**text_record(5), "id": None},
        {**text_record(6, 'it has "id": "r1"'), "id": "x"},
        {**text_record(7), "id": "unused"},
    )

    @pytest.fixture(params=[True, False], ids=["indexed", "not indexed"])
    def catalog(self, make, catalog_of, request):
        first = make([{**record} for record in self.RECORDS], "first", repeat_time=7 / 8)
        return catalog_of(first, make([b"{", text_record(0)], "second"), indexed=request.param)

    def test_exact_matches(self, catalog):
        assert find_id(catalog, "r10") == [(0, 1)]
        assert find_id(catalog, "r1") == []
        assert find_id(catalog, 'a "quoted" id / größe') == [(0, 4)]
        assert find_id(catalog, "None") == []

    def test_several_matches(self, catalog):
        assert find_id(catalog, "r0") == [(0, 0), (1, 1)]
        assert find_id(catalog, "7") == [(0, 2), (0, 3)]

    def test_unused_records_are_found(self, catalog):
        assert find_id(catalog, "unused") == [(0, 7)]

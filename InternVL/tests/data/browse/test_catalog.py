"""The catalog of all records, and the thread that fills it."""

import os
import threading

import numpy as np
import pytest
from small_sets import image_record, noise, text_record

from internvl_chat.data.browse import catalog as module
from internvl_chat.data.browse.catalog import BackgroundIndex, Catalog
from internvl_chat.data.index import build
from internvl_chat.data.index.build import IndexPart, index_records
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.problems import ERRORS, Problem
from internvl_chat.utils.errors import DataError

LONG = "a cat " * 400


@pytest.fixture
def two_sets(make):
    """Two datasets of 3 and 2 records; the second record of the first one is unusable."""
    first = make([text_record(0), text_record(1, LONG), text_record(2)], "first")
    return first, make([text_record(3), text_record(4)], "second")


class TestCatalog:
    def test_positions_skip_unused_records(self, make, catalog_of):
        half, none = [make([text_record(n) for n in range(4)], *args) for args in (("half",), ("none",))]
        half = make([text_record(n) for n in range(4)], "half", repeat_time=0.5)
        none = make([text_record(n) for n in range(4)], "none", repeat_time=0.1)
        catalog = catalog_of(half, none, make([text_record(9)], "last", repeat_time=3), indexed=False)
        assert len(catalog) == 3
        assert [catalog.locate(position) for position in range(3)] == [(0, 0), (0, 1), (2, 0)]
        assert [catalog.position(0, i) for i in range(4)] == [0, 1, None, None]
        assert catalog.position(1, 0) is None and catalog.position(2, 0) == 2

    def test_parts_replace_what_was_known(self, two_sets):
        catalog = Catalog(two_sets)
        problem = Problem("second", 1, two_sets[1].spec.annotation, 2, "b", "json", "broken")
        rows = np.arange(10, dtype=np.int32).reshape(2, 5)
        catalog.add(IndexPart(1, np.array([0, 1]), rows, ["a", "b"], [problem]))
        assert catalog.indexed.tolist() == [False, False, False, True, True]
        assert catalog.ids[3:] == ["a", "b"] and catalog.problems(4) == [problem]
        assert catalog.with_problem(ERRORS).tolist() == [4] and catalog.kinds() == {"json": 1}
        catalog.add(IndexPart(1, np.array([1]), rows[:1], ["c"], []))
        assert catalog.ids[4] == "c" and catalog.problems(4) == [] and catalog.kinds() == {}
        assert catalog.lengths[:, 4].tolist() == rows[0].tolist()

    def test_changed_file(self, two_sets):
        catalog = Catalog(two_sets)
        catalog.check_file(0)
        file = two_sets[0].spec.annotation
        os.utime(file, (1, 1))
        with pytest.raises(DataError, match="has changed since it was opened; restart"):
            catalog.check_file(0)
        catalog.check_file(1)
        assert catalog.changed_files() == [file]
        file.unlink()
        assert catalog.changed_files() == [file]


class TestBackgroundIndex:
    def test_result_equals_the_index_of_training(self, two_sets, make, tmp_path, catalog_of):
        noise(70, 20).save(tmp_path / "images/a.png")
        third = make([image_record(5, "a.png"), image_record(5, "a.png"), b"{"], "third", length=9)
        catalog = catalog_of(*two_sets, third)
        assert catalog.indexed.all()
        indexes = index_records(catalog.sets, cache=tmp_path / "other")
        expected = np.concatenate([np.stack(list(i.lengths.columns.values())) for i in indexes], axis=1)
        assert np.array_equal(catalog.lengths, expected)
        assert catalog.ids == [record_id for index in indexes for record_id in index.ids]
        assert catalog.kinds() == {"too long": 1, "duplicate id": 1, "duplicate record": 1, "json": 1}
        assert [problem.kind for problem in catalog.general] == ["length"]
        assert [p.kind for p in catalog.problems(6)] == ["duplicate id", "duplicate record"]

    def test_training_reads_the_cached_index(self, two_sets, tmp_path, catalog_of, monkeypatch):
        catalog_of(*two_sets)
        checked = []
        check = RecordSet.check
        monkeypatch.setattr(RecordSet, "check", lambda s, i, **o: (checked.append(i), check(s, i, **o))[1])
        index_records(two_sets, cache=tmp_path / "cache")
        assert checked == [1]  # unusable records are always checked again

    def test_cached_records_come_before_those_that_are_checked_again(self, two_sets, catalog_of, monkeypatch):
        catalog_of(*two_sets)
        parts: list[IndexPart] = []
        monkeypatch.setattr(Catalog, "add", lambda self, part: parts.append(part))
        catalog_of(*two_sets)
        assert [(part.set_number, part.records.tolist()) for part in parts] == [
            (0, [0, 1, 2]), (1, [0, 1]), (0, [1]),
        ]  # fmt: skip
        assert parts[0].lengths[0].tolist() == list(two_sets[0].measure(0))

    def test_part_of_the_records_can_be_used(self, make, tmp_path, monkeypatch):
        """The list works while the index is being built."""
        monkeypatch.setattr(build, "_CHUNK", 2)
        catalog = Catalog([make([text_record(n) for n in range(6)])])
        index = BackgroundIndex(catalog, tmp_path / "cache")
        seen, add = [], Catalog.add
        monkeypatch.setattr(
            Catalog, "add", lambda self, part: (add(self, part), seen.append(int(self.indexed.sum())))
        )
        index.start()
        index.wait()
        assert seen == [2, 4, 6] and index.finished

    def test_stop(self, make, tmp_path, monkeypatch):
        monkeypatch.setattr(build, "_CHUNK", 1)
        catalog = Catalog([make([text_record(n) for n in range(20)])])
        index = BackgroundIndex(catalog, tmp_path / "cache")
        reached, add = threading.Event(), Catalog.add

        def add_slowly(self, part):
            add(self, part)
            reached.set()
            index._stop.wait(60)

        monkeypatch.setattr(Catalog, "add", add_slowly)
        index.start()
        assert reached.wait(60)
        index.stop()
        assert catalog.indexed.sum() == 1 and not index.finished and index.error is None
        assert not list(tmp_path.glob("cache/*"))

    def test_failure_is_reported(self, two_sets, tmp_path, monkeypatch):
        def fail(*args, **options):
            raise DataError("a data check worker died; the machine may be out of memory")

        monkeypatch.setattr(module, "index_records", fail)
        index = BackgroundIndex(Catalog(two_sets), tmp_path)
        index.start()
        index.wait()
        assert index.error == "a data check worker died; the machine may be out of memory" and index.finished

"""The images that records show: kept small, compared with the disk, and replaced record by record."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_chat.data.sources import shown_images
from internvl_chat.data.sources.shown_images import ShownImage, ShownImages


def image(file: Path, root: Path) -> ShownImage:
    status = file.stat()
    return ShownImage(str(file.relative_to(root)), status.st_size, status.st_mtime_ns)


def of(*shown: list[ShownImage]) -> ShownImages:
    """Return the images of records 0, 1, 2 and so on."""
    return ShownImages.none().replace(np.arange(len(shown)), shown)


def told(images: ShownImages) -> dict[int, set[ShownImage]]:
    found = {}
    for record, number in images.uses.tolist():
        found.setdefault(record, set()).add(ShownImage(images.names[number], *images.states[number].tolist()))
    return found


@pytest.fixture
def files(tmp_path) -> list[Path]:
    (tmp_path / "sub").mkdir()
    files = [tmp_path / name for name in ("a.png", "sub/b.png", "ä ö.png", "new\nline.png", "c.png")]
    for number, file in enumerate(files):
        file.write_bytes(bytes(number))
    return files


class TestStale:
    @pytest.fixture
    def shown(self, files, tmp_path):
        a, b, c, d, _ = (image(file, tmp_path) for file in files)
        return of([a], [], [a, b], [c, d, c])

    def test_nothing_has_changed(self, shown, tmp_path):
        assert shown.stale(tmp_path).tolist() == []
        assert len(shown.names) == 4

    def test_records_of_what_changed(self, shown, files, tmp_path):
        files[3].write_bytes(b"other")
        assert shown.stale(tmp_path).tolist() == [3]
        files[0].unlink()
        assert shown.stale(tmp_path).tolist() == [0, 2, 3]

    def test_one_nanosecond(self, shown, files, tmp_path):
        status = files[1].stat()
        os.utime(files[1], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert shown.stale(tmp_path).tolist() == [2]

    def test_a_link_that_leads_elsewhere(self, files, tmp_path):
        (tmp_path / "link.png").symlink_to(files[0])
        shown = of([image(tmp_path / "link.png", tmp_path)])
        assert shown.stale(tmp_path).tolist() == []
        (tmp_path / "link.png").unlink()
        (tmp_path / "link.png").symlink_to(files[4])
        assert shown.stale(tmp_path).tolist() == [0]

    def test_an_absolute_name(self, files, tmp_path):
        shown = of([image(files[0], tmp_path)._replace(name=str(files[0]))])
        assert shown.stale(tmp_path / "elsewhere").tolist() == []

    def test_in_parts_by_several_threads(self, files, tmp_path, monkeypatch):
        monkeypatch.setattr(shown_images, "_ASKED_AT_ONCE", 2)
        shown = of(*([image(file, tmp_path)] for file in files))
        files[1].unlink()
        files[4].write_bytes(b"")
        assert shown.stale(tmp_path).tolist() == [1, 4]

    def test_of_nothing(self, tmp_path):
        assert ShownImages.none().stale(tmp_path).tolist() == []


some = st.builds(ShownImage, st.sampled_from("abcd"), st.integers(0, 2), st.integers(0, 2**62))


class TestReplace:
    @settings(max_examples=80)
    @given(
        first=st.lists(st.lists(some, max_size=3), min_size=5, max_size=5),
        again=st.dictionaries(st.integers(0, 4), st.lists(some, max_size=3)),
    )
    def test_against_a_dictionary(self, first, again):
        found = of(*first).replace(np.array(list(again), np.int64), list(again.values()))
        expected = {**dict(enumerate(first)), **again}
        assert told(found) == {record: set(images) for record, images in expected.items() if images}
        assert len(found.names) == len({image for images in expected.values() for image in images})
        restored = ShownImages.from_arrays(found.to_arrays(), 5)
        assert restored.same_as(found)

    def test_nothing_stays_the_same(self, files, tmp_path):
        shown = of(*([image(file, tmp_path)] for file in files[:3]))
        assert shown.replace(np.array([3]), [()]).same_as(shown)
        assert not shown.replace(np.array([2]), [()]).same_as(shown)


class TestArrays:
    def test_names_of_any_bytes(self, files, tmp_path):
        odd = tmp_path / os.fsdecode(b"latin-\xe4.png")
        odd.write_bytes(b"x")
        shown = of(*([image(file, tmp_path)] for file in [*files, odd]))
        restored = ShownImages.from_arrays(shown.to_arrays(), 6)
        assert restored.names == shown.names
        assert restored.stale(tmp_path).tolist() == []

    @pytest.mark.parametrize("change", [
        {"uses": np.array([[9, 0]], np.int32)}, {"uses": np.array([[0, 5]], np.int32)},
        {"uses": np.array([[-1, 0]], np.int32)}, {"uses": np.zeros(4, np.int32)},
        {"states": np.zeros((2, 2), np.int64)}, {"states": np.zeros((5, 2), np.float64)},
    ])  # fmt: skip
    def test_that_do_not_belong_together(self, files, tmp_path, change):
        arrays = of(*([image(file, tmp_path)] for file in files)).to_arrays()
        with pytest.raises(ValueError, match="its images are"):
            ShownImages.from_arrays({**arrays, **change}, 5)

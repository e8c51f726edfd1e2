"""The image manifest: comparison with files on disk, updates of individual records, and storage."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_chat.data.index import image_manifest
from internvl_chat.data.index.image_manifest import ImageManifest
from internvl_chat.data.sources.images import ImageFile


def image_file(file: Path, root: Path) -> ImageFile:
    status = file.stat()
    return ImageFile(str(file.relative_to(root)), status.st_size, status.st_mtime_ns)


def manifest_of(*images: list[ImageFile]) -> ImageManifest:
    """Return the manifest of records 0, 1, 2, ... with these images."""
    return ImageManifest.empty().update(np.arange(len(images)), images)


def images_by_record(manifest: ImageManifest) -> dict[int, set[ImageFile]]:
    images: dict[int, set[ImageFile]] = {}
    for record, position in manifest.uses.tolist():
        file = ImageFile(manifest.names[position], *manifest.states[position].tolist())
        images.setdefault(record, set()).add(file)
    return images


@pytest.fixture
def files(tmp_path) -> list[Path]:
    (tmp_path / "sub").mkdir()
    files = [tmp_path / name for name in ("a.png", "sub/b.png", "ä ö.png", "new\nline.png", "c.png")]
    for number, file in enumerate(files):
        file.write_bytes(bytes(number))
    return files


class TestChangedRecords:
    @pytest.fixture
    def manifest(self, files, tmp_path):
        a, b, c, d, _ = (image_file(file, tmp_path) for file in files)
        return manifest_of([a], [], [a, b], [c, d, c])

    def test_no_changes(self, manifest, tmp_path):
        assert manifest.changed_records(tmp_path).tolist() == []
        assert len(manifest.names) == 4

    def test_changed_and_missing_files(self, manifest, files, tmp_path):
        files[3].write_bytes(b"other")
        assert manifest.changed_records(tmp_path).tolist() == [3]
        files[0].unlink()
        assert manifest.changed_records(tmp_path).tolist() == [0, 2, 3]

    def test_modification_time(self, manifest, files, tmp_path):
        status = files[1].stat()
        os.utime(files[1], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert manifest.changed_records(tmp_path).tolist() == [2]

    def test_link_with_a_new_target(self, files, tmp_path):
        (tmp_path / "link.png").symlink_to(files[0])
        manifest = manifest_of([image_file(tmp_path / "link.png", tmp_path)])
        assert manifest.changed_records(tmp_path).tolist() == []
        (tmp_path / "link.png").unlink()
        (tmp_path / "link.png").symlink_to(files[4])
        assert manifest.changed_records(tmp_path).tolist() == [0]

    def test_absolute_path(self, files, tmp_path):
        manifest = manifest_of([image_file(files[0], tmp_path)._replace(name=str(files[0]))])
        assert manifest.changed_records(tmp_path / "elsewhere").tolist() == []

    def test_several_chunks(self, files, tmp_path, monkeypatch):
        monkeypatch.setattr(image_manifest, "_CHUNK", 2)
        manifest = manifest_of(*([image_file(file, tmp_path)] for file in files))
        files[1].unlink()
        files[4].write_bytes(b"")
        assert manifest.changed_records(tmp_path).tolist() == [1, 4]

    def test_empty_manifest(self, tmp_path):
        assert ImageManifest.empty().changed_records(tmp_path).tolist() == []


FILES = st.builds(ImageFile, st.sampled_from("abcd"), st.integers(0, 2), st.integers(0, 2**62))


class TestUpdate:
    @settings(max_examples=80)
    @given(
        first=st.lists(st.lists(FILES, max_size=3), min_size=5, max_size=5),
        updates=st.dictionaries(st.integers(0, 4), st.lists(FILES, max_size=3)),
    )
    def test_matches_a_dictionary(self, first, updates):
        manifest = manifest_of(*first).update(np.array(list(updates), np.int64), list(updates.values()))
        expected = {**dict(enumerate(first)), **updates}
        assert images_by_record(manifest) == {
            record: set(images) for record, images in expected.items() if images
        }
        assert len(manifest.names) == len({image for images in expected.values() for image in images})
        restored = ImageManifest.from_arrays(manifest.to_arrays(), 5)
        assert restored.equals(manifest)

    def test_update_without_images(self, files, tmp_path):
        manifest = manifest_of(*([image_file(file, tmp_path)] for file in files[:3]))
        assert manifest.update(np.array([3]), [()]).equals(manifest)
        assert not manifest.update(np.array([2]), [()]).equals(manifest)


class TestArrays:
    def test_names_that_are_not_utf8(self, files, tmp_path):
        latin1 = tmp_path / os.fsdecode(b"latin-\xe4.png")
        latin1.write_bytes(b"x")
        manifest = manifest_of(*([image_file(file, tmp_path)] for file in [*files, latin1]))
        restored = ImageManifest.from_arrays(manifest.to_arrays(), 6)
        assert restored.names == manifest.names
        assert restored.changed_records(tmp_path).tolist() == []

    @pytest.mark.parametrize("change", [
        {"uses": np.array([[9, 0]], np.int32)}, {"uses": np.array([[0, 5]], np.int32)},
        {"uses": np.array([[-1, 0]], np.int32)}, {"uses": np.zeros(4, np.int32)},
        {"states": np.zeros((2, 2), np.int64)}, {"states": np.zeros((5, 2), np.float64)},
    ])  # fmt: skip
    def test_inconsistent_arrays(self, files, tmp_path, change):
        arrays = manifest_of(*([image_file(file, tmp_path)] for file in files)).to_arrays()
        with pytest.raises(ValueError, match="the image manifest"):
            ImageManifest.from_arrays({**arrays, **change}, 5)

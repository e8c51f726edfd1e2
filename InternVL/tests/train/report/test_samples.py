"""Thumbnails of the figures of sample answers."""

from pathlib import Path

import pytest
from data.storage.test_manifest import write_tar
from small_sets import noise

from internvl_chat.train.report.samples import _thumbnail


@pytest.fixture
def figure(tmp_path):
    noise(60, 40, seed=1).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_images_in_shards_are_shown(figure, tmp_path):
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards/x-0.tar", [("PMC1/a.png", figure.read_bytes())])
    expected = _thumbnail(figure)
    assert expected is not None
    assert _thumbnail(tmp_path / "shards/PMC1/a.png") == expected


def test_images_that_cannot_be_read(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/x-0.tar").write_bytes(b"damaged")
    for name in ("nowhere/a.png", "shards/a.png", "s3://bucket/a.png"):
        assert _thumbnail(tmp_path / name) is None
    assert _thumbnail(Path("s3://bucket/a.png")) is None

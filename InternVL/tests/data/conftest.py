"""Shared fixtures of the data tests."""

import pytest
from small_sets import smooth


@pytest.fixture
def folder(tmp_path):
    """Folder with a wide image a.png and a tall image b.jpg."""
    (tmp_path / "images").mkdir()
    smooth(60, 20).save(tmp_path / "images/a.png")
    smooth(20, 60, seed=1).save(tmp_path / "images/b.jpg")
    return tmp_path

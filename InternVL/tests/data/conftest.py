"""What tests of the data share."""

import pytest
from small_sets import smooth


@pytest.fixture
def folder(tmp_path):
    """A folder with the images a.png, wide, and b.jpg, high."""
    (tmp_path / "images").mkdir()
    smooth(60, 20).save(tmp_path / "images/a.png")
    smooth(20, 60, seed=1).save(tmp_path / "images/b.jpg")
    return tmp_path

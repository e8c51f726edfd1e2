"""Previews and tiles of a record's images."""

import io

import numpy as np
import pytest
from PIL import Image
from small_sets import break_inside, encoder, image_record, noise, text_record, write_set

from internvl_chat.data.browse import pictures
from internvl_chat.data.sources import preview
from internvl_chat.data.sources.problems import RecordError


@pytest.fixture
def records(tmp_path):
    (tmp_path / "images").mkdir()
    noise(80, 20, seed=1).save(tmp_path / "images/wide.png")
    noise(20, 300, seed=2).save(tmp_path / "images/tall.png")
    lines = [text_record(0), image_record(1, "wide.png", "tall.png"), image_record(2, "none.png", "wide.png")]
    return write_set(tmp_path, lines, by=encoder(max_dynamic_patch=6))


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_tiles_are_those_of_training(records):
    expected = records.load(1).tiles.numpy()
    grids = records.encode(1)[1].grids
    shown = [
        pixels(pictures.tile(records, 1, image, number))
        for image, grid in enumerate(grids)
        for number in range(grid.tiles)
    ]
    assert np.array_equal(np.stack(shown), expected)


def test_tiles_are_decoded_once(records, monkeypatch):
    decoded, decode = [], pictures.decode_image
    monkeypatch.setattr(pictures, "decode_image", lambda path, o: (decoded.append(path), decode(path, o))[1])
    first = pictures.tile(records, 1, 0, 0)
    pictures.tile(records, 1, 0, 1)
    assert len(decoded) == 1
    noise(80, 20, seed=9).save(records.spec.root / "wide.png")
    assert pictures.tile(records, 1, 0, 0) != first and len(decoded) == 2


def test_sizes_of_previews(records, tmp_path):
    noise(2000, 1000).save(tmp_path / "images/wide.png")
    assert pixels(pictures.figure(records, 1, 0)).shape == (600, 1200, 3)
    assert pixels(pictures.thumbnail(records, 1, 0)).shape == (100, 200, 3)


def test_large_images_have_no_thumbnail(records, monkeypatch):
    monkeypatch.setattr(preview, "MAX_DECODED_PIXELS", 1000)
    with pytest.raises(RecordError, match="too large for a thumbnail"):
        pictures.thumbnail(records, 1, 0)
    assert pictures.figure(records, 1, 0)


def test_encoder_options_apply_to_previews(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "images/clear.png")
    by = encoder(image_background="white")
    records = write_set(tmp_path, [image_record(0, "clear.png")], by=by)
    assert pixels(pictures.figure(records, 0, 0)).min() == 255
    assert pixels(pictures.tile(records, 0, 0, 0)).min() == 255


@pytest.mark.parametrize("image", [-1, 2, 10**12])
def test_no_such_image(records, image):
    for show in (pictures.thumbnail, pictures.figure, lambda *key: pictures.tile(*key, 0)):
        with pytest.raises(RecordError, match="the record has 2 images"):
            show(records, 1, image)


@pytest.mark.parametrize("number", [-1, 5, 10**12])
def test_no_such_tile(records, number):
    with pytest.raises(RecordError, match="image 0 has 4 tiles"):
        pictures.tile(records, 1, 0, number)


def test_unreadable_images(records, tmp_path):
    with pytest.raises(RecordError, match="does not exist"):
        pictures.thumbnail(records, 2, 0)
    with pytest.raises(RecordError, match="does not exist"):
        pictures.tile(records, 2, 1, 0)  # the record is unusable
    break_inside(tmp_path / "images/wide.png")
    for show in (pictures.thumbnail, pictures.figure, lambda *key: pictures.tile(*key, 0)):
        with pytest.raises(RecordError):
            show(records, 1, 0)

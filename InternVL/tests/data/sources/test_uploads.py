"""Uploaded images are decoded like files, within limits."""

import io

import numpy as np
import pytest
from PIL import Image
from small_sets import noise

from internvl_chat.data.sources import uploads
from internvl_chat.data.sources.image_content import ImageOptions
from internvl_chat.data.sources.images import decode_image
from internvl_chat.data.sources.uploads import MAX_IMAGES, decode_uploads, upload_warnings
from internvl_chat.utils.errors import DataError

OPTIONS = ImageOptions()


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_same_pixels_as_a_file(tmp_path, form):
    data = encoded(noise(40, 30), form)
    (tmp_path / "image").write_bytes(data)
    [found] = decode_uploads([data], OPTIONS)
    assert np.array_equal(np.asarray(found), np.asarray(decode_image(tmp_path / "image")))


def test_header_limits_are_checked_before_decoding(monkeypatch):
    monkeypatch.setattr(uploads, "MAX_PIXELS", 2000)
    assert len(decode_uploads([encoded(noise(40, 30))], OPTIONS)) == 1
    monkeypatch.setattr(uploads, "decode_opened", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match="the images have 2,400 pixels in total; at most 2,000 are allowed"):
        decode_uploads([encoded(noise(40, 30))] * 2, OPTIONS)


def test_decompression_bomb():
    """A header with 10 billion pixels."""
    bomb = bytearray(encoded(Image.new("1", (8, 8))))
    bomb[16:24] = (100_000).to_bytes(4, "big") * 2
    bomb[29:33] = b"\0" * 4
    with pytest.raises(DataError, match="the image #1"):
        decode_uploads([bytes(bomb)], OPTIONS)


def test_all_bad_images_are_reported():
    good = encoded(noise(40, 30))
    with pytest.raises(DataError) as caught:
        decode_uploads([b"hello", good, encoded(Image.new("I;16", (4, 4)))], OPTIONS)
    assert "2 problems" in str(caught.value) and "#1" in str(caught.value)
    assert "the image #3 has more than 8 bits per channel" in str(caught.value)
    with pytest.raises(DataError) as caught:
        decode_uploads([good, good[:-700], good[:-500]], OPTIONS)
    assert "the image #2 cannot be decoded" in str(caught.value) and "#3" in str(caught.value)


def test_number_of_images():
    with pytest.raises(DataError, match=f"{MAX_IMAGES + 1} images; at most {MAX_IMAGES} are allowed"):
        decode_uploads([b""] * (MAX_IMAGES + 1), OPTIONS)


def test_names_in_messages():
    with pytest.raises(DataError) as caught:
        decode_uploads([b"", b"hello"], OPTIONS, ["Fig-0", "scan.dcm"])
    assert "the image Fig-0 cannot be read: it is empty" in str(caught.value)
    assert "the image scan.dcm cannot be read" in str(caught.value)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG2000", "AVIF"])
def test_warnings(form):
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 40))
    data = encoded(image, form)
    assert upload_warnings(data, "a", OPTIONS) == ["a: the transparency is dropped"]
    assert upload_warnings(data, "a", ImageOptions(background="white")) == []
    image.putalpha(255)
    assert upload_warnings(encoded(image, form), "a", OPTIONS) == []


def test_warnings_about_frames():
    buffer = io.BytesIO()
    noise(40, 30).save(buffer, "TIFF", save_all=True, append_images=[noise(40, 30)] * 2)
    assert upload_warnings(buffer.getvalue(), "a", OPTIONS) == [
        "a: only the first of 3 pages or frames is used"
    ]

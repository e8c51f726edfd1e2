"""Image names that are not files: URLs, embedded images, different Unicode form or case."""

import base64
import unicodedata
from pathlib import Path

import pytest
from small_sets import noise

from internvl_chat.data.sources.image_names import describe_missing, describe_remote
from internvl_chat.data.sources.images import image_size, locate_image
from internvl_chat.data.sources.problems import RecordError

NAME = "caf\u00e9 \u1e69.png"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("https://example.org/a.png", "is a URL (https://), which is not supported"),
        ("s3://bucket/a.png", "is a URL (s3://), which is not supported"),
        ("gs://bucket/a.png", "(gs://)"),
        ("hf://datasets/x/a.png", "(hf://)"),
        ("file:///data/a.png", "without file://"),
        ("data:image/png;base64,iVBORw0KGgo=", "embedded as base64"),
        (base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(60)).decode(), "embedded as base64"),
        (base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(60)).decode(), "embedded as base64"),
    ],
)
def test_remote(tmp_path, name, part):
    assert part in describe_remote(name)
    with pytest.raises(RecordError) as caught:
        locate_image(tmp_path, name)
    assert part in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["a.png", "sub/a.png", "/data/a.png", "C:/a.png", "http.png", "x" * 200 + ".png"]
)
def test_path(name):
    assert describe_remote(name) is None


@pytest.mark.parametrize(("on_disk", "given"), [("NFD", "NFC"), ("NFC", "NFD")])
@pytest.mark.parametrize("folder", ["", "r\u00e9sum\u00e9"])
def test_other_unicode_form(tmp_path, on_disk, given, folder):
    path = tmp_path / unicodedata.normalize(on_disk, f"{folder}/{NAME}".lstrip("/"))
    path.parent.mkdir(exist_ok=True)
    noise(4, 4).save(path)
    wanted = tmp_path / unicodedata.normalize(given, f"{folder}/{NAME}".lstrip("/"))
    with pytest.raises(RecordError, match="differs only in Unicode normalization") as caught:
        image_size(wanted)
    assert f"its name is in {on_disk}, the given name in {given}" in str(caught.value)
    assert "\\" in str(caught.value)  # the names look alike


@pytest.mark.parametrize("given", ["A.PNG", "a.PNG", "a.png "])
def test_similar_name(tmp_path, given):
    noise(4, 4).save(tmp_path / "a.png")
    assert describe_missing(tmp_path / given) == "the folder contains a.png; names must match exactly"


def test_backslashes(tmp_path):
    (tmp_path / "sub").mkdir()
    noise(4, 4).save(tmp_path / "sub/a.png")
    assert "exists: use / instead of" in describe_missing(Path(f"{tmp_path}/sub\\a.png"))


def test_nothing_similar(tmp_path):
    assert describe_missing(tmp_path / "no/such.png") is None
    with pytest.raises(RecordError, match="does not exist; check 'root' in the meta file"):
        image_size(tmp_path / "a.png")

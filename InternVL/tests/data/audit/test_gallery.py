"""Image thumbnails of records with problems."""

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image
from small_sets import encoder, image_record, noise, text_record, write_lines

from internvl_chat.data.audit.checks import audit
from internvl_chat.data.audit.gallery import KINDS_WITH_IMAGES, MAX_PER_KIND, gallery
from internvl_chat.data.sources import preview
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.data.sources.problems import KINDS, Problem


@pytest.fixture
def show(tmp_path):
    """Write and check records; return the gallery of one kind of problem."""
    (tmp_path / "images").mkdir()

    def show(records, kind, problems=None) -> str:
        spec = DatasetSpec("set", tmp_path / "images", write_lines(tmp_path / "set.jsonl", records))
        result = audit([spec], encoder(), cache=tmp_path / "cache")
        found = [p for p in result.problems if p.kind == kind] if problems is None else problems
        assert found
        return gallery(found, result)

    return show


def thumbnails(text: str) -> list[Image.Image]:
    found = re.findall(r"src='data:image/jpeg;base64,([^']+)'", text)
    return [Image.open(io.BytesIO(base64.b64decode(content))) for content in found]


def problem(index, message="", kind="similar image", file="set.jsonl") -> Problem:
    return Problem("set", index, Path(file), index + 1, None, kind, message)


def test_duplicate_records_show_their_image(show, tmp_path):
    noise(300, 100).save(tmp_path / "images/a.png")
    text = show([image_record(0, "a.png"), image_record(0, "a.png")], "duplicate record")
    [image] = thumbnails(text)
    assert image.size == (160, 53)
    assert "a.png<br>set.jsonl:2" in text


def test_broken_images_are_listed(show, tmp_path):
    (tmp_path / "images/<b>.png").write_bytes(b"no image")
    text = show([image_record(0, "<b>.png")], "image unreadable")
    assert not thumbnails(text)
    assert "<div class='broken'>image unreadable</div>" in text
    assert "&lt;b&gt;.png" in text and "<b>" not in text
    assert "image missing</div>" in show([image_record(0, "none.png")], "image missing")


def test_only_images_mentioned_in_the_message(show, tmp_path):
    names = ["a.png", "b_a.png", "a.png_1.png"]
    for name in names:
        noise(30, 30).save(tmp_path / "images" / name)
    record = image_record(0, *names)
    text = show([record], None, [problem(0, f"{tmp_path}/images/a.png looks like x.png")])
    assert re.findall(r"alt='([^']+)'", text) == ["a.png"]
    everything = show([record], None, [problem(0, "looks like x.png")])
    assert re.findall(r"alt='([^']+)'", everything) == names


def test_number_and_size_are_bounded(show, tmp_path):
    records = []
    for number in range(MAX_PER_KIND + 3):
        noise(900, 700, seed=number).save(tmp_path / f"images/{number}.jpg")
        records.append(image_record(number, f"{number}.jpg"))
    text = show(records, None, [problem(n) for n in range(len(records))])
    assert len(thumbnails(text)) == MAX_PER_KIND
    assert all(max(image.size) <= 160 for image in thumbnails(text))
    assert len(text) < MAX_PER_KIND * 40_000


def test_an_image_is_shown_once(show, tmp_path):
    noise(30, 30).save(tmp_path / "images/a.png")
    records = [image_record(n, "a.png") for n in range(3)]
    assert len(thumbnails(show(records, None, [problem(n) for n in range(3)]))) == 1


def test_large_images_are_not_decoded(show, tmp_path, monkeypatch):
    noise(30, 30).save(tmp_path / "images/a.png")
    monkeypatch.setattr(preview, "MAX_DECODED_PIXELS", 800)
    text = show([image_record(0, "a.png")], None, [problem(0)])
    assert "too large for a thumbnail</div>" in text


def test_nothing_to_show(show):
    assert show([text_record(0), text_record(0)], "duplicate record") == ""
    assert show([text_record(0), text_record(0)], "duplicate id") == ""
    assert show([b"{"], None, [problem(0)]) == ""
    whole_file = problem(0)._replace(index=None)
    assert show([text_record(0)], None, [whole_file, problem(0)._replace(dataset="other")]) == ""


def test_kinds_exist():
    assert set(KINDS) > KINDS_WITH_IMAGES

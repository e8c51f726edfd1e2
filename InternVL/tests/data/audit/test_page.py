"""The HTML page of a data check."""

import re
from datetime import UTC, datetime

import pytest
from small_sets import encoder, image_record, noise, text_record, write_lines

from internvl_chat import __version__
from internvl_chat.data.audit import page
from internvl_chat.data.audit.checks import audit
from internvl_chat.data.audit.page import report_page
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.data.sources.problems import KINDS, REMEDIES


@pytest.fixture
def show(tmp_path):
    """Write and check records; return the page."""

    def show(*records, inputs=None) -> str:
        (tmp_path / "images").mkdir(exist_ok=True)
        spec = DatasetSpec("set", tmp_path / "images", write_lines(tmp_path / "set.jsonl", list(records)))
        result = audit([spec], encoder(), cache=tmp_path / "cache")
        return report_page(result, result.problems, b"plot", inputs or {}, "problems.jsonl")

    return show


def test_head_has_inputs_date_and_versions(show):
    command = "m3llm data check 'my <data>.json'"
    text = show(text_record(0), inputs={"model": "OpenGVLab/InternVL3-8B", "command": command})
    assert "<dt>model</dt><dd>OpenGVLab/InternVL3-8B</dd>" in text
    assert "<dt>command</dt><dd><code>m3llm data check &#x27;my &lt;data&gt;.json&#x27;</code></dd>" in text
    [date] = re.findall(r"<dt>date</dt><dd>([\d-]+ [\d:]+)", text)
    now = datetime.now(UTC)
    shown = datetime.strptime(date, "%Y-%m-%d %H:%M").replace(tzinfo=UTC)
    assert abs((now - shown).total_seconds()) < 24 * 3600
    assert f"m3llm {__version__}, Python 3." in text


def test_counts(show):
    text = show(text_record(0), text_record(0), b"{")
    boxes = re.findall(r"<div class='(\w+)'><b>(\d+)</b>([^<]+)</div>", text)
    assert boxes == [
        ("error", "2", "of 3 records can be used"), ("error", "1", "errors"), ("warning", "2", "warnings"),
        ("ok", "0", "leaks"),
    ]  # fmt: skip
    clean = show(text_record(0))
    assert all(style == "ok" for style, *_ in re.findall(r"<div class='(\w+)'><b>(\d+)</b>", clean))
    assert "Problems by kind" not in clean


def test_problems_have_meaning_remedy_file_and_line(show):
    text = show(text_record(0), b"{")
    assert f"<p>{KINDS['json']}<br><b>Remedy:</b> {REMEDIES['json']}</p>" in text
    assert "<td>set.jsonl:2</td>" in text


def test_errors_are_open_and_warnings_closed(show):
    text = show(text_record(0), text_record(0), b"{")
    opened = re.findall(r"<details( open)?><summary class='(\w+)'>([\w ]+): (\d)", text)
    assert opened == [
        (" open", "error", "json", "1"), ("", "warning", "duplicate id", "1"),
        ("", "warning", "duplicate record", "1"),
    ]  # fmt: skip


def test_thumbnails(show, tmp_path):
    (tmp_path / "images").mkdir()
    noise(40, 30).save(tmp_path / "images/a.png")
    text = show(image_record(0, "a.png"), image_record(0, "a.png"))
    assert text.count("src='data:image/jpeg") == 1
    assert not re.search(r"(src|href)=['\"](?!data:)", text)


def test_examples_are_bounded(show, monkeypatch):
    monkeypatch.setattr(page, "_MAX_SHOWN", 2)
    text = show(*[b"{"] * 5)
    assert text.count("<td>set.jsonl:") == 2
    assert "and 3 more; see problems.jsonl for all" in text


def test_every_kind_has_a_remedy():
    assert REMEDIES.keys() == KINDS.keys()

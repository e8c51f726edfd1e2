"""Content of record pages, for usable and unusable records."""

import json

import pytest
from small_sets import encoder, image_record, noise, text_record, write_set

from internvl_chat.data.browse.record_view import view_record
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.sources.problems import Problem


@pytest.fixture
def view(tmp_path):
    """Write one record, and return its view."""
    (tmp_path / "images").mkdir()
    noise(80, 20).save(tmp_path / "images/wide.png")

    def view(record, by=None, compared=(), **options):
        records = write_set(tmp_path, [text_record(0), record], by=by or encoder(**options))
        return view_record(records, 1, compared)

    return view


def kinds(view) -> list[str]:
    return [problem.kind for problem in view.problems]


def test_usable_record(view):
    duplicate = Problem("qa", 1, None, 2, "r1", "duplicate id", "same id as line 1")
    shown = view(image_record(1, "wide.png"), compared=[duplicate])
    assert (shown.id, shown.line, shown.problems) == ("r1", 2, [duplicate])
    [image] = shown.images
    assert (image.name, image.size, image.error) == ("wide.png", (80, 20), None)
    assert shown.lengths == shown.records.measure(1)
    assert (image.grid.tiles, shown.image_tokens) == (shown.lengths.tiles, 3 * shown.lengths.tiles)
    assert sum(message.tokens for message in shown.messages) == shown.lengths.tokens
    assert json.loads(shown.raw) == image_record(1, "wide.png")


def test_record_that_lost_tiles(view):
    record = image_record(1, "wide.png")
    shown = view(record, max_seq_length=view(record).lengths.tokens - 1)
    assert shown.lengths.tiles_lost and kinds(shown) == ["fewer tiles"]
    assert shown.images[0].grid.tiles == shown.lengths.tiles
    assert shown.problems[0].message == f"{shown.lengths.tiles} tiles instead of 5"


def test_truncated_text(view):
    shown = view(text_record(1, "a cat " * 400), by=encoder(truncate_text=True))
    assert shown.lengths.tokens == 400 and kinds(shown) == ["text truncated"]


def test_without_tokenizer(view):
    by = RecordEncoder(None, encoder().preprocessing)
    shown = view(image_record(1, "wide.png", "wide.png"), by=by)
    assert [image.grid.tiles for image in shown.images] == [3, 3]
    assert shown.lengths.tiles == 6 and not shown.image_tokens
    assert [segment.text for message in shown.messages for segment in message.segments][-1] == "a cat"


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (text_record(1, "a cat " * 400), "too long"),
        (image_record(1, "wide.png", "none.png"), "image missing"),
        (image_record(1, "wide.png", "../../x.png"), "image outside root"),
        (image_record(1, "wide.png", "https://x/y.png"), "image missing"),
    ],
)
def test_unusable_record_with_messages(view, record, kind):
    shown = view(record)
    assert kinds(shown) == [kind] and shown.lengths is None
    assert [message.role for message in shown.messages] == ["user", "assistant"]
    assert [image.grid for image in shown.images] == [None] * len(record.get("image", []))
    assert [image.error is None for image in shown.images] == [True, False][: len(shown.images)]


@pytest.mark.parametrize(
    ("line", "kind", "raw"),
    [
        (b'{"id": 1', "json", '{"id": 1'),
        (b"\xff{}", "encoding", "\ufffd{}"),
        (b"[1, 2]", "structure", "[\n  1,\n  2\n]"),
        (b'{"id": [1], "conversations": []}', "structure", None),
        (b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", "structure", None),
    ],
)
def test_malformed_record(view, line, kind, raw):
    shown = view(line)
    assert kinds(shown) == [kind] and not shown.messages and not shown.images
    assert raw is None or shown.raw == raw


def test_large_record(view):
    shown = view(text_record(1, "x" * 300_000))
    assert len(shown.raw) == 200_000 and shown.is_raw_cut and shown.raw_bytes > 300_000
    assert kinds(shown) == ["too long"]


def test_ids_of_other_types(view):
    assert view({**text_record(1), "id": {"a": 1}}).id == "{'a': 1}"
    assert view({**text_record(1), "id": 1.5}).id == "1.5"
    assert view({**text_record(1), "id": "line\nbreak"}).id == "line\\nbreak"
    assert view({**text_record(1), "id": None}).id is None

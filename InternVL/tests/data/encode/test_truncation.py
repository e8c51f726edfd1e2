"""Texts that are cut: exactly to the limit, never into an image, and measured as they are encoded."""

import logging

import pytest
import small_sets
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from small_sets import TOKENS, image_record, noise, text_record, tokenizer, write_set

from internvl_chat.data.encode.conversation import Template
from internvl_chat.data.sources.problems import RecordProblem
from internvl_chat.data.sources.records import Message

WIDE = (400, 100)


@pytest.fixture(autouse=True)
def _warnings_are_seen(monkeypatch):
    monkeypatch.setattr(logging.getLogger("internvl_chat"), "propagate", True)


def encoder(**options):
    return small_sets.encoder(**{"system_text": "s", **options})


def messages_of(*texts: str) -> list[Message]:
    return [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def problem_of(by, messages, sizes) -> str:
    with pytest.raises(RecordProblem) as caught:
        by.encode(messages, sizes)
    assert caught.value.kind == "too long"
    with pytest.raises(RecordProblem) as again:
        by.measure(messages, sizes)
    assert str(again.value) == str(caught.value)
    return str(caught.value)


LONG = messages_of("<image>\nwhat is this ?", "a cat on a mat " * 30)


def test_the_end_is_cut_to_the_limit():
    whole = encoder(max_seq_length=10_000).encode(LONG, [(10, 10)])
    cut = encoder(max_seq_length=100, truncate_text=True).encode(LONG, [(10, 10)])
    assert len(cut.input_ids) == 100
    assert torch.equal(cut.input_ids, whole.input_ids[:100])
    assert torch.equal(cut.labels, whole.labels[:100])
    assert torch.equal(cut.image_positions, whole.image_positions)
    assert cut.tokens_cut == cut.measured.tokens_cut == len(whole.input_ids) - 100
    assert whole.tokens_cut == 0


def test_tiles_go_first():
    fits = encoder(max_seq_length=10_000).encode(LONG, [WIDE])
    limit = len(fits.input_ids) - 4 * TOKENS
    cut = encoder(max_seq_length=limit, truncate_text=True).encode(LONG, [WIDE])
    assert (cut.num_tiles, cut.tokens_cut, cut.measured.tiles_lost) == (1, 0, 4)
    assert len(cut.input_ids) == limit
    shorter = encoder(max_seq_length=limit - 1, truncate_text=True).encode(LONG, [WIDE])
    assert (shorter.num_tiles, shorter.tokens_cut, len(shorter.input_ids)) == (1, 1, limit - 1)


def test_nothing_is_cut_without_the_option():
    message = problem_of(encoder(max_seq_length=100), LONG, [(10, 10)])
    assert message.endswith("tokens even with one tile an image, more than max_seq_length 100")
    fits = encoder(max_seq_length=10_000)
    assert fits.encode(LONG, [WIDE]).measured == encoder(max_seq_length=10_000, truncate_text=True).measure(
        LONG, [WIDE]
    )


def test_an_image_is_never_cut():
    messages = messages_of("what ?", "a cat " * 40, "<image>\nand this ?", "a mat")
    by = encoder(max_seq_length=10_000)
    whole = by.encode(messages, [(10, 10)])
    # The last of the image's tokens, and the one that closes it.
    needed = int(whole.image_positions[-1]) + 2
    message = problem_of(encoder(max_seq_length=needed - 1, truncate_text=True), messages, [(10, 10)])
    assert message.endswith(f"more than max_seq_length {needed - 1}; cut to that, it would lose an image")
    cut = encoder(max_seq_length=needed, truncate_text=True).encode(messages, [(10, 10)])
    assert tokenizer().convert_ids_to_tokens(int(cut.input_ids[-1])) == "</img>"
    assert cut.num_supervised > 0


def test_something_stays_to_be_learnt():
    messages = messages_of("what is this " * 50, "a cat")
    whole = encoder(max_seq_length=10_000).encode(messages, [])
    first = int((whole.labels >= 0).nonzero()[0])
    message = problem_of(encoder(max_seq_length=first, truncate_text=True), messages, [])
    assert message.endswith(
        f"more than max_seq_length {first}; cut to that, it would lose all that is learnt"
    )
    assert encoder(max_seq_length=first + 1, truncate_text=True).encode(messages, []).num_supervised == 1


def test_a_prompt_is_never_cut():
    with pytest.raises(RecordProblem, match="more than max_seq_length 100"):
        encoder(max_seq_length=100, truncate_text=True).encode_prompt(messages_of("what " * 200), [])


def test_the_option_outlives_another_tile_limit():
    assert encoder(truncate_text=True).with_max_tiles(2).truncate_text
    assert not encoder().with_max_tiles(2).truncate_text


@settings(max_examples=200)
@given(
    texts=st.lists(st.text("ab <>\n中é", max_size=40), min_size=2, max_size=6),
    shown=st.lists(st.booleans(), min_size=3, max_size=3),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    limit=st.integers(25, 150),
)
def test_measured_as_encoded_and_whole_images(texts, shown, size, limit):
    messages = messages_of(*texts)
    messages = [
        Message(t.role, "<image>" * (t.role == "user" and shown[i // 2]) + t.content)
        for i, t in enumerate(messages)
    ]
    sizes = [size] * sum(t.content.count("<image>") for t in messages if t.role == "user")
    by, free = encoder(max_seq_length=limit, truncate_text=True), encoder(max_seq_length=100_000)
    try:
        found = by.encode(messages, sizes)
    except RecordProblem as problem:
        with pytest.raises(RecordProblem) as caught:
            by.measure(messages, sizes)
        assert (str(caught.value), caught.value.kind) == (str(problem), problem.kind)
        return
    assert by.measure(messages, sizes) == found.measured
    assert len(found.input_ids) <= limit
    assert found.num_supervised > 0
    ids = found.input_ids.tolist()
    names = ("<img>", "</img>", "<IMG_CONTEXT>")
    begin, end, context = (ids.count(tokenizer().convert_tokens_to_ids(name)) for name in names)
    assert context == found.num_tiles * TOKENS == len(found.image_positions)
    assert begin == end == len(sizes)
    event("cut" if found.tokens_cut else "whole")
    if found.tokens_cut:
        assert len(ids) == limit
        assert all(grid.tiles == 1 for grid in found.grids)
        one_tile = free.with_max_tiles(1).encode(messages, sizes)
        assert torch.equal(found.input_ids, one_tile.input_ids[:limit])
        assert torch.equal(found.labels, one_tile.labels[:limit])
        assert len(one_tile.input_ids) - limit == found.tokens_cut


def test_what_is_cut_is_named(tmp_path, caplog):
    (tmp_path / "images").mkdir()
    noise(40, 10).save(tmp_path / "images/wide.png")
    long = image_record(1, "wide.png", answer="a cat " * 200)
    records = write_set(tmp_path, [text_record(0), long], by=encoder(truncate_text=True))
    sample = records.load(1)
    cut = sample.encoded.tokens_cut
    assert cut > 0
    assert (
        f"qa.jsonl, line 2 (record 'r1'): 1 tiles instead of 5 and the last {cut} tokens are cut off"
        in caplog.text
    )
    assert "to fit max_seq_length 400" in caplog.text
    assert records.examine(1).measured == sample.encoded.measured


class TestEndlessTexts:
    """What cannot fit by any means is refused before it costs minutes and gigabytes to tokenise."""

    @pytest.fixture(autouse=True)
    def _no_tokenizing(self, monkeypatch):
        monkeypatch.setattr(Template, "_tokenize", lambda *_: pytest.fail("was tokenised"))

    def test_characters(self):
        by = encoder(max_seq_length=50)
        message = problem_of(by, messages_of("what", "中" * 3_000_000), [])
        assert message == "3,000,004 characters cannot fit into max_seq_length 50"

    @pytest.mark.parametrize("truncate", [False, True])
    def test_turns(self, truncate):
        by = encoder(max_seq_length=50, truncate_text=truncate)
        assert "messages cannot fit into max_seq_length 50" in problem_of(
            by, messages_of(*["a"] * 600_000), []
        )

    def test_images(self):
        by = encoder(max_seq_length=50)
        assert problem_of(by, messages_of("<image>" * 26, "a"), [(1, 1)] * 26).startswith(
            "26 images cannot fit"
        )


def test_what_may_fit_is_never_refused_untokenised():
    """The longest token fills the row, and a text that grows shorter when it is put together."""
    by = encoder(max_seq_length=400)
    longest = max(set(tokenizer().get_vocab()) - {"<IMG_CONTEXT>"}, key=len)
    with pytest.raises(RecordProblem, match="tokens, more than"):
        by.measure(messages_of("what", longest * 399), [])
    by.refuse_endless(messages_of("e\u0301" * (400 * len(longest) - 50), "a"), 0)


def test_a_long_text_is_cut_not_refused():
    by = encoder(max_seq_length=50, truncate_text=True)
    assert len(by.encode(messages_of("what ?", "a cat " * 20_000), []).input_ids) == 50

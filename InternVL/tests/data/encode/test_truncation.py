"""Truncation: exactly to the limit, never within an image; `measure` and `encode` agree."""

import logging

import pytest
import small_sets
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from small_sets import TOKENS, image_record, noise, text_record, tokenizer, write_set

from internvl_chat.data.encode.conversation import Template
from internvl_chat.data.sources.problems import RecordError
from internvl_chat.data.sources.records import Message

WIDE = (400, 100)


@pytest.fixture(autouse=True)
def _warnings_are_seen(monkeypatch):
    monkeypatch.setattr(logging.getLogger("internvl_chat"), "propagate", True)


def encoder(**options):
    return small_sets.encoder(**{"system_text": "s", **options})


def messages_of(*texts: str) -> list[Message]:
    return [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def problem_of(record_encoder, messages, sizes) -> str:
    with pytest.raises(RecordError) as caught:
        record_encoder.encode(messages, sizes)
    assert caught.value.kind == "too long"
    with pytest.raises(RecordError) as again:
        record_encoder.measure(messages, sizes)
    assert str(again.value) == str(caught.value)
    return str(caught.value)


LONG = messages_of("<image>\nwhat is this ?", "a cat on a mat " * 30)


def test_truncated_to_the_limit():
    complete = encoder(max_seq_length=10_000).encode(LONG, [(10, 10)])
    truncated = encoder(max_seq_length=100, truncate_text=True).encode(LONG, [(10, 10)])
    assert len(truncated.input_ids) == 100
    assert torch.equal(truncated.input_ids, complete.input_ids[:100])
    assert torch.equal(truncated.labels, complete.labels[:100])
    assert torch.equal(truncated.image_positions, complete.image_positions)
    assert truncated.tokens_truncated == truncated.lengths.tokens_truncated == len(complete.input_ids) - 100
    assert complete.tokens_truncated == 0


def test_tiles_are_removed_before_text():
    fits = encoder(max_seq_length=10_000).encode(LONG, [WIDE])
    limit = len(fits.input_ids) - 4 * TOKENS
    truncated = encoder(max_seq_length=limit, truncate_text=True).encode(LONG, [WIDE])
    assert (truncated.num_tiles, truncated.tokens_truncated, truncated.lengths.tiles_lost) == (1, 0, 4)
    assert len(truncated.input_ids) == limit
    shorter = encoder(max_seq_length=limit - 1, truncate_text=True).encode(LONG, [WIDE])
    assert (shorter.num_tiles, shorter.tokens_truncated, len(shorter.input_ids)) == (1, 1, limit - 1)


def test_no_truncation_without_the_option():
    message = problem_of(encoder(max_seq_length=100), LONG, [(10, 10)])
    assert message.endswith("tokens even with one tile per image, more than max_seq_length 100")
    fits = encoder(max_seq_length=10_000)
    assert fits.encode(LONG, [WIDE]).lengths == encoder(max_seq_length=10_000, truncate_text=True).measure(
        LONG, [WIDE]
    )


def test_images_are_never_truncated():
    messages = messages_of("what ?", "a cat " * 40, "<image>\nand this ?", "a mat")
    by = encoder(max_seq_length=10_000)
    complete = by.encode(messages, [(10, 10)])
    # Up to the image's last token, and up to its end token.
    needed = int(complete.image_positions[-1]) + 2
    message = problem_of(encoder(max_seq_length=needed - 1, truncate_text=True), messages, [(10, 10)])
    assert message.endswith(f"more than max_seq_length {needed - 1}; truncation would remove an image")
    truncated = encoder(max_seq_length=needed, truncate_text=True).encode(messages, [(10, 10)])
    assert tokenizer().convert_ids_to_tokens(int(truncated.input_ids[-1])) == "</img>"
    assert truncated.num_supervised > 0


def test_some_supervised_tokens_remain():
    messages = messages_of("what is this " * 50, "a cat")
    complete = encoder(max_seq_length=10_000).encode(messages, [])
    first = int((complete.labels >= 0).nonzero()[0])
    message = problem_of(encoder(max_seq_length=first, truncate_text=True), messages, [])
    assert message.endswith(
        f"more than max_seq_length {first}; truncation would remove all supervised tokens"
    )
    assert encoder(max_seq_length=first + 1, truncate_text=True).encode(messages, []).num_supervised == 1


def test_prompts_are_never_truncated():
    with pytest.raises(RecordError, match="more than max_seq_length 100"):
        encoder(max_seq_length=100, truncate_text=True).encode_prompt(messages_of("what " * 200), [])


def test_option_is_independent_of_the_tile_limit_of_a_dataset(tmp_path):
    for truncate in (True, False):
        by = encoder(truncate_text=truncate)
        records = write_set(tmp_path, [text_record(0)], by=by, max_dynamic_patch=2)
        assert (records.encoder.truncate_text, records.encoder.preprocessing.max_dynamic_patch) == (
            truncate,
            2,
        )


@settings(max_examples=200)
@given(
    texts=st.lists(st.text("ab <>\n中é", max_size=40), min_size=2, max_size=6),
    with_image=st.lists(st.booleans(), min_size=3, max_size=3),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    limit=st.integers(25, 150),
)
def test_random_conversations(texts, with_image, size, limit):
    messages = messages_of(*texts)
    messages = [
        Message(t.role, "<image>" * (t.role == "user" and with_image[i // 2]) + t.content)
        for i, t in enumerate(messages)
    ]
    sizes = [size] * sum(t.content.count("<image>") for t in messages if t.role == "user")
    by = encoder(max_seq_length=limit, truncate_text=True)
    try:
        encoded = by.encode(messages, sizes)
    except RecordError as problem:
        with pytest.raises(RecordError) as caught:
            by.measure(messages, sizes)
        assert (str(caught.value), caught.value.kind) == (str(problem), problem.kind)
        return
    assert by.measure(messages, sizes) == encoded.lengths
    assert len(encoded.input_ids) <= limit
    assert encoded.num_supervised > 0
    ids = encoded.input_ids.tolist()
    names = ("<img>", "</img>", "<IMG_CONTEXT>")
    begin, end, context = (ids.count(tokenizer().convert_tokens_to_ids(name)) for name in names)
    assert context == encoded.num_tiles * TOKENS == len(encoded.image_positions)
    assert begin == end == len(sizes)
    event("truncated" if encoded.tokens_truncated else "complete")
    if encoded.tokens_truncated:
        assert len(ids) == limit
        assert all(grid.tiles == 1 for grid in encoded.grids)
        one_tile = encoder(max_seq_length=100_000, max_dynamic_patch=1).encode(messages, sizes)
        assert torch.equal(encoded.input_ids, one_tile.input_ids[:limit])
        assert torch.equal(encoded.labels, one_tile.labels[:limit])
        assert len(one_tile.input_ids) - limit == encoded.tokens_truncated


def test_truncation_is_logged(tmp_path, caplog):
    (tmp_path / "images").mkdir()
    noise(40, 10).save(tmp_path / "images/wide.png")
    long = image_record(1, "wide.png", answer="a cat " * 200)
    records = write_set(tmp_path, [text_record(0), long], by=encoder(truncate_text=True))
    sample = records.load(1)
    truncated = sample.encoded.tokens_truncated
    assert truncated > 0
    assert (
        f"qa.jsonl, line 2 (record 'r1'): 1 tiles instead of 5 and the last {truncated} tokens truncated"
        in caplog.text
    )
    assert "to fit max_seq_length 400" in caplog.text
    assert records.check(1).lengths == sample.encoded.lengths


class TestOversized:
    """Conversations that cannot fit are rejected before tokenization takes minutes and gigabytes."""

    @pytest.fixture(autouse=True)
    def _no_tokenizing(self, monkeypatch):
        monkeypatch.setattr(Template, "tokenize", lambda *_: pytest.fail("was tokenized"))

    def test_characters(self):
        by = encoder(max_seq_length=50)
        message = problem_of(by, messages_of("what", "中" * 3_000_000), [])
        assert message == "3,000,004 characters cannot fit in max_seq_length 50"

    @pytest.mark.parametrize("truncate", [False, True])
    def test_messages(self, truncate):
        by = encoder(max_seq_length=50, truncate_text=truncate)
        assert "messages cannot fit in max_seq_length 50" in problem_of(by, messages_of(*["a"] * 600_000), [])

    def test_images(self):
        by = encoder(max_seq_length=50)
        assert problem_of(by, messages_of("<image>" * 26, "a"), [(1, 1)] * 26).startswith(
            "26 images cannot fit"
        )


def test_conversations_that_may_fit_are_tokenized():
    """Text made of the longest tokens, and text that is shorter in NFC."""
    by = encoder(max_seq_length=400)
    longest = max(set(tokenizer().get_vocab()) - {"<IMG_CONTEXT>"}, key=len)
    with pytest.raises(RecordError, match="tokens, more than"):
        by.measure(messages_of("what", longest * 399), [])
    by.reject_oversized(messages_of("e\u0301" * (400 * len(longest) - 50), "a"), 0)


def test_long_text_is_truncated():
    by = encoder(max_seq_length=50, truncate_text=True)
    assert len(by.encode(messages_of("what ?", "a cat " * 20_000), []).input_ids) == 50

"""Streamed answers, and follow-up questions about the same images."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inference.prompts import TEXT, make_engine, mixed_prompts, picture

from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.tokenizer import decode_answer, decode_tokens
from internvl_chat.data.encode.tokenizer_training import train_tokenizer
from internvl_chat.data.sources.records import Message
from internvl_chat.inference import engine as module
from internvl_chat.inference import streaming
from internvl_chat.inference.engine import Prompt, ask
from internvl_chat.inference.sampling import Sampling
from internvl_chat.inference.streaming import AnswerText

TOKENIZER = train_tokenizer(TEXT, 280)


@pytest.mark.parametrize("sampling", [None, Sampling(2.0, seed=5)])
def test_joined_pieces_equal_the_answer(sampling):
    engine = make_engine()
    prompts = mixed_prompts(12)
    answers = engine.answer(prompts, max_new_tokens=24, sampling=sampling)
    for prompt, answer in zip(prompts, answers, strict=True):
        pieces = list(engine.stream(prompt, max_new_tokens=24, sampling=sampling))
        assert "".join(pieces) == answer
        assert all(pieces)
    assert any(len(answer) > 20 for answer in answers)


@pytest.mark.parametrize(
    "text", ["é", "naïve 漢字, 🙂!", "  a  b \n\n c  ", "x\ufffdy", "ends in half \ufffd", ""]
)
def test_characters_are_not_split(text, monkeypatch):
    """Multi-token characters, leading and trailing whitespace, and genuine replacement characters."""
    engine = make_engine()
    ids = engine.tokenizer(text).input_ids

    class Says:
        def run(self, prompts, **_):
            yield from ((0, token) for token in [*ids, None])

    monkeypatch.setattr(engine, "decoder", Says)
    pieces = list(engine.stream(ask("What?")))
    assert "".join(pieces) == text.strip() == engine.answer([ask("What?")])[0]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def pieces_of(tokenizer, ids, stop=()) -> tuple[list[str], AnswerText]:
    text = AnswerText(tokenizer, stop)
    pieces = [text.add(token) for token in ids]
    return [*pieces, text.finish()], text


@given(st.lists(st.integers(0, 279), max_size=60))
def test_any_tokens(ids):
    """Random tokens form invalid UTF-8, control tokens and whitespace."""
    pieces, _ = pieces_of(TOKENIZER, ids)
    assert "".join(pieces) == decode_answer(TOKENIZER, ids)


@pytest.mark.parametrize("text", ["\ufffd", "é", "🙂", "a"])
def test_time_is_linear(text, monkeypatch):
    """Each call decodes only a few tokens, even if invalid bytes never form a character."""
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    ids = ids[:1] * 500 if text != "a" else ids * 500
    longest = []

    def counted(tokenizer, tokens):
        longest.append(len(tokens))
        return decode_tokens(tokenizer, tokens)

    monkeypatch.setattr(streaming, "decode_tokens", counted)
    pieces, _ = pieces_of(TOKENIZER, ids)
    assert "".join(pieces) == decode_answer(TOKENIZER, ids)
    assert max(longest) < 10


@given(st.text("abé ", max_size=30), st.text("abé ", min_size=1, max_size=4))
def test_stop_strings(text, stop):
    """A stop string is found in any split into tokens, and no part of it is returned."""
    pieces, found = pieces_of(TOKENIZER, TOKENIZER(text, add_special_tokens=False).input_ids, [stop])
    answer = text.lstrip()
    assert "".join(pieces) == answer.split(stop)[0].rstrip()
    assert found.stopped == (stop in answer)


def test_tokens_after_a_stop_string_are_ignored():
    ids = TOKENIZER("ab cd ef", add_special_tokens=False).input_ids
    pieces, found = pieces_of(TOKENIZER, ids, ["ef", "cd"])
    assert "".join(pieces) == "ab" and found.stopped
    assert found.add(ids[0]) == found.finish() == ""


def test_a_piece_comes_before_the_answer_is_complete(monkeypatch):
    engine = make_engine()
    steps = []
    forward = module.Decoder._logits

    def counted(self, *args):
        steps.append(1)
        return forward(self, *args)

    monkeypatch.setattr(module.Decoder, "_logits", counted)
    pieces = engine.stream(mixed_prompts(1)[0], max_new_tokens=40)
    next(pieces)
    assert len(steps) < 10
    list(pieces)
    assert len(steps) > 10


def test_answer_each_matches_answer():
    engine = make_engine()
    prompts = mixed_prompts(20)
    expected = engine.answer(prompts, max_new_tokens=8)
    found = dict(engine.answer_each(iter(prompts), max_new_tokens=8))
    assert [found[number] for number in range(20)] == expected


def test_follow_up_question():
    images = [picture(seed=1), picture(seed=2)]
    prompt = ask("Which?", images, system="Be brief.").then("The first.", "Why?")
    assert prompt == Prompt(
        (
            Message("system", "Be brief."),
            Message("user", "Fig-0: <image>\nFig-1: <image>\nWhich?"),
            Message("assistant", "The first."),
            Message("user", "Why?"),
        ),
        tuple(images),
    )


def test_image_features_are_cached(monkeypatch):
    engine = make_engine()
    looked = []
    look = module.tile_features

    def counted(model, tiles, normalization):
        looked.append(len(tiles))
        return look(model, tiles, normalization)

    monkeypatch.setattr(module, "tile_features", counted)
    first, second = ask("Which?", [picture(112, 56)]), ask("Which?", [picture(112, 56, seed=1)])
    answers = engine.answer([first, first.then("The scan.", "Why?"), second, first], max_new_tokens=8)
    assert looked == [3, 3, 3]
    # A different tile limit gives a different grid for the same image.
    preprocessing = engine.encoder.preprocessing.with_tile_limit(1)
    engine.encoder = RecordEncoder(engine.tokenizer, preprocessing)
    engine.answer([first], max_new_tokens=1)
    assert looked == [3, 3, 3, 1]
    prompts = [first, first.then("The scan.", "Why?"), second, first]
    assert answers == [make_engine().answer([prompt], max_new_tokens=8)[0] for prompt in prompts]

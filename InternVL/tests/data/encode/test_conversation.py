"""Label masks written out by hand: which pieces of a conversation are learnt, and where its images go."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_chat.data.encode.conversation import (
    SYSTEM_TEXTS,
    ConversationLengths,
    EncodedConversation,
    Template,
    render_message,
    token_ids,
)
from internvl_chat.data.encode.tokenizer_training import train_tokenizer
from internvl_chat.data.sources.records import Message

WORDS = "the cat sat on the mat . yes no what is this ? a b system user assistant"


@pytest.fixture(scope="module")
def tokenizer():
    """Every word of WORDS is one token, alone and behind a space, and so are two and three line ends."""
    text = f"{WORDS}\n{' '.join(WORDS.split())}\n\n\nend\n\nend\n" + "\n".join(WORDS.split())
    return train_tokenizer([text] * 20, 600)


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def spell(encoded: EncodedConversation, tokenizer) -> list[str]:
    """One text a token; those that are learnt begin with a plus."""
    return [
        ("+" if label != -100 else "") + tokenizer.decode([i])
        for i, label in zip(encoded.input_ids, encoded.labels, strict=True)
    ]


SYSTEM = ["<|im_start|>", "system", "\n", "the", " mat", "<|im_end|>", "\n"]
USER, ASSISTANT, END = (
    ["<|im_start|>", "user", "\n"],
    ["<|im_start|>", "assistant", "\n"],
    ["<|im_end|>", "\n"],
)
IMAGE = ["<img>", "<IMG_CONTEXT>", "</img>"]


class TestLabels:
    @pytest.mark.parametrize(
        ("messages", "pieces"),
        [
            (
                [user("what is this ?"), assistant("the cat")],
                [*SYSTEM, *USER, "what", " is", " this", " ?", *END]
                + [*ASSISTANT, "+the", "+ cat", "+<|im_end|>", "\n"],
            ),
            (
                [user("a"), assistant("b"), user("yes"), assistant("no")],
                [*SYSTEM, *USER, "a", *END, *ASSISTANT, "+b", "+<|im_end|>", "\n"]
                + [*USER, "yes", *END, *ASSISTANT, "+no", "+<|im_end|>", "\n"],
            ),
            (
                [Message("system", "yes"), user("a"), assistant("b")],
                ["<|im_start|>", "system", "\n", "yes", *END]
                + [*USER, "a", *END, *ASSISTANT, "+b", "+<|im_end|>", "\n"],
            ),
            (
                [Message("system", ""), assistant("b")],
                ["<|im_start|>", "system", "\n", *END, *ASSISTANT, "+b", "+<|im_end|>", "\n"],
            ),
            (
                [user("a"), assistant("")],
                [*SYSTEM, *USER, "a", *END, *ASSISTANT, "+<|im_end|>", "\n"],
            ),
            (
                [assistant("a\nb\n")],
                [*SYSTEM, *ASSISTANT, "+a", "+\n", "+b", "+\n", "+<|im_end|>", "\n"],
            ),
            (
                [assistant(" cat ")],
                [*SYSTEM, *ASSISTANT, "+ cat", "+ ", "+<|im_end|>", "\n"],
            ),
            # The line ends that begin an answer are one token with the header's, which is not learnt.
            (
                [assistant("\n\nyes")],
                [*SYSTEM, "<|im_start|>", "assistant", "\n\n\n", "+yes", "+<|im_end|>", "\n"],
            ),
            (
                [assistant("\n")],
                [*SYSTEM, "<|im_start|>", "assistant", "\n\n", "+<|im_end|>", "\n"],
            ),
            (
                [user("<image>\nwhat"), assistant("a")],
                [*SYSTEM, *USER, *IMAGE, "\n", "what", *END, *ASSISTANT, "+a", "+<|im_end|>", "\n"],
            ),
        ],
        ids=[
            "one answer", "two answers", "system replaced", "system emptied", "empty answer",
            "line ends inside", "spaces around", "line ends first", "a line end alone", "image",
        ],
    )  # fmt: skip
    def test_pieces(self, tokenizer, messages, pieces):
        assert spell(Template(tokenizer, "the mat").encode(messages), tokenizer) == pieces

    def test_line_ends_that_do_not_merge_are_learnt(self):
        tokenizer = train_tokenizer([WORDS] * 20, 400)
        pieces = spell(Template(tokenizer, "").encode([assistant("\n\na")]), tokenizer)
        assert pieces[-6:] == ["\n", "+\n", "+\n", "+a", "+<|im_end|>", "\n"]

    def test_a_header_of_many_tokens_is_not_learnt(self):
        tokenizer = train_tokenizer([], 256)  # one token a byte
        pieces = spell(Template(tokenizer, "s").encode([user("a"), assistant("yes")]), tokenizer)
        system = ["<|im_start|>", *"system\n", "s", "<|im_end|>", "\n"]
        asked = ["<|im_start|>", *"user\n", "a", "<|im_end|>", "\n"]
        assert pieces == [
            *system,
            *asked,
            "<|im_start|>",
            *"assistant\n",
            "+y",
            "+e",
            "+s",
            "+<|im_end|>",
            "\n",
        ]

    def test_a_label_is_the_token_itself(self, tokenizer):
        encoded = Template(tokenizer, "yes").encode([user("a"), assistant("the cat sat on the mat .")])
        learnt = encoded.labels != -100
        assert learnt.sum() == 8
        assert np.array_equal(encoded.labels[learnt], encoded.input_ids[learnt])
        assert encoded.input_ids.dtype == encoded.labels.dtype == np.int64

    def test_other_scripts(self, tokenizer):
        encoded = Template(tokenizer, SYSTEM_TEXTS["internvl2_5"]).encode([user("那"), assistant("是 é 🩻")])
        learnt = encoded.labels[encoded.labels != -100]
        assert tokenizer.decode(learnt) == "是 é 🩻<|im_end|>"

    def test_the_whole_text(self, tokenizer):
        messages = [user("<image>the cat\n\n"), assistant("\n yes "), user("no"), assistant("a")]
        assert tokenizer.decode(Template(tokenizer, "the mat").encode(messages).input_ids) == (
            "<|im_start|>system\nthe mat<|im_end|>\n"
            "<|im_start|>user\n<img><IMG_CONTEXT></img>the cat\n\n<|im_end|>\n"
            "<|im_start|>assistant\n\n yes <|im_end|>\n"
            "<|im_start|>user\nno<|im_end|>\n"
            "<|im_start|>assistant\na<|im_end|>\n"
        )


class TestImages:
    TURNS = (user("<image>a<image>"), assistant("b"), user("<image>"), assistant("no"))

    def test_positions(self, tokenizer):
        encoded = Template(tokenizer, "the mat").encode(self.TURNS)
        # 7 of the system message, 3 of the user's header, <img>; then </img>, a, <img> between the two.
        assert encoded.image_positions.tolist() == [11, 15, 29]
        assert tokenizer.convert_ids_to_tokens(encoded.input_ids[[11, 15, 29]]) == ["<IMG_CONTEXT>"] * 3

    def test_expansion(self, tokenizer):
        encoded = Template(tokenizer, "the mat").encode(self.TURNS)
        ids, labels = encoded.expand([2, 1, 3])
        assert encoded.lengths.num_tokens([2, 1, 3]) == len(ids) == len(labels) == len(encoded.input_ids) + 3
        context = "<IMG_CONTEXT>"
        assert spell(EncodedConversation(ids, labels, encoded.image_positions), tokenizer) == (
            [*SYSTEM, *USER, "<img>", context, context, "</img>", "a", "<img>", context, "</img>", *END]
            + [*ASSISTANT, "+b", "+<|im_end|>", "\n"]
            + [*USER, "<img>", context, context, context, "</img>", *END]
            + [*ASSISTANT, "+no", "+<|im_end|>", "\n"]
        )

    def test_no_image(self, tokenizer):
        encoded = Template(tokenizer, "the mat").encode([user("a"), assistant("b")])
        ids, labels = encoded.expand([])
        assert encoded.image_positions.tolist() == []
        assert encoded.lengths.num_tokens([]) == len(ids)
        assert np.array_equal(ids, encoded.input_ids)
        assert np.array_equal(labels, encoded.labels)

    @pytest.mark.parametrize("role", ["system", "assistant"])
    def test_only_the_user_shows_images(self, tokenizer, role):
        assert render_message(Message(role, "a <image>")) == f"<|im_start|>{role}\na <image><|im_end|>\n"
        messages = [Message(role, "a <image>"), assistant("b")]
        assert Template(tokenizer, "the mat").encode(messages).image_positions.tolist() == []

    @settings(max_examples=50)
    @given(st.data())
    def test_expansion_repeats_in_place(self, data):
        marks = data.draw(st.lists(st.booleans(), min_size=1, max_size=20))
        counts = data.draw(st.lists(st.integers(1, 5), min_size=sum(marks), max_size=sum(marks)))
        ids = np.arange(len(marks))
        ids_after, labels_after = EncodedConversation(ids, -ids, np.flatnonzero(marks)).expand(counts)
        left, expected = iter(counts), []
        for i, mark in enumerate(marks):
            expected += [i] * (next(left) if mark else 1)
        assert ids_after.tolist() == expected
        assert labels_after.tolist() == [-i for i in expected]
        lengths = EncodedConversation(ids, -ids, np.flatnonzero(marks)).lengths
        assert lengths.num_tokens(counts) == len(expected)
        assert lengths.num_supervised(counts) == len(expected)


class TestSystem:
    def test_the_default_is_put_first(self, tokenizer):
        encoded = Template(tokenizer, "the mat").encode([user("a"), assistant("b")])
        assert spell(encoded, tokenizer)[: len(SYSTEM)] == SYSTEM

    def test_the_records_own_wins(self, tokenizer):
        messages = [Message("system", "the mat"), user("a")]
        own, default = (
            Template(tokenizer, text).encode(t) for text, t in (("yes", messages), ("the mat", messages[1:]))
        )
        assert own.input_ids.tolist() == default.input_ids.tolist()

    def test_the_default_text(self):
        assert SYSTEM_TEXTS["internvl2_5"] == (
            "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
        )


class TestPrompt:
    TURNS = (user("<image>\nwhat"), assistant("a"), user("no"), assistant("yes"))

    @pytest.mark.parametrize("messages", [1, 3])
    def test_is_what_training_saw_before_the_answer(self, tokenizer, messages):
        prompt = Template(tokenizer, "the mat").encode_prompt(self.TURNS[:messages])
        whole = Template(tokenizer, "the mat").encode(self.TURNS[: messages + 1])
        learnt = np.flatnonzero(whole.labels != -100)
        answer = learnt[-2]  # one word and the end
        assert prompt.input_ids.tolist() == whole.input_ids[:answer].tolist()
        assert prompt.image_positions.tolist() == whole.image_positions.tolist() == [11]

    def test_nothing_is_learnt(self, tokenizer):
        prompt = Template(tokenizer, "the mat").encode_prompt(self.TURNS[:3])
        assert prompt.labels.tolist() == [-100] * len(prompt.input_ids)
        assert spell(prompt, tokenizer)[-3:] == ASSISTANT

    def test_own_system(self, tokenizer):
        prompt = Template(tokenizer, "the mat").encode_prompt([Message("system", "no"), user("a")])
        expected = ["<|im_start|>", "system", "\n", "no", *END, *USER, "a", *END, *ASSISTANT]
        assert spell(prompt, tokenizer) == expected


# Line ends that merge with the header, special tokens as text, placeholders, and other scripts.
TEXTS = st.text("ab \n\r中é\u0301🩻", max_size=8) | st.sampled_from(
    [
        "<image>",
        "<image>\n<image>",
        "<IMG_CONTEXT>",
        "<img>",
        "<|im_end|>\n",
        "<|im_start|>assistant\n",
        "\n\n\na",
    ]
)
TURNS = st.lists(
    st.builds(Message, st.sampled_from(["user", "assistant"]), TEXTS | st.builds(str.__add__, TEXTS, TEXTS))
)


@settings(max_examples=200)
@given(messages=TURNS, system=st.none() | TEXTS, own=st.none() | TEXTS)
def test_a_conversation_is_measured_as_it_is_encoded(tokenizer, messages, system, own):
    messages = messages if own is None else [Message("system", own), *messages]
    template = Template(tokenizer, system or "")
    assert template.measure(messages) == template.encode(messages).lengths


def test_measured_by_hand(tokenizer):
    messages = [user("<image>a"), assistant("<IMG_CONTEXT> b"), user("<image>"), assistant("\n\nyes")]
    measured = Template(tokenizer, "the mat").measure(messages)
    tokens = len(SYSTEM) + 3 + 4 + 2 + 3 + 2 + 2 + 3 + 3 + 2 + 3 + 1 + 2
    assert measured == ConversationLengths(tokens, 5, (False, True, False))
    assert measured.num_tokens([4, 3, 1]) == tokens + 5
    assert measured.num_supervised([4, 3, 1]) == 5 + 2


class TestTokenIds:
    TEXTS = ("the cat", "", "<|im_start|>user\n", "中<img>")

    def test_are_those_of_a_call(self, tokenizer):
        assert token_ids(tokenizer, self.TEXTS) == tokenizer(list(self.TEXTS)).input_ids
        assert token_ids(tokenizer, []) == []

    def test_whatever_was_called_before(self, tokenizer):
        expected = token_ids(tokenizer, self.TEXTS)
        tokenizer(list(self.TEXTS), padding="max_length", truncation=True, max_length=2)
        assert token_ids(tokenizer, self.TEXTS) == expected

    def test_slow_tokenizer(self, tokenizer):
        class Slow:
            is_fast = False

            def __call__(self, texts, **options):
                return tokenizer(texts, **options)

        assert token_ids(Slow(), self.TEXTS) == token_ids(tokenizer, self.TEXTS)
        assert token_ids(Slow(), []) == []

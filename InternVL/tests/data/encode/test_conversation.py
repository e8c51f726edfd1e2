"""Labels and image positions of handwritten conversations."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_chat.constants import SYSTEM_TEXTS
from internvl_chat.data.encode.conversation import (
    Template,
    TokenizedConversation,
    render_message,
    token_ids,
)
from internvl_chat.data.encode.tokenizer_training import train_tokenizer
from internvl_chat.data.sources.records import Message

WORDS = "the cat sat on the mat . yes no what is this ? a b system user assistant"


@pytest.fixture(scope="module")
def tokenizer():
    """Each word in WORDS, with or without a leading space, is one token; so are two or three newlines."""
    text = f"{WORDS}\n{' '.join(WORDS.split())}\n\n\nend\n\nend\n" + "\n".join(WORDS.split())
    return train_tokenizer([text] * 20, 600)


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def spell(conversation: TokenizedConversation, tokenizer, tokens_per_image: Sequence[int] = ()) -> list[str]:
    """Return the text of each token; supervised tokens begin with a plus sign."""
    ids, labels = conversation.expand(tokens_per_image or [1] * len(conversation.supervised_images))
    return [
        ("+" if label != -100 else "") + tokenizer.decode([i]) for i, label in zip(ids, labels, strict=True)
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
            # Leading newlines of an answer merge with the last token of the header, which is not supervised.
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
            "newlines inside", "spaces around", "newlines first", "newline only", "image",
        ],
    )  # fmt: skip
    def test_pieces(self, tokenizer, messages, pieces):
        assert spell(Template(tokenizer, "the mat").tokenize(messages), tokenizer) == pieces

    def test_newlines_that_do_not_merge_are_supervised(self):
        tokenizer = train_tokenizer([WORDS] * 20, 400)
        pieces = spell(Template(tokenizer, "").tokenize([assistant("\n\na")]), tokenizer)
        assert pieces[-6:] == ["\n", "+\n", "+\n", "+a", "+<|im_end|>", "\n"]

    def test_header_of_many_tokens_is_not_supervised(self):
        tokenizer = train_tokenizer([], 256)  # one token per byte
        pieces = spell(Template(tokenizer, "s").tokenize([user("a"), assistant("yes")]), tokenizer)
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

    def test_labels_equal_ids(self, tokenizer):
        conversation = Template(tokenizer, "yes").tokenize([user("a"), assistant("the cat sat on the mat .")])
        ids, labels = conversation.expand([])
        supervised = labels != -100
        assert supervised.sum() == 8
        assert np.array_equal(labels[supervised], ids[supervised])
        assert ids.dtype == labels.dtype == np.int64

    def test_other_scripts(self, tokenizer):
        template = Template(tokenizer, SYSTEM_TEXTS["internvl2_5"])
        _, labels = template.tokenize([user("那"), assistant("是 é 🩻")]).expand([])
        assert tokenizer.decode(labels[labels != -100]) == "是 é 🩻<|im_end|>"

    def test_complete_text(self, tokenizer):
        messages = [user("<image>the cat\n\n"), assistant("\n yes "), user("no"), assistant("a")]
        assert tokenizer.decode(Template(tokenizer, "the mat").tokenize(messages).expand([1])[0]) == (
            "<|im_start|>system\nthe mat<|im_end|>\n"
            "<|im_start|>user\n<img><IMG_CONTEXT></img>the cat\n\n<|im_end|>\n"
            "<|im_start|>assistant\n\n yes <|im_end|>\n"
            "<|im_start|>user\nno<|im_end|>\n"
            "<|im_start|>assistant\na<|im_end|>\n"
        )


class TestImages:
    MESSAGES = (user("<image>a<image>"), assistant("b"), user("<image>"), assistant("no"))

    def test_expansion(self, tokenizer):
        conversation = Template(tokenizer, "the mat").tokenize(self.MESSAGES)
        assert len(conversation.supervised_images) == 3
        ids, labels = conversation.expand([2, 1, 3])
        assert conversation.num_tokens([2, 1, 3]) == len(ids) == len(labels)
        assert len(ids) == len(conversation.expand([1, 1, 1])[0]) + 3
        context = "<IMG_CONTEXT>"
        assert spell(conversation, tokenizer, [2, 1, 3]) == (
            [*SYSTEM, *USER, "<img>", context, context, "</img>", "a", "<img>", context, "</img>", *END]
            + [*ASSISTANT, "+b", "+<|im_end|>", "\n"]
            + [*USER, "<img>", context, context, context, "</img>", *END]
            + [*ASSISTANT, "+no", "+<|im_end|>", "\n"]
        )

    def test_no_image(self, tokenizer):
        conversation = Template(tokenizer, "the mat").tokenize([user("a"), assistant("b")])
        ids, _ = conversation.expand([])
        assert conversation.supervised_images == ()
        assert conversation.num_tokens([]) == len(ids)

    @pytest.mark.parametrize("role", ["system", "assistant"])
    def test_only_user_messages_contain_images(self, tokenizer, role):
        assert render_message(Message(role, "a <image>")) == f"<|im_start|>{role}\na <image><|im_end|>\n"
        messages = [Message(role, "a <image>"), assistant("b")]
        assert Template(tokenizer, "the mat").tokenize(messages).supervised_images == ()

    @settings(max_examples=50)
    @given(st.data())
    def test_expansion_of_random_tokens(self, data):
        """Token 0 is the context token; each message is supervised from a random position to its end."""
        messages = data.draw(
            st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=4)
        )
        starts = [data.draw(st.integers(0, len(ids))) for ids in messages]
        num_images = sum(ids.count(0) for ids in messages)
        counts = data.draw(st.lists(st.integers(1, 5), min_size=num_images, max_size=num_images))
        supervised = tuple(range(start, len(ids)) for start, ids in zip(starts, messages, strict=True))
        remaining, expected = iter(counts), []
        for ids, start in zip(messages, starts, strict=True):
            for position, token in enumerate(ids):
                label = token if position >= start else -100
                expected += [(token, label)] * (1 if token else next(remaining))
        conversation = TokenizedConversation(tuple(messages), supervised, context_id=0)
        assert list(zip(*map(list, conversation.expand(counts)), strict=True)) == expected
        assert conversation.num_tokens(counts) == len(expected)
        assert conversation.num_supervised(counts) == sum(label != -100 for _, label in expected)


class TestSystem:
    def test_default_is_added(self, tokenizer):
        conversation = Template(tokenizer, "the mat").tokenize([user("a"), assistant("b")])
        assert spell(conversation, tokenizer)[: len(SYSTEM)] == SYSTEM

    def test_system_message_of_the_record_takes_precedence(self, tokenizer):
        messages = [Message("system", "the mat"), user("a")]
        own, default = (
            Template(tokenizer, text).tokenize(t)
            for text, t in (("yes", messages), ("the mat", messages[1:]))
        )
        assert own.ids == default.ids

    def test_default_text(self):
        assert SYSTEM_TEXTS["internvl2_5"] == (
            "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
        )


class TestPrompt:
    MESSAGES = (user("<image>\nwhat"), assistant("a"), user("no"), assistant("yes"))

    @pytest.mark.parametrize("messages", [1, 3])
    def test_matches_training_up_to_the_answer(self, tokenizer, messages):
        prompt = Template(tokenizer, "the mat").tokenize_prompt(self.MESSAGES[:messages])
        ids, labels = Template(tokenizer, "the mat").tokenize(self.MESSAGES[: messages + 1]).expand([1])
        answer = np.flatnonzero(labels != -100)[-2]  # one word and the end
        assert prompt.expand([1])[0].tolist() == ids[:answer].tolist()

    def test_nothing_is_supervised(self, tokenizer):
        prompt = Template(tokenizer, "the mat").tokenize_prompt(self.MESSAGES[:3])
        assert set(prompt.expand([1])[1].tolist()) == {-100}
        assert spell(prompt, tokenizer)[-3:] == ASSISTANT

    def test_own_system(self, tokenizer):
        prompt = Template(tokenizer, "the mat").tokenize_prompt([Message("system", "no"), user("a")])
        expected = ["<|im_start|>", "system", "\n", "no", *END, *USER, "a", *END, *ASSISTANT]
        assert spell(prompt, tokenizer) == expected


# Newlines that merge with the header, special tokens as text, placeholders, and other scripts.
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
MESSAGES = st.lists(
    st.builds(Message, st.sampled_from(["user", "assistant"]), TEXTS | st.builds(str.__add__, TEXTS, TEXTS))
)


@settings(max_examples=200)
@given(messages=MESSAGES, system=st.none() | TEXTS, own=st.none() | TEXTS, tokens=st.integers(1, 3))
def test_lengths_match_the_arrays(tokenizer, messages, system, own, tokens):
    messages = messages if own is None else [Message("system", own), *messages]
    conversation = Template(tokenizer, system or "").tokenize(messages)
    tokens_per_image = [tokens] * len(conversation.supervised_images)
    ids, labels = conversation.expand(tokens_per_image)
    assert len(ids) == conversation.num_tokens(tokens_per_image)
    assert (labels != -100).sum() == conversation.num_supervised(tokens_per_image)


def test_lengths_by_hand(tokenizer):
    messages = [user("<image>a"), assistant("<IMG_CONTEXT> b"), user("<image>"), assistant("\n\nyes")]
    conversation = Template(tokenizer, "the mat").tokenize(messages)
    tokens = len(SYSTEM) + 3 + 4 + 2 + 3 + 2 + 2 + 3 + 3 + 2 + 3 + 1 + 2
    assert conversation.supervised_images == (False, True, False)
    assert (conversation.num_tokens([1, 1, 1]), conversation.num_supervised([1, 1, 1])) == (tokens, 5)
    assert conversation.num_tokens([4, 3, 1]) == tokens + 5
    assert conversation.num_supervised([4, 3, 1]) == 5 + 2


class TestTokenIds:
    TEXTS = ("the cat", "", "<|im_start|>user\n", "中<img>")

    def test_equal_to_a_call(self, tokenizer):
        assert token_ids(tokenizer, self.TEXTS) == tokenizer(list(self.TEXTS)).input_ids
        assert token_ids(tokenizer, []) == []

    def test_independent_of_earlier_calls(self, tokenizer):
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


class TestSupervision:
    def test_excluded_answer(self, tokenizer):
        draft, last = Message("assistant", "no", supervised=False), assistant("yes")
        template = Template(tokenizer, "the mat")
        conversation = template.tokenize([user("what ?"), draft, user("a ?"), last])
        supervised = [token for token in spell(conversation, tokenizer) if token.startswith("+")]
        assert supervised == ["+yes", "+<|im_end|>"]
        plain = template.tokenize([user("what ?"), assistant("no"), user("a ?"), last])
        assert conversation.ids == plain.ids


class TestEscapedControlTokens:
    @pytest.mark.parametrize(
        "text",
        [
            "<|im_end|>",
            "the cat<|im_end|>\n",
            "<|im_end|>\n<|im_start|>user\nno",
            "<img> a </img>",
            "<|im_end|><|im_end|>",
        ],
    )
    @pytest.mark.parametrize("role", ["system", "user", "assistant"])
    def test_text_survives_and_has_no_special_token(self, tokenizer, text, role):
        template = Template(tokenizer, "the mat", escape_control_tokens=True)
        conversation = template.tokenize(
            [Message("system", "a")] * (role != "system") + [Message(role, text)]
        )
        ids = conversation.ids[-1]
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        assert [token in special for token in ids] == [True] + [False] * (len(ids) - 3) + [True, False]
        assert tokenizer.decode(ids) == f"<|im_start|>{role}\n{text}<|im_end|>\n"

    def test_other_text_has_the_same_ids(self, tokenizer):
        messages = [user("<image>\nwhat is <ref>this</ref> ?"), assistant("\n\nthe cat")]
        escaped = Template(tokenizer, "the mat", escape_control_tokens=True)
        assert escaped.tokenize(messages) == Template(tokenizer, "the mat").tokenize(messages)

    def test_images_and_supervision_stay(self, tokenizer):
        template = Template(tokenizer, "the mat", escape_control_tokens=True)
        conversation = template.tokenize([user("a <|im_end|> <image> b"), assistant("no<|im_end|>")])
        assert spell(conversation, tokenizer).count("<IMG_CONTEXT>") == 1
        supervised = [token for token in spell(conversation, tokenizer) if token.startswith("+")]
        assert "".join(token[1:] for token in supervised) == "no<|im_end|><|im_end|>"

    def test_later_text_is_tokenized_as_before(self, tokenizer):
        before = token_ids(tokenizer, ["<|im_end|>"])
        Template(tokenizer, "a", escape_control_tokens=True).tokenize([user("<|im_end|>")])
        assert token_ids(tokenizer, ["<|im_end|>"]) == before
        assert len(before[0]) == 1

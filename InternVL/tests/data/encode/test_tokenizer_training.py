"""Tokenizers trained on a few sentences: contiguous ids and lossless decoding."""

import json
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from internvl_chat.data.encode.tokenizer_training import save_tokenizer, train_tokenizer

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
]  # fmt: skip
TEXTS = [
    "The arrow points to the lesion in panel B.",
    "## Findings\n\n1. no lesion; 2. an arrow",
    "Which subfigure shows the magnetic resonance image of the left kidney?",
] * 10


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


class TestIds:
    def test_special_tokens_follow_the_vocabulary_in_order(self, tokenizer):
        assert tokenizer.convert_tokens_to_ids(SPECIAL) == list(range(300, 312))
        assert len(tokenizer) == 312

    def test_no_gaps(self, tokenizer):
        assert sorted(tokenizer.get_vocab().values()) == list(range(312))

    @pytest.mark.parametrize("texts", [[], [""], ["aa"]])
    def test_bytes_only_with_little_training_text(self, texts):
        tokenizer = train_tokenizer(texts, 256)
        assert tokenizer.convert_tokens_to_ids(SPECIAL) == list(range(256, 268))
        assert tokenizer.decode(tokenizer("aa é 中").input_ids) == "aa é 中"
        assert len(tokenizer("aa é 中").input_ids) == 2 + 1 + 2 + 1 + 3

    def test_special_tokens_are_single_tokens_anywhere(self, tokenizer):
        ids = tokenizer("a".join(SPECIAL) + "a" + " ".join(SPECIAL)).input_ids
        assert [i for i in ids if i >= 300] == list(range(300, 312)) * 2

    def test_no_tokens_are_added_around_text(self, tokenizer):
        assert tokenizer("").input_ids == []
        ids = tokenizer("The arrow").input_ids
        assert [tokenizer.decode([i]) for i in ids] == ["The", " arrow"]

    def test_end_and_padding(self, tokenizer):
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (302, 300)

    def test_smaller_vocabulary_with_little_text(self):
        tokenizer = train_tokenizer(["ab"], 300)
        assert len(tokenizer) == 257 + 12
        assert tokenizer.convert_tokens_to_ids(SPECIAL) == list(range(257, 269))

    def test_deterministic(self, tokenizer):
        assert train_tokenizer(iter(TEXTS), 300).get_vocab() == tokenizer.get_vocab()

    def test_larger_vocabulary_gives_fewer_tokens(self, tokenizer):
        assert len(tokenizer(TEXTS[0]).input_ids) < len(train_tokenizer(TEXTS, 256)(TEXTS[0]).input_ids)


@settings(max_examples=150)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
@example(" .")
@example("a , b 's n't  \r\n\t")
@example("\x00\x7f\x85\u2028\ufeff\ufffd")
@example("🩻👩\u200d⚕️ 中文 ﷺ")
@example("<|im_end|> <img>")
def test_round_trip(tokenizer, text):
    """Decoding returns the text in NFC, the normalization form of Qwen2's tokenizer."""
    assert tokenizer.decode(tokenizer(text).input_ids) == unicodedata.normalize("NFC", text)


class TestSaved:
    @pytest.fixture(scope="class")
    def folder(self, tokenizer, tmp_path_factory):
        folder = tmp_path_factory.mktemp("saved")
        save_tokenizer(tokenizer, folder)
        return folder

    def read(self, folder, name):
        return json.loads((folder / name).read_text(encoding="utf-8"))

    def test_vocabulary(self, folder, tokenizer):
        vocabulary = self.read(folder, "vocab.json")
        assert sorted(vocabulary.values()) == list(range(300))
        assert vocabulary.items() <= tokenizer.get_vocab().items()

    def test_merges_cover_the_vocabulary(self, folder):
        head, *merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        assert head == "#version: 0.2"
        merged = ["".join(merge.split(" ")) for merge in merges]
        vocabulary = self.read(folder, "vocab.json")
        assert len(merges) == 300 - 256
        assert set(merged) == {piece for piece in vocabulary if len(piece) > 1}

    def test_added_tokens(self, folder):
        expected = dict(zip(SPECIAL, range(300, 312), strict=True))
        assert self.read(folder, "added_tokens.json") == expected
        decoder = self.read(folder, "tokenizer_config.json")["added_tokens_decoder"]
        assert {entry["content"]: int(number) for number, entry in decoder.items()} == expected
        assert all(entry["special"] for entry in decoder.values())

    def test_configuration(self, folder):
        config = self.read(folder, "tokenizer_config.json")
        assert config["tokenizer_class"].startswith("Qwen2Tokenizer")
        assert (config["eos_token"], config["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
        assert config["additional_special_tokens"] == SPECIAL[1:]
        assert "auto_map" not in config

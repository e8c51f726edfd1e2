"""Loading tokenizers from both file formats, and adding missing special tokens."""

import json
import re
import shutil

import pytest
from transformers import Qwen2Tokenizer
from transformers.utils import logging as transformers_logging

from internvl_chat.data.encode.tokenizer import decode_answer, image_context_id, load_tokenizer
from internvl_chat.data.encode.tokenizer_training import save_tokenizer, train_tokenizer
from internvl_chat.utils.errors import ModelError

INTERNVL_TOKENS = [
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
]
TEXT = "<|im_start|>user\n<img><IMG_CONTEXT></img>\nWhat, é 中 🩻?  <|im_end|>\n<box>\r\n\t## x"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a tokenizer and the folder with its files."""
    tokenizer = train_tokenizer(["what is this? ## a cat\n\n on a mat, é"] * 20, 320)
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, folder)
    return tokenizer, folder


@pytest.fixture
def folder(saved, tmp_path):
    """Return a copy of the files."""
    return shutil.copytree(saved[1], tmp_path / "copy")


def plain_tokenizer(folder, extra=()):
    """Write a Qwen2 tokenizer with `extra` as its only special tokens; return its number of tokens."""
    vocabulary = {chr(letter): number for number, letter in enumerate(range(ord("a"), ord("z") + 1))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=None, eos_token=None, pad_token=None)
    tokenizer.add_tokens(list(extra), special_tokens=True)
    tokenizer.save_pretrained(str(folder))
    return len(tokenizer)


class TestReload:
    def check(self, folder, original):
        loaded, added = load_tokenizer(folder)
        assert added == 0
        assert loaded(TEXT).input_ids == original(TEXT).input_ids
        assert loaded.get_vocab() == original.get_vocab()
        assert loaded.decode(loaded(TEXT).input_ids) == TEXT
        assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
        assert image_context_id(loaded) == original.get_vocab()["<IMG_CONTEXT>"]

    def test_all_files(self, saved, folder):
        self.check(folder, saved[0])

    def test_one_file(self, saved, folder):
        for name in ("vocab.json", "merges.txt", "added_tokens.json"):
            (folder / name).unlink()
        self.check(folder, saved[0])

    def test_vocabulary_and_merges(self, saved, folder):
        (folder / "tokenizer.json").unlink()
        self.check(folder, saved[0])

    def test_saved_again(self, saved, folder, tmp_path):
        again = tmp_path / "again"
        again.mkdir()
        save_tokenizer(load_tokenizer(folder)[0], again)
        (again / "tokenizer.json").unlink()
        self.check(again, saved[0])

    def test_only_control_tokens_are_skipped_in_answers(self, folder):
        tokenizer, _ = load_tokenizer(folder)
        text = "<ref>a cat</ref><box>[[1, 2, 3, 4]]</box> <quad>5</quad>"
        control = "<|im_start|><|im_end|><|endoftext|><img></img><IMG_CONTEXT>"
        assert decode_answer(tokenizer, tokenizer(f"{control} {text}{control}").input_ids) == text
        assert decode_answer(tokenizer, tokenizer(control).input_ids) == ""

    def test_no_length_limit(self, folder):
        tokenizer, _ = load_tokenizer(folder)
        assert tokenizer.model_max_length >= 10**9


class TestAdded:
    def test_to_a_plain_tokenizer(self, tmp_path):
        known = plain_tokenizer(tmp_path, extra=("<|im_start|>", "<|im_end|>"))
        tokenizer, added = load_tokenizer(tmp_path)
        assert (known, added, len(tokenizer)) == (28, 9, 37)
        assert tokenizer.convert_tokens_to_ids(INTERNVL_TOKENS) == list(range(28, 37))
        assert tokenizer("ab<IMG_CONTEXT>c</box>").input_ids == [0, 1, 30, 2, 36]
        assert image_context_id(tokenizer) == 30

    def test_message_delimiters_are_required(self, tmp_path):
        plain_tokenizer(tmp_path, extra=("<|im_start|>",))
        with pytest.raises(ModelError, match=r"lacks <\|im_end\|>, which delimit messages"):
            load_tokenizer(tmp_path)

    def test_to_a_tokenizer_with_some_of_them(self, tmp_path):
        known = plain_tokenizer(tmp_path, extra=("<|im_start|>", "<|im_end|>", "<box>", "<IMG_CONTEXT>"))
        tokenizer, added = load_tokenizer(tmp_path)
        assert (known, added, len(tokenizer)) == (30, 7, 37)
        assert tokenizer.convert_tokens_to_ids(["<box>", "<IMG_CONTEXT>"]) == [28, 29]
        others = [token for token in INTERNVL_TOKENS if token not in ("<box>", "<IMG_CONTEXT>")]
        assert tokenizer.convert_tokens_to_ids(others) == list(range(30, 37))


class TestProblems:
    def test_no_files(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ModelError, match=r"no tokenizer \(tokenizer\.json, or vocab\.json"):
            load_tokenizer(tmp_path)

    def test_no_folder(self, tmp_path):
        with pytest.raises(ModelError, match="nowhere: no tokenizer"):
            load_tokenizer(tmp_path / "nowhere")

    def test_broken_file(self, folder):
        (folder / "tokenizer.json").write_text("{broken")
        with pytest.raises(ModelError, match=f"{re.escape(str(folder))}: the tokenizer cannot be loaded: "):
            load_tokenizer(folder)

    def test_no_remote_code(self, folder):
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text())
        config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        config["tokenizer_class"] = "Evil"
        file.write_text(json.dumps(config))
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
        with pytest.raises(ModelError):
            load_tokenizer(folder)
        assert not (folder / "ran").exists()

    def test_verbosity_is_restored(self, folder):
        before = transformers_logging.get_verbosity()
        load_tokenizer(folder)
        (folder / "tokenizer.json").write_text("{broken")
        with pytest.raises(ModelError):
            load_tokenizer(folder)
        assert transformers_logging.get_verbosity() == before

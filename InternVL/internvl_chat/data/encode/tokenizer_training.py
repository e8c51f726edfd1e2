"""A small tokenizer of InternVL3's kind, trained on given text, for models that are made from nothing."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from internvl_chat.constants import IM_END, IM_START, SPECIAL_TOKENS

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Train a byte-level BPE with Qwen2's normalisation and pre-tokenisation.

    Args:
        texts: what to learn from.
        vocab_size: most entries before the special tokens; at least the 256 bytes.

    Returns:
        A tokenizer with InternVL's special tokens behind the vocabulary, in their order.
    """
    qwen = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        unk_token=None,
        eos_token=None,
        pad_token=None,
    )
    tokenizer.add_tokens([END_OF_TEXT, IM_START, IM_END, *SPECIAL_TOKENS], special_tokens=True)
    tokenizer.pad_token, tokenizer.eos_token = END_OF_TEXT, IM_END
    return tokenizer


def save_tokenizer(tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write a tokenizer both as one file and as the vocabulary and merges that the reference's code reads."""
    tokenizer.save_pretrained(str(folder))
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = json.dumps(backend["model"]["vocab"], ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    merges = "".join(f"{a} {b}\n" for a, b in backend["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    added = {token["content"]: token["id"] for token in backend["added_tokens"]}
    _write_json(folder / "added_tokens.json", added)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    kept = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    config["added_tokens_decoder"] = {
        str(token["id"]): {key: token[key] for key in kept} for token in backend["added_tokens"]
    }
    config["additional_special_tokens"] = [token for token in added if token != END_OF_TEXT]
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

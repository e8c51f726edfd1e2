"""Train and save small InternVL3-style tokenizers for models with random weights."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from internvl_chat.constants import IM_END, IM_START, SPECIAL_TOKENS
from internvl_chat.utils.files import write_json

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer with Qwen2's normalization and pre-tokenization.

    Args:
        texts: training text.
        vocab_size: maximum vocabulary size without the special tokens, at least 256.

    Returns:
        A tokenizer with InternVL's special tokens appended to the vocabulary.
    """
    qwen = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    # Prevent Qwen2's default special tokens from being added.
    no_tokens: dict[str, Any] = {"unk_token": None, "eos_token": None, "pad_token": None}
    merges: list[Any] = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, **no_tokens)
    tokenizer.add_tokens([END_OF_TEXT, IM_START, IM_END, *SPECIAL_TOKENS], special_tokens=True)
    tokenizer.pad_token, tokenizer.eos_token = END_OF_TEXT, IM_END
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer as `tokenizer.json` and as the separate files that the reference's code reads."""
    tokenizer.save_pretrained(str(folder))
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = json.dumps(backend["model"]["vocab"], ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    merges = "".join(f"{a} {b}\n" for a, b in backend["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    added = {token["content"]: token["id"] for token in backend["added_tokens"]}
    write_json(folder / "added_tokens.json", added)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    config["added_tokens_decoder"] = {
        str(token["id"]): {key: token[key] for key in fields} for token in backend["added_tokens"]
    }
    config["additional_special_tokens"] = [token for token in added if token != END_OF_TEXT]
    write_json(folder / "tokenizer_config.json", config)

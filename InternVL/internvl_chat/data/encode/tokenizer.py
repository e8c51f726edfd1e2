"""Load a checkpoint's tokenizer with InternVL's special tokens, without running remote code."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from internvl_chat.constants import ANSWER_TOKENS, IM_END, IM_START, IMG_CONTEXT, SPECIAL_TOKENS
from internvl_chat.utils.errors import ModelError


def load_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerBase, int]:
    """Load the tokenizer of a model folder.

    Returns:
        The tokenizer, and the number of special tokens added to it; the model's vocabulary must grow by this
        number.

    Raises:
        ModelError: the folder has no usable tokenizer.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise ModelError(f"{folder}: no tokenizer (tokenizer.json, or vocab.json with merges.txt)")
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns about the unknown model type
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
    finally:
        transformers_logging.set_verbosity(level)
    unknown = [t for t in (IM_START, IM_END) if t not in tokenizer.get_vocab()]
    if unknown:
        raise ModelError(f"{folder}: the tokenizer lacks {' and '.join(unknown)}, which delimit messages")
    added = tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    # max_seq_length is enforced by the encoder.
    tokenizer.model_max_length = int(1e9)
    return tokenizer, added


def image_context_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the context token, whose embeddings are replaced with vision features."""
    return token_id(tokenizer, IMG_CONTEXT)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Return the id of a token."""
    return cast(int, tokenizer.convert_tokens_to_ids(token))


def control_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the special tokens that are not part of an answer's text.

    InternVL's tokens for boxes and references, such as `<box>`, belong to the answer, but they are special:
    `skip_special_tokens=True` would drop them.
    """
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(i for i, token in added if token.special and token.content not in ANSWER_TOKENS)


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of tokens."""
    return cast(str, tokenizer.decode(list(ids), spaces_between_special_tokens=False))


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of a generated answer without control tokens and surrounding whitespace."""
    control = control_token_ids(tokenizer)
    return decode_tokens(tokenizer, [i for i in ids if i not in control]).strip()

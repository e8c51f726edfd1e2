"""Loading a checkpoint's tokenizer, with InternVL's special tokens and never with remote code."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from internvl_chat.constants import IM_END, IM_START, IMG_CONTEXT, SPECIAL_TOKENS
from internvl_chat.utils.errors import ModelError


def load_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerBase, int]:
    """Load the tokenizer of a model folder.

    Returns:
        The tokenizer, and how many of InternVL's special tokens had to be added to it (the model's
        vocabulary must grow by as many).

    Raises:
        ModelError: the folder has no usable tokenizer.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise ModelError(f"{folder}: no tokenizer (tokenizer.json, or vocab.json with merges.txt)")
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it does not know InternVL-Chat's config.json, and says so
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
    finally:
        transformers_logging.set_verbosity(level)
    unknown = [t for t in (IM_START, IM_END) if t not in tokenizer.get_vocab()]
    if unknown:
        raise ModelError(f"{folder}: the tokenizer lacks {' and '.join(unknown)}, which frame the messages")
    added = tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    # Lengths are judged by our own token budget, which names the record.
    tokenizer.model_max_length = int(1e9)
    return tokenizer, added


def image_context_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that stands for image features."""
    return tokenizer.convert_tokens_to_ids(IMG_CONTEXT)

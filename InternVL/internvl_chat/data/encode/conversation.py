"""Tokenize and label conversations with InternVL 2.5's template.

Each message is `<|im_start|>ROLE\\nTEXT<|im_end|>\\n`, tokenized separately. Only assistant messages are
supervised: their text and `<|im_end|>`, but not the header or the final newline.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from internvl_chat.constants import (
    IGNORE_INDEX,
    IM_END,
    IM_START,
    IMAGE_PLACEHOLDER,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
)
from internvl_chat.data.encode.tokenizer import image_context_id
from internvl_chat.data.sources.dialects import control_tokens, split_control_tokens
from internvl_chat.data.sources.records import Message

# One context token stands for an image until its number of tiles is known.
_IMAGE = f"{IMG_START}{IMG_CONTEXT}{IMG_END}"


@dataclass(frozen=True)
class TokenizedConversation:
    """Token ids of a conversation in which each image is a single context token.

    Lengths are computed without building arrays, which keeps indexing fast.

    Attributes:
        ids: token ids of each message.
        supervised: range of supervised positions within each message.
        context_id: id of the context token.
    """

    ids: tuple[list[int], ...]
    supervised: tuple[range, ...]
    context_id: int

    @cached_property
    def supervised_images(self) -> tuple[bool, ...]:
        """Whether each image's context token is supervised."""
        return tuple(
            position in supervised
            for ids, supervised in zip(self.ids, self.supervised, strict=True)
            if self.context_id in ids
            for position, token in enumerate(ids)
            if token == self.context_id
        )

    def num_tokens(self, tokens_per_image: Sequence[int]) -> int:
        """Return the number of tokens, given the number of tokens per image."""
        return sum(map(len, self.ids)) + sum(tokens_per_image) - len(tokens_per_image)

    def num_supervised(self, tokens_per_image: Sequence[int]) -> int:
        """Return the number of supervised tokens, given the number of tokens per image."""
        images = zip(tokens_per_image, self.supervised_images, strict=True)
        return sum(map(len, self.supervised)) + sum(tokens - 1 for tokens, supervised in images if supervised)

    def expand(self, tokens_per_image: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and labels, (T,) int64; each context token is repeated for all tokens of its image."""
        input_ids = np.array([token for ids in self.ids for token in ids], np.int64)
        labels = np.full_like(input_ids, IGNORE_INDEX)
        start = 0
        for ids, supervised in zip(self.ids, self.supervised, strict=True):
            labels[start + supervised.start : start + supervised.stop] = ids[
                supervised.start : supervised.stop
            ]
            start += len(ids)
        repeats = np.ones(len(input_ids), np.int64)
        repeats[input_ids == self.context_id] = tokens_per_image
        return np.repeat(input_ids, repeats), np.repeat(labels, repeats)


class Template:
    """Applies the conversation template and tokenizes the result.

    The default system message and the answer header are tokenized once.

    Args:
        tokenizer: tokenizer with InternVL's special tokens.
        system_text: system message of conversations without one.
        escape_control_tokens: tokenize control tokens in messages as plain text.

    Attributes:
        header: token ids that precede the text of an answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, system_text: str, *, escape_control_tokens: bool = False
    ) -> None:
        self.tokenizer, self.escape_control_tokens = tokenizer, escape_control_tokens
        self.context_id = image_context_id(tokenizer)
        system = render_message(Message("system", system_text))
        self._system_ids, self.header = token_ids(tokenizer, [system, f"{IM_START}assistant\n"])

    @cached_property
    def max_token_length(self) -> int:
        """Length of the longest token in characters."""
        return max(map(len, self.tokenizer.get_vocab()))

    def tokenize(self, messages: Sequence[Message]) -> TokenizedConversation:
        """Tokenize a conversation; the default system message is added if it has none."""
        ids = token_ids(self.tokenizer, [render_message(message) for message in messages])
        if self.escape_control_tokens:
            ids = [
                self._escaped_ids(message) if control_tokens(message.content) else message_ids
                for message, message_ids in zip(messages, ids, strict=True)
            ]
        # A supervised answer is labeled from the end of its header to its <|im_end|>.
        supervised = [
            range(len(self.header), len(message_ids) - 1)
            if message.role == "assistant" and message.supervised
            else range(0)
            for message, message_ids in zip(messages, ids, strict=True)
        ]
        if not messages or messages[0].role != "system":
            ids, supervised = [self._system_ids, *ids], [range(0), *supervised]
        return TokenizedConversation(tuple(ids), tuple(supervised), self.context_id)

    def tokenize_prompt(self, messages: Sequence[Message]) -> TokenizedConversation:
        """Tokenize a conversation and append the header of the next answer; nothing is supervised."""
        ids = (*self.tokenize(messages).ids, self.header)
        return TokenizedConversation(ids, (range(0),) * len(ids), self.context_id)

    def _escaped_ids(self, message: Message) -> list[int]:
        """Tokenize a message, treating control tokens in its content as plain text."""
        ids, pending = [], f"{IM_START}{message.role}\n"
        for text, is_control in split_control_tokens(message.content):
            if not is_control:
                pending += _with_images(message.role, text)
                continue
            ids += token_ids(self.tokenizer, [pending])[0] if pending else []
            ids += self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            pending = ""
        ids += token_ids(self.tokenizer, [f"{pending}{IM_END}\n"])[0]
        return ids


def render_message(message: Message) -> str:
    """Return a message in the template's format, with one context token per image."""
    return f"{IM_START}{message.role}\n{_with_images(message.role, message.content)}{IM_END}\n"


def _with_images(role: str, text: str) -> str:
    """Replace each placeholder in a user message with image tokens; other roles are unchanged."""
    return text.replace(IMAGE_PLACEHOLDER, _IMAGE) if role == "user" else text


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenize strings without adding special tokens or padding; faster than calling the tokenizer."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        return tokenizer(list(texts), add_special_tokens=False).input_ids
    encodings = plain_backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a fast tokenizer's backend after undoing truncation, padding and splitting of special tokens."""
    backend = tokenizer.backend_tokenizer
    if backend.encode_special_tokens:
        backend.encode_special_tokens = False
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend

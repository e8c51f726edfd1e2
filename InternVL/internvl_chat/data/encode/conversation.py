"""From messages to token ids and labels, in InternVL 2.5's conversation style.

Each message is `<|im_start|>ROLE\\nTEXT<|im_end|>\\n`, tokenised by itself. Only assistant messages are learnt:
their text and `<|im_end|>`, not the header and not the final newline.
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
from internvl_chat.data.sources.records import Message

# The reference's default system text of each conversation style.
SYSTEM_TEXTS = {
    "internvl2_5": "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
}

# One context token stands for an image until its number of tiles is known.
_IMAGE = f"{IMG_START}{IMG_CONTEXT}{IMG_END}"


@dataclass(frozen=True)
class ConversationLengths:
    """How long a conversation is whose images each still are one context token.

    Attributes:
        tokens: of all messages.
        supervised: tokens that are learnt.
        supervised_images: for each image, whether its context token is among them.
    """

    tokens: int
    supervised: int
    supervised_images: tuple[bool, ...]

    @property
    def num_images(self) -> int:
        """Number of context tokens."""
        return len(self.supervised_images)

    def num_tokens(self, tokens_per_image: Sequence[int]) -> int:
        """Return the length with each image at that many tokens."""
        return self.tokens + sum(tokens_per_image) - self.num_images

    def num_supervised(self, tokens_per_image: Sequence[int]) -> int:
        """Return how many tokens are learnt with each image at that many tokens."""
        images = zip(tokens_per_image, self.supervised_images, strict=True)
        return self.supervised + sum(tokens - 1 for tokens, learnt in images if learnt)


@dataclass(frozen=True)
class EncodedConversation:
    """Ids and labels of a conversation whose images each still are one context token.

    Attributes:
        input_ids: (T,) int64.
        labels: (T,) int64, `IGNORE_INDEX` where nothing is learnt.
        image_positions: where in `input_ids` each image's context token is.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    image_positions: np.ndarray

    @property
    def lengths(self) -> ConversationLengths:
        """The numbers that `Template.measure` finds without building ids and labels."""
        learnt = self.labels != IGNORE_INDEX
        return ConversationLengths(
            len(self.labels), int(learnt.sum()), tuple(learnt[self.image_positions].tolist())
        )

    def expand(self, tokens_per_image: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and labels with each image's context token repeated that many times."""
        repeats = np.ones(len(self.input_ids), np.int64)
        repeats[self.image_positions] = tokens_per_image
        return np.repeat(self.input_ids, repeats), np.repeat(self.labels, repeats)


class Template:
    """Turns conversations into ids and labels, or only says how long they are.

    What conversations share, the default system message and the header of an answer, is tokenised once.

    Args:
        tokenizer: with InternVL's special tokens.
        system_text: of conversations without a system message.

    Attributes:
        header: ids of what precedes the text of an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_text: str) -> None:
        self.tokenizer = tokenizer
        self.context_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT)
        system = Message("system", system_text)
        system_ids, self.header = token_ids(tokenizer, [render_message(system), f"{IM_START}assistant\n"])
        self._system = (system, system_ids)

    @cached_property
    def longest_token(self) -> int:
        """Most characters that one token stands for."""
        return max(map(len, self.tokenizer.get_vocab()))

    def encode(self, messages: Sequence[Message]) -> EncodedConversation:
        """Tokenise a conversation and label what is to be learnt."""
        pairs = self._tokenize(messages)
        input_ids = np.array([token for _, ids in pairs for token in ids], np.int64)
        labels = np.full_like(input_ids, IGNORE_INDEX)
        start = 0
        for message, ids in pairs:
            learnt = self._learnt(message, len(ids))
            labels[start + learnt.start : start + learnt.stop] = ids[learnt.start : learnt.stop]
            start += len(ids)
        return EncodedConversation(input_ids, labels, np.flatnonzero(input_ids == self.context_id))

    def encode_prompt(self, messages: Sequence[Message]) -> EncodedConversation:
        """Tokenise a conversation up to where the assistant is to answer; nothing is labelled."""
        ids = [token for _, ids in self._tokenize(messages) for token in ids] + self.header
        input_ids = np.array(ids, np.int64)
        labels = np.full_like(input_ids, IGNORE_INDEX)
        return EncodedConversation(input_ids, labels, np.flatnonzero(input_ids == self.context_id))

    def measure(self, messages: Sequence[Message]) -> ConversationLengths:
        """Return `encode(messages).lengths`, in less time."""
        tokens = supervised = 0
        supervised_images: list[bool] = []
        for message, ids in self._tokenize(messages):
            learnt = self._learnt(message, len(ids))
            tokens += len(ids)
            supervised += len(learnt)
            if self.context_id in ids:
                supervised_images += [i in learnt for i, token in enumerate(ids) if token == self.context_id]
        return ConversationLengths(tokens, supervised, tuple(supervised_images))

    def _tokenize(self, messages: Sequence[Message]) -> list[tuple[Message, list[int]]]:
        """Return each message with its ids, a system message at the front; the conversation's own wins."""
        ids = token_ids(self.tokenizer, [render_message(message) for message in messages])
        pairs = list(zip(messages, ids, strict=True))
        return pairs if messages and messages[0].role == "system" else [self._system, *pairs]

    def _learnt(self, message: Message, num_ids: int) -> range:
        """Return which ids of a message are learnt: an answer and its end, not its header and last newline."""
        return range(len(self.header), num_ids - 1) if message.role == "assistant" else range(0)


def render_message(message: Message) -> str:
    """Return a message's text in the template, an image as one context token between its brackets."""
    text = message.content.replace(IMAGE_PLACEHOLDER, _IMAGE) if message.role == "user" else message.content
    return f"{IM_START}{message.role}\n{text}{IM_END}\n"


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts with nothing added, cut or padded; quicker than calling the tokenizer."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        return tokenizer(list(texts), add_special_tokens=False).input_ids
    encodings = plain_backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return what a fast tokenizer works with, without the cutting and padding of an earlier call."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend

"""From turns to token ids and labels, in InternVL 2.5's conversation style.

Each turn is `<|im_start|>ROLE\\nTEXT<|im_end|>\\n`, tokenised by itself. Only assistant turns are learnt:
their text and `<|im_end|>`, not the header and not the final newline.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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
from internvl_chat.data.records import Turn

# The reference's default system text of each conversation style.
SYSTEM_TEXTS = {
    "internvl2_5": "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
}

# One context token stands for an image until its number of tiles is known.
_IMAGE = f"{IMG_START}{IMG_CONTEXT}{IMG_END}"


@dataclass(frozen=True)
class EncodedTurns:
    """Ids and labels of a conversation whose images each still are one context token.

    Attributes:
        input_ids: (T,) int64.
        labels: (T,) int64, `IGNORE_INDEX` where nothing is learnt.
        image_positions: where in `input_ids` each image's context token is.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    image_positions: np.ndarray

    def num_tokens(self, tokens_per_image: Sequence[int]) -> int:
        """Return the length with each image at that many tokens."""
        return len(self.input_ids) + sum(tokens_per_image) - len(self.image_positions)

    def expand(self, tokens_per_image: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and labels with each image's context token repeated that many times."""
        repeats = np.ones(len(self.input_ids), np.int64)
        repeats[self.image_positions] = tokens_per_image
        return np.repeat(self.input_ids, repeats), np.repeat(self.labels, repeats)


def render_turn(turn: Turn) -> str:
    """Return a turn's text in the template, an image as one context token between its brackets."""
    text = turn.text.replace(IMAGE_PLACEHOLDER, _IMAGE) if turn.role == "user" else turn.text
    return f"{IM_START}{turn.role}\n{text}{IM_END}\n"


def with_system(turns: Sequence[Turn], system_text: str) -> list[Turn]:
    """Return the turns with a system turn at the front; the record's own wins."""
    return list(turns) if turns and turns[0].role == "system" else [Turn("system", system_text), *turns]


def encode_turns(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, system_text: str) -> EncodedTurns:
    """Tokenise a conversation and label what is to be learnt."""
    turns = with_system(turns, system_text)
    header = len(tokenizer(f"{IM_START}assistant\n", add_special_tokens=False).input_ids)
    batches = tokenizer([render_turn(turn) for turn in turns], add_special_tokens=False).input_ids
    ids = [np.array(batch, np.int64) for batch in batches]
    labels = []
    for turn, turn_ids in zip(turns, ids, strict=True):
        turn_labels = np.full_like(turn_ids, IGNORE_INDEX)
        if turn.role == "assistant":
            turn_labels[header:-1] = turn_ids[header:-1]
        labels.append(turn_labels)
    input_ids = np.concatenate(ids)
    context = tokenizer.convert_tokens_to_ids(IMG_CONTEXT)
    return EncodedTurns(input_ids, np.concatenate(labels), np.flatnonzero(input_ids == context))


def encode_prompt(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, system_text: str
) -> EncodedTurns:
    """Tokenise a conversation up to where the assistant is to answer; nothing is labelled."""
    texts = [render_turn(turn) for turn in with_system(turns, system_text)] + [f"{IM_START}assistant\n"]
    batches = tokenizer(texts, add_special_tokens=False).input_ids
    input_ids = np.concatenate([np.array(batch, np.int64) for batch in batches])
    context = tokenizer.convert_tokens_to_ids(IMG_CONTEXT)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    return EncodedTurns(input_ids, labels, np.flatnonzero(input_ids == context))

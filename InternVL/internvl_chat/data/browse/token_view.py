"""Split an encoded conversation into text, special tokens and images, message by message."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from internvl_chat.constants import IGNORE_INDEX, IM_START
from internvl_chat.data.encode.encoder import EncodedConversation
from internvl_chat.data.encode.tokenizer import image_context_id, token_id
from internvl_chat.data.sources.records import Message


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one kind.

    Attributes:
        kind: `text`, `special` (one special token) or `image` (all context tokens of an image).
        supervised: whether the tokens contribute to the loss.
        tokens: number of tokens; 0 if tokens are not counted.
        image: 0-based number of the image.
    """

    kind: str
    text: str
    supervised: bool
    tokens: int = 0
    image: int | None = None


@dataclass(frozen=True)
class MessageView:
    """A message with its segments."""

    role: str
    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(segment.tokens for segment in self.segments)

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(segment.tokens for segment in self.segments if segment.supervised)


def encoded_messages(
    tokenizer: PreTrainedTokenizerBase, encoded: EncodedConversation, tokens_per_tile: int
) -> list[MessageView]:
    """Return the messages of a conversation as the model sees them.

    A message begins at each `<|im_start|>` token, even if that token comes from the text of a record.
    """
    image_tokens = [grid.tiles * tokens_per_tile for grid in encoded.grids]
    messages: list[list[Segment]] = []
    for segment in _segments(tokenizer, encoded, image_tokens):
        if not messages or (segment.kind == "special" and segment.text == IM_START):
            messages.append([])
        messages[-1].append(segment)
    return [MessageView(_role(segments), tuple(segments)) for segments in messages]


def _segments(
    tokenizer: PreTrainedTokenizerBase, encoded: EncodedConversation, image_tokens: Sequence[int]
) -> Iterator[Segment]:
    context, start = image_context_id(tokenizer), token_id(tokenizer, IM_START)
    special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    special[start] = IM_START
    image = 0

    def kind(pair: tuple[int, bool]) -> tuple[str, bool]:
        token, supervised = pair
        return ("image" if token == context else "special" if token in special else "text"), supervised

    labels = (encoded.labels != IGNORE_INDEX).tolist()
    for (name, supervised), group in groupby(zip(encoded.input_ids.tolist(), labels, strict=True), kind):
        ids = [token for token, _ in group]
        if name == "text":
            text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            yield Segment("text", text, supervised, len(ids))
        elif name == "special":
            yield from (Segment("special", special[token], supervised, 1) for token in ids)
        else:
            # Images are separated by their start and end tokens, so each run is one image.
            yield Segment("image", special[context], supervised, image_tokens[image], image)
            image += 1


def _role(segments: Sequence[Segment]) -> str:
    """Return the first line of a message after its start token."""
    text = segments[1].text if len(segments) > 1 and segments[1].kind == "text" else ""
    return text.partition("\n")[0][:40]


def plain_messages(messages: Sequence[Message]) -> list[MessageView]:
    """Return messages as text only, for lack of a tokenizer or if the record cannot be encoded."""
    return [
        MessageView(
            message.role,
            (Segment("text", message.content, message.role == "assistant" and message.supervised),),
        )
        for message in messages
    ]

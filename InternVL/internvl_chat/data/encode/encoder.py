"""Encode records as token ids, labels and tiles for training, data checks, evaluation, export and serving."""

import random
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from internvl_chat.constants import IGNORE_INDEX, NORMALIZATIONS
from internvl_chat.data.encode.conversation import Template, TokenizedConversation
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tiling import (
    Grid,
    degrade_jpeg,
    pad_to_square,
    plan_grid,
    split_into_tiles,
    stack_tiles,
    tiles_per_image,
)
from internvl_chat.data.sources.image_content import turn
from internvl_chat.data.sources.images import to_rgb
from internvl_chat.data.sources.problems import RecordError
from internvl_chat.data.sources.records import Message

# If text may be truncated, conversations with up to this number of characters, and half this number of
# messages, are never rejected before tokenization.
_MAX_TRUNCATABLE = 1 << 20


class RecordLengths(NamedTuple):
    """Token and tile counts of a record, and how many were removed to fit `max_seq_length`."""

    tokens: int
    supervised: int
    tiles: int
    tiles_lost: int = 0
    tokens_truncated: int = 0


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as model inputs and labels.

    Attributes:
        input_ids: (T,) int64.
        labels: (T,) int64, `IGNORE_INDEX` where not supervised.
        image_positions: positions in `input_ids` that receive vision features.
        grids: tile grid of each image.
        tiles_lost: tiles removed to fit `max_seq_length`.
        tokens_truncated: tokens removed from the end to fit `max_seq_length`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    image_positions: torch.Tensor
    grids: tuple[Grid, ...]
    tiles_lost: int = 0
    tokens_truncated: int = 0

    @property
    def num_tiles(self) -> int:
        """Number of tiles of all images."""
        return sum(grid.tiles for grid in self.grids)

    @property
    def num_supervised(self) -> int:
        """Number of supervised tokens."""
        return int((self.labels >= 0).sum())

    @property
    def lengths(self) -> RecordLengths:
        """Lengths of the conversation, as returned by `RecordEncoder.measure`."""
        tokens, supervised = len(self.input_ids), self.num_supervised
        return RecordLengths(tokens, supervised, self.num_tiles, self.tiles_lost, self.tokens_truncated)


class _TilePlan(NamedTuple):
    """Tile grid per image, number of tiles removed to fit, and number of tokens still over the limit."""

    grids: tuple[Grid, ...]
    tiles_lost: int
    excess_tokens: int = 0


class RecordEncoder:
    """Encodes conversations and images with one tokenizer and one set of preprocessing options.

    Args:
        tokenizer: the checkpoint's tokenizer; None to count tiles only.
        truncate_text: truncate conversations that do not fit even with one tile per image.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        preprocessing: Preprocessing,
        *,
        truncate_text: bool = False,
    ) -> None:
        self.tokenizer, self.preprocessing, self.truncate_text = tokenizer, preprocessing, truncate_text
        self._template = None
        if tokenizer is not None:
            escape = preprocessing.escape_control_tokens
            self._template = Template(tokenizer, preprocessing.system_text, escape_control_tokens=escape)

    @property
    def template(self) -> Template:
        """The conversation template."""
        if self._template is None:
            raise ValueError("this encoder has no tokenizer: it only counts tiles")
        return self._template

    def encode(
        self, messages: Sequence[Message], image_sizes: Sequence[tuple[int, int]]
    ) -> EncodedConversation:
        """Encode a complete conversation for training.

        Args:
            messages: conversation with one placeholder per image.
            image_sizes: (width, height) of each image in pixels.

        Raises:
            RecordError: the conversation exceeds `max_seq_length`, or its numbers of placeholders and images
                differ.
        """
        self.reject_oversized(messages, len(image_sizes))
        return self._expand(self.template.tokenize(messages), image_sizes, self.truncate_text)

    def encode_prompt(
        self, messages: Sequence[Message], image_sizes: Sequence[tuple[int, int]]
    ) -> EncodedConversation:
        """Encode a conversation as a prompt that ends with the header of the next answer.

        Raises:
            RecordError: the conversation exceeds `max_seq_length`, or its numbers of placeholders and images
                differ.
        """
        self.reject_oversized(messages, len(image_sizes))
        return self._expand(self.template.tokenize_prompt(messages), image_sizes, truncate=False)

    def measure(self, messages: Sequence[Message], image_sizes: Sequence[tuple[int, int]]) -> RecordLengths:
        """Return the lengths of a conversation, the same as `encode(...).lengths` but faster.

        Without a tokenizer, only tiles are counted.
        """
        self.reject_oversized(messages, len(image_sizes))
        if self._template is None:
            max_tiles = self._max_tiles_per_image(len(image_sizes))
            return RecordLengths(0, 0, sum(self.plan_grid(size, max_tiles).tiles for size in image_sizes))
        conversation = self.template.tokenize(messages)
        plan = self._plan_tiles(conversation, image_sizes, self.truncate_text)
        if plan.excess_tokens:
            return self._expand(conversation, image_sizes, self.truncate_text).lengths
        tokens = self._image_tokens(plan.grids)
        return RecordLengths(
            conversation.num_tokens(tokens),
            conversation.num_supervised(tokens),
            sum(grid.tiles for grid in plan.grids),
            plan.tiles_lost,
        )

    def reject_oversized(self, messages: Sequence[Message], num_images: int) -> None:
        """Reject conversations that cannot fit, before tokenization takes time and memory.

        Raises:
            RecordError: there are too many messages, images or characters.
        """
        max_length = self.preprocessing.max_seq_length
        # Each message and each image has a start token and an end token.
        counts = [("images", num_images, max_length // 2)]
        if self._template is not None:
            truncatable = _MAX_TRUNCATABLE if self.truncate_text else 0
            max_characters = max(max_length * self.template.max_token_length, truncatable)
            characters = sum(len(message.content) for message in messages)
            if characters > max_characters:
                # The tokenizer normalizes text to NFC, which may shorten it.
                characters = sum(len(unicodedata.normalize("NFC", message.content)) for message in messages)
            counts += [
                ("messages", len(messages), max(max_length, truncatable) // 2),
                ("characters", characters, max_characters),
            ]
        for name, count, limit in counts:
            if count > limit:
                raise RecordError(
                    f"{count:,} {name} cannot fit in max_seq_length {max_length}", kind="too long"
                )

    def dummy(self) -> EncodedConversation:
        """Return the shortest conversation that a forward pass accepts: two tokens, one supervised."""
        ids = torch.tensor(self.template.header[:1] * 2)
        labels = torch.tensor([IGNORE_INDEX, self.template.header[0]])
        return EncodedConversation(ids, labels, torch.zeros(0, dtype=torch.int64), ())

    def _expand(
        self, conversation: TokenizedConversation, image_sizes: Sequence[tuple[int, int]], truncate: bool
    ) -> EncodedConversation:
        """Return the encoded conversation, with all context tokens of each image.

        Args:
            conversation: tokenized conversation.
            image_sizes: (width, height) of each image in pixels.
            truncate: truncate the text if it does not fit even with one tile per image.
        """
        plan = self._plan_tiles(conversation, image_sizes, truncate)
        ids, labels = conversation.expand(self._image_tokens(plan.grids))
        image_positions = np.flatnonzero(ids == conversation.context_id)
        if plan.excess_tokens:
            ids, labels = _truncate(ids, labels, image_positions, len(ids) - plan.excess_tokens)
        return EncodedConversation(
            torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(image_positions), *plan
        )

    def _plan_tiles(
        self, conversation: TokenizedConversation, image_sizes: Sequence[tuple[int, int]], truncate: bool
    ) -> _TilePlan:
        """Choose a grid for each image; lower the tile limit of all images until the conversation fits."""
        max_length, num_images = self.preprocessing.max_seq_length, len(conversation.supervised_images)
        if num_images != len(image_sizes):
            raise RecordError(
                f"{num_images} image placeholders in the conversation, but {len(image_sizes)} images",
                kind="placeholders",
            )
        limit = self._max_tiles_per_image(num_images) if num_images else 1
        wanted = sum(self.plan_grid(size, limit).tiles for size in image_sizes)
        for max_tiles in range(limit, 0, -1):
            grids = tuple(self.plan_grid(size, max_tiles) for size in image_sizes)
            tiles_lost = wanted - sum(grid.tiles for grid in grids)
            excess = conversation.num_tokens(self._image_tokens(grids)) - max_length
            if excess <= 0:
                return _TilePlan(grids, tiles_lost)
        if truncate:
            return _TilePlan(grids, tiles_lost, excess)
        raise _too_long(max_length + excess, max_length, num_images)

    def _max_tiles_per_image(self, num_images: int) -> int:
        return tiles_per_image(self.preprocessing.max_dynamic_patch, max(num_images, 1))

    def _image_tokens(self, grids: Sequence[Grid]) -> list[int]:
        return [grid.tiles * self.preprocessing.tokens_per_tile for grid in grids]

    def plan_grid(self, size: tuple[int, int], max_tiles: int) -> Grid:
        """Return the tile grid for an image of `size` (width, height) with at most `max_tiles` tiles."""
        options = self.preprocessing
        if not options.dynamic_image_size:
            return Grid(1, 1, thumbnail=False)
        return plan_grid(
            *size,
            min_tiles=options.min_dynamic_patch,
            max_tiles=max_tiles,
            tile_size=options.tile_size,
            use_thumbnail=options.use_thumbnail,
        )

    def tiles(
        self, images: Iterable[Image.Image], grids: Sequence[Grid], augment: random.Random | None = None
    ) -> torch.Tensor:
        """Return the tiles of all images as uint8, (N, S, S, 3).

        Args:
            images: images in any mode.
            grids: tile grid of each image, from `EncodedConversation.grids`.
            augment: random number generator for JPEG degradation; None disables it.

        Raises:
            ValueError: an image has more than 8 bits per channel.
        """
        options = self.preprocessing
        size = (options.tile_size, options.tile_size)
        red, green, blue = (int(255 * mean) for mean in NORMALIZATIONS[options.normalize_type][0])
        tiles = []
        for image, grid in zip(images, grids, strict=True):
            image = to_rgb(turn(image, options.image_options), options.image_background)
            dynamic = options.dynamic_image_size
            for tile in split_into_tiles(image, grid, options.tile_size) if dynamic else [image]:
                if augment:
                    tile = degrade_jpeg(tile, augment)
                if options.pad2square:
                    tile = pad_to_square(tile, (red, green, blue))
                tiles.append(tile if tile.size == size else tile.resize(size))
        return stack_tiles(tiles, options.tile_size)


def _truncate(
    ids: np.ndarray, labels: np.ndarray, image_positions: np.ndarray, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Truncate token ids and labels to `max_length`.

    Raises:
        RecordError: truncation would cut an image or remove all supervised tokens.
    """
    # The last token of an image is followed by its end token.
    if len(image_positions) and image_positions[-1] + 2 > max_length:
        lost = "an image"
    elif not (labels[:max_length] != IGNORE_INDEX).any():
        lost = "all supervised tokens"
    else:
        return ids[:max_length].copy(), labels[:max_length].copy()
    raise _too_long(len(ids), max_length, len(image_positions), f"; truncation would remove {lost}")


def _too_long(tokens: int, max_length: int, num_images: int, reason: str = "") -> RecordError:
    least = " even with one tile per image" if num_images else ""
    return RecordError(
        f"{tokens} tokens{least}, more than max_seq_length {max_length}{reason}", kind="too long"
    )


def supervised_spans(encoded: EncodedConversation) -> list[list[int]]:
    """Return the token ids of each contiguous span of supervised tokens."""
    spans: list[list[int]] = []
    previous = IGNORE_INDEX
    for token, label in zip(encoded.input_ids.tolist(), encoded.labels.tolist(), strict=True):
        if label != IGNORE_INDEX:
            if previous == IGNORE_INDEX:
                spans.append([])
            spans[-1].append(token)
        previous = label
    return spans

"""From a checked record and its images to ids, labels and tiles: the one planner that everything uses."""

import copy
import random
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from internvl_chat.constants import IGNORE_INDEX
from internvl_chat.data.encode.conversation import ConversationLengths, EncodedConversation, Template
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tiling import (
    NORMALIZATIONS,
    Grid,
    cut_tiles,
    degrade_jpeg,
    pad_to_square,
    plan_grid,
    share_of_budget,
    stack_tiles,
    to_rgb,
)
from internvl_chat.data.sources.problems import RecordProblem
from internvl_chat.data.sources.records import Message

# So many characters, and half as many messages, are tokenised in any case if they may be cut.
_CUTTABLE = 1 << 20
_LEAST = " even with one tile an image"


class Measured(NamedTuple):
    """How much of everything a record has, and what it had to give up for `max_seq_length`."""

    tokens: int
    supervised: int
    tiles: int
    tiles_lost: int = 0
    tokens_cut: int = 0


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model takes it.

    Attributes:
        input_ids: (T,) int64.
        labels: (T,) int64, `IGNORE_INDEX` where nothing is learnt.
        image_positions: places in `input_ids` of the tokens that the tiles' features replace.
        grids: how each image is cut.
        tiles_wanted: tiles that the images would have had without `max_seq_length`.
        tokens_cut: tokens cut off the end, where that was allowed.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    image_positions: torch.Tensor
    grids: tuple[Grid, ...]
    tiles_wanted: int = 0
    tokens_cut: int = 0

    @property
    def num_tiles(self) -> int:
        """Tiles of all images."""
        return sum(grid.tiles for grid in self.grids)

    @property
    def num_supervised(self) -> int:
        """Number of tokens that are learnt."""
        return int((self.labels >= 0).sum())

    @property
    def measured(self) -> Measured:
        """What `RecordEncoder.measure` finds without building ids."""
        lost = max(0, self.tiles_wanted - self.num_tiles)
        return Measured(len(self.input_ids), self.num_supervised, self.num_tiles, lost, self.tokens_cut)


@dataclass(frozen=True)
class _Fit:
    """How the images of a conversation are cut so that it fits.

    Attributes:
        grids: one an image.
        tokens: language-model tokens of each image.
        tiles_wanted: tiles that the images would have had without `max_seq_length`.
        excess: tokens that are still too many.
    """

    grids: tuple[Grid, ...]
    tokens: tuple[int, ...]
    tiles_wanted: int
    excess: int = 0


class RecordEncoder:
    """Plans tiles and encodes conversations with one tokenizer and one set of options.

    Args:
        tokenizer: of the checkpoint.
        preprocessing: of the checkpoint.
        truncate_text: cut the end of a conversation that is too long even with one tile an image.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, preprocessing: Preprocessing, *, truncate_text: bool = False
    ) -> None:
        self.tokenizer, self.preprocessing, self.truncate_text = tokenizer, preprocessing, truncate_text
        self.template = Template(tokenizer, preprocessing.system_text)

    def with_max_tiles(self, max_tiles: int | None) -> "RecordEncoder":
        """Return an encoder with another tile limit; None keeps this one."""
        if max_tiles is None or max_tiles == self.preprocessing.max_dynamic_patch:
            return self
        fewest = min(self.preprocessing.min_dynamic_patch, max_tiles)
        changed = copy.copy(self)
        changed.preprocessing = replace(
            self.preprocessing, max_dynamic_patch=max_tiles, min_dynamic_patch=fewest
        )
        return changed

    def encode(self, messages: Sequence[Message], image_sizes: Sequence[tuple[int, int]]) -> Encoded:
        """Encode a whole conversation for training.

        Args:
            messages: with as many placeholders as there are images.
            image_sizes: (width, height) in pixels.

        Raises:
            RecordProblem: it does not fit into `max_seq_length`.
        """
        self.refuse_endless(messages, len(image_sizes))
        return self._materialise(self.template.encode(messages), image_sizes, self.truncate_text)

    def encode_prompt(self, messages: Sequence[Message], image_sizes: Sequence[tuple[int, int]]) -> Encoded:
        """Encode a conversation up to where the assistant answers.

        Raises:
            RecordProblem: it does not fit into `max_seq_length`.
        """
        self.refuse_endless(messages, len(image_sizes))
        return self._materialise(self.template.encode_prompt(messages), image_sizes, truncate=False)

    def measure(self, messages: Sequence[Message], image_sizes: Sequence[tuple[int, int]]) -> Measured:
        """Return `encode(...).measured` without building ids.

        Raises:
            RecordProblem: as `encode`.
        """
        self.refuse_endless(messages, len(image_sizes))
        lengths = self.template.measure(messages)
        fit = self._fit(lengths, image_sizes, self.truncate_text)
        if fit.excess:
            return self.encode(messages, image_sizes).measured
        tiles = sum(grid.tiles for grid in fit.grids)
        tokens, supervised = lengths.num_tokens(fit.tokens), lengths.num_supervised(fit.tokens)
        return Measured(tokens, supervised, tiles, fit.tiles_wanted - tiles)

    def refuse_endless(self, messages: Sequence[Message], num_images: int) -> None:
        """Refuse a conversation that is certain not to fit, before it costs memory to tokenise it.

        Raises:
            RecordProblem: it has too many messages, images or characters.
        """
        most = self.preprocessing.max_seq_length
        least = _CUTTABLE if self.truncate_text else 0
        # The beginning and the end of a message and of an image are tokens of their own.
        bounds = [("images", num_images, most // 2), ("messages", len(messages), max(most, least) // 2)]
        characters = max(most * self.template.longest_token, least)
        found = sum(len(message.content) for message in messages)
        if found > characters:
            # The tokenizer puts letters and their accents together first.
            found = sum(len(unicodedata.normalize("NFC", message.content)) for message in messages)
        bounds.append(("characters", found, characters))
        for what, number, bound in bounds:
            if number > bound:
                raise RecordProblem(
                    f"{number:,} {what} cannot fit into max_seq_length {most}", kind="too long"
                )

    def filler(self) -> Encoded:
        """Return the shortest conversation that a forward pass takes: two tokens, one of them learnt."""
        ids = torch.tensor(self.template.header[:1] * 2)
        labels = torch.tensor([IGNORE_INDEX, self.template.header[0]])
        return Encoded(ids, labels, torch.zeros(0, dtype=torch.int64), ())

    def _materialise(
        self, messages: EncodedConversation, image_sizes: Sequence[tuple[int, int]], truncate: bool
    ) -> Encoded:
        """Expand the images' tokens to what the plan gives them."""
        fit = self._fit(messages.lengths, image_sizes, truncate)
        ids, labels = messages.expand(fit.tokens)
        places = np.flatnonzero(ids == self.template.context_id)
        if fit.excess:
            ids, labels = self._cut(ids, labels, places, fit.excess)
        arrays = (torch.from_numpy(array) for array in (ids, labels, places))
        return Encoded(*arrays, fit.grids, fit.tiles_wanted, fit.excess)

    def _cut(
        self, ids: np.ndarray, labels: np.ndarray, image_positions: np.ndarray, excess: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cut tokens off the end, as long as every image stays whole and something is left to learn."""
        kept = len(ids) - excess
        # Behind the last token of an image comes the one that closes it.
        if len(image_positions) and image_positions[-1] + 2 > kept:
            what_is_lost = "an image"
        elif not (labels[:kept] != IGNORE_INDEX).any():
            what_is_lost = "all that is learnt"
        else:
            return ids[:kept].copy(), labels[:kept].copy()
        raise RecordProblem(
            f"{len(ids)} tokens{_LEAST if len(image_positions) else ''}, more than max_seq_length "
            f"{kept}; cut to that, it would lose {what_is_lost}",
            kind="too long",
        )

    def _fit(
        self, messages: ConversationLengths, image_sizes: Sequence[tuple[int, int]], truncate: bool
    ) -> _Fit:
        """Plan every image's tiles, fewer for each where the record is too long."""
        options = self.preprocessing
        if messages.num_images != len(image_sizes):
            raise RecordProblem(
                f"{messages.num_images} places for images in the text, but {len(image_sizes)} images",
                kind="placeholders",
            )
        per_image = share_of_budget(options.max_dynamic_patch, max(len(image_sizes), 1))
        wanted = sum(self.plan_grid(size, per_image).tiles for size in image_sizes)
        for budget in range(per_image if image_sizes else 1, 0, -1):
            grids = tuple(self.plan_grid(size, budget) for size in image_sizes)
            tokens = tuple(grid.tiles * options.tokens_per_tile for grid in grids)
            length = messages.num_tokens(tokens)
            if length <= options.max_seq_length:
                return _Fit(grids, tokens, wanted)
        if truncate:
            return _Fit(grids, tokens, wanted, length - options.max_seq_length)
        least = _LEAST if image_sizes else ""
        raise RecordProblem(
            f"{length} tokens{least}, more than max_seq_length {options.max_seq_length}", kind="too long"
        )

    def plan_grid(self, size: tuple[int, int], max_tiles: int) -> Grid:
        """Return how an image of (width, height) pixels is cut under a budget of tiles."""
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
            images: in any mode.
            grids: of `encode`.
            augment: randomness of the JPEG degradation; None for none.

        Raises:
            ValueError: an image has more than 8 bits a channel.
        """
        options = self.preprocessing
        size = (options.tile_size, options.tile_size)
        fill = tuple(int(255 * mean) for mean in NORMALIZATIONS[options.normalize_type][0])
        finished = []
        for image, grid in zip(images, grids, strict=True):
            image = to_rgb(image)
            for tile in cut_tiles(image, grid, options.tile_size) if options.dynamic_image_size else [image]:
                if augment:
                    tile = degrade_jpeg(tile, augment)
                if options.pad2square:
                    tile = pad_to_square(tile, fill)
                finished.append(tile if tile.size == size else tile.resize(size))
        return stack_tiles(finished, options.tile_size)


class TileCounter(RecordEncoder):
    """Stands in for an encoder where no tokenizer is known: it counts tiles, and no tokens.

    Args:
        preprocessing: how images are cut.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.tokenizer, self.preprocessing, self.truncate_text = None, preprocessing, False

    def measure(self, messages: Sequence[Message], image_sizes: Sequence[tuple[int, int]]) -> Measured:
        """Return the tiles of the images, with zeros for all else."""
        per_image = share_of_budget(self.preprocessing.max_dynamic_patch, max(len(image_sizes), 1))
        return Measured(0, 0, sum(self.plan_grid(size, per_image).tiles for size in image_sizes))

    def refuse_endless(self, messages: Sequence[Message], num_images: int) -> None:
        """Refuse more images than fit."""
        most = self.preprocessing.max_seq_length
        if num_images > most // 2:
            raise RecordProblem(
                f"{num_images:,} images cannot fit into max_seq_length {most}", kind="too long"
            )


def supervised_spans(encoded: Encoded) -> list[list[int]]:
    """Return the ids of each unbroken stretch of supervised tokens."""
    spans: list[list[int]] = []
    before = IGNORE_INDEX
    for token, label in zip(encoded.input_ids.tolist(), encoded.labels.tolist(), strict=True):
        if label != IGNORE_INDEX:
            if before == IGNORE_INDEX:
                spans.append([])
            spans[-1].append(token)
        before = label
    return spans

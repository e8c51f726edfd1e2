"""From a checked record and its images to ids, labels and tiles: the one planner that everything uses."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from internvl_chat.constants import IGNORE_INDEX
from internvl_chat.data.preprocessing import Preprocessing
from internvl_chat.data.records import RecordProblem, Turn
from internvl_chat.data.template import EncodedTurns, Template, TurnLengths
from internvl_chat.data.tiling import (
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


class Measured(NamedTuple):
    """How much of everything a record has."""

    tokens: int
    supervised: int
    tiles: int


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model takes it.

    Attributes:
        input_ids: (T,) int64.
        labels: (T,) int64, `IGNORE_INDEX` where nothing is learnt.
        image_places: places in `input_ids` of the tokens that the tiles' features replace.
        grids: how each image is cut.
        tiles_wanted: tiles that the images would have had without `max_seq_length`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    image_places: torch.Tensor
    grids: tuple[Grid, ...]
    tiles_wanted: int = 0

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
        return Measured(len(self.input_ids), self.num_supervised, self.num_tiles)


@dataclass(frozen=True)
class _Fit:
    """How the images of a conversation are cut so that it fits.

    Attributes:
        grids: one an image.
        tokens: language-model tokens of each image.
        tiles_wanted: tiles that the images would have had without `max_seq_length`.
    """

    grids: tuple[Grid, ...]
    tokens: tuple[int, ...]
    tiles_wanted: int


class RecordEncoder:
    """Plans tiles and encodes conversations with one tokenizer and one set of options.

    Args:
        tokenizer: of the checkpoint.
        preprocessing: of the checkpoint.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, preprocessing: Preprocessing) -> None:
        self.tokenizer, self.preprocessing = tokenizer, preprocessing
        self.template = Template(tokenizer, preprocessing.system_text)

    def with_max_tiles(self, max_tiles: int | None) -> "RecordEncoder":
        """Return an encoder with another tile limit; None keeps this one."""
        if max_tiles is None or max_tiles == self.preprocessing.max_dynamic_patch:
            return self
        fewest = min(self.preprocessing.min_dynamic_patch, max_tiles)
        changed = replace(self.preprocessing, max_dynamic_patch=max_tiles, min_dynamic_patch=fewest)
        return RecordEncoder(self.tokenizer, changed)

    def encode(self, turns: Sequence[Turn], image_sizes: Sequence[tuple[int, int]]) -> Encoded:
        """Encode a whole conversation for training.

        Args:
            turns: with as many placeholders as there are images.
            image_sizes: (width, height) in pixels.

        Raises:
            RecordProblem: it does not fit into `max_seq_length`.
        """
        return self._materialise(self.template.encode(turns), image_sizes)

    def encode_prompt(self, turns: Sequence[Turn], image_sizes: Sequence[tuple[int, int]]) -> Encoded:
        """Encode a conversation up to where the assistant answers.

        Raises:
            RecordProblem: it does not fit into `max_seq_length`.
        """
        return self._materialise(self.template.encode_prompt(turns), image_sizes)

    def measure(self, turns: Sequence[Turn], image_sizes: Sequence[tuple[int, int]]) -> Measured:
        """Return `encode(...).measured` without building ids.

        Raises:
            RecordProblem: as `encode`.
        """
        lengths = self.template.measure(turns)
        fit = self._fit(lengths, image_sizes)
        tiles = sum(grid.tiles for grid in fit.grids)
        return Measured(lengths.num_tokens(fit.tokens), lengths.num_supervised(fit.tokens), tiles)

    def _materialise(self, turns: EncodedTurns, image_sizes: Sequence[tuple[int, int]]) -> Encoded:
        """Expand the images' tokens to what the plan gives them."""
        fit = self._fit(turns.lengths, image_sizes)
        ids, labels = turns.expand(fit.tokens)
        places = np.flatnonzero(ids == self.template.context_id)
        arrays = (torch.from_numpy(array) for array in (ids, labels, places))
        return Encoded(*arrays, fit.grids, fit.tiles_wanted)

    def _fit(self, turns: TurnLengths, image_sizes: Sequence[tuple[int, int]]) -> _Fit:
        """Plan every image's tiles, fewer for each where the record is too long."""
        options = self.preprocessing
        if turns.num_images != len(image_sizes):
            raise RecordProblem(
                f"{turns.num_images} places for images in the text, but {len(image_sizes)} images"
            )
        per_image = share_of_budget(options.max_dynamic_patch, max(len(image_sizes), 1))
        wanted = sum(self.plan_grid(size, per_image).tiles for size in image_sizes)
        for budget in range(per_image if image_sizes else 1, 0, -1):
            grids = tuple(self.plan_grid(size, budget) for size in image_sizes)
            tokens = tuple(grid.tiles * options.tokens_per_tile for grid in grids)
            length = turns.num_tokens(tokens)
            if length <= options.max_seq_length:
                return _Fit(grids, tokens, wanted)
        least = " even with one tile an image" if image_sizes else ""
        raise RecordProblem(f"{length} tokens{least}, more than max_seq_length {options.max_seq_length}")

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
        self, images: Sequence[Image.Image], grids: Sequence[Grid], augment: random.Random | None = None
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

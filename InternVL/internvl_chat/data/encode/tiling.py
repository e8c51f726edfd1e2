"""Dynamic resolution (InternVL 1.5, section 3.2): split images into tiles of a fixed size.

Tile grids depend only on the image size, so they are planned without decoding images.
"""

import io
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from internvl_chat.constants import NORMALIZATIONS

JPEG_QUALITIES = (75, 100)


@dataclass(frozen=True)
class Grid:
    """Tile grid of an image: number of columns and rows, and whether a thumbnail tile follows."""

    columns: int
    rows: int
    thumbnail: bool

    @property
    def tiles(self) -> int:
        """Number of tiles, including the thumbnail."""
        return self.columns * self.rows + self.thumbnail


@lru_cache(maxsize=256)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Return all (columns, rows) with `min_tiles` to `max_tiles` tiles, sorted by number of tiles.

    Grids with equal numbers of tiles keep the iteration order of the set, as in the reference. This order
    determines which grid `closest_grid` chooses in an exact tie.
    """
    grids = {
        (columns, rows)
        for n in range(min_tiles, max_tiles + 1)
        for columns in range(1, n + 1)
        for rows in range(1, n + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


@lru_cache(maxsize=65536)
def closest_grid(width: int, height: int, min_tiles: int, max_tiles: int, tile_size: int) -> tuple[int, int]:
    """Return the (columns, rows) of the grid whose aspect ratio is closest to that of the image.

    In a tie, the larger grid wins if the image has more than half as many pixels as that grid. As in the
    reference, the grid is a single tile if `min_tiles` exceeds `max_tiles`.

    >>> closest_grid(1000, 500, 1, 6, 448)
    (2, 1)
    >>> closest_grid(300, 300, 1, 12, 448), closest_grid(1000, 1000, 1, 12, 448)
    ((1, 1), (3, 3))
    >>> closest_grid(1000, 500, 4, 3, 448)
    (1, 1)
    """
    ratio = width / height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in candidate_grids(min_tiles, max_tiles):
        distance = abs(ratio - columns / rows)
        large_enough = width * height > 0.5 * tile_size * tile_size * columns * rows
        if distance < best_distance or (distance == best_distance and large_enough):
            best, best_distance = (columns, rows), distance
    return best


def plan_grid(
    width: int, height: int, *, min_tiles: int, max_tiles: int, tile_size: int, use_thumbnail: bool
) -> Grid:
    """Return the tile grid for an image size; only grids with more than one tile get a thumbnail.

    >>> plan_grid(1000, 500, min_tiles=1, max_tiles=6, tile_size=448, use_thumbnail=True).tiles
    3
    """
    columns, rows = closest_grid(width, height, min_tiles, max_tiles, tile_size)
    return Grid(columns, rows, thumbnail=use_thumbnail and columns * rows > 1)


def tiles_per_image(max_tiles: int, num_images: int) -> int:
    """Return the maximum number of tiles per image of a record, at least one.

    >>> tiles_per_image(12, 5), tiles_per_image(6, 8)
    (2, 1)
    """
    return max(1, max_tiles // num_images)


def split_into_tiles(image: Image.Image, grid: Grid, tile_size: int) -> list[Image.Image]:
    """Resize an RGB image to the grid (bicubic), split it row by row, and append its thumbnail, if any."""
    resized = image.resize((grid.columns * tile_size, grid.rows * tile_size))
    boxes = [
        (x * tile_size, y * tile_size, (x + 1) * tile_size, (y + 1) * tile_size)
        for y in range(grid.rows)
        for x in range(grid.columns)
    ]
    tiles = [resized.crop(box) for box in boxes] if len(boxes) > 1 else [resized]
    return [*tiles, image.resize((tile_size, tile_size))] if grid.thumbnail else tiles


def pad_to_square(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    """Center an image on a square canvas whose side is the image's longer side."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new(image.mode, (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def degrade_jpeg(image: Image.Image, rng: random.Random) -> Image.Image:
    """Re-encode a tile as JPEG with a random quality from 75 to 100, like the reference's augmentation."""
    with io.BytesIO() as buffer:
        image.save(buffer, format="JPEG", quality=rng.randint(*JPEG_QUALITIES))
        buffer.seek(0)
        return Image.open(buffer).copy()


def stack_tiles(tiles: list[Image.Image], tile_size: int) -> torch.Tensor:
    """Stack RGB tiles into a uint8 tensor, (N, tile_size, tile_size, 3)."""
    pixels = np.zeros((len(tiles), tile_size, tile_size, 3), np.uint8)
    for i, tile in enumerate(tiles):
        pixels[i] = np.asarray(tile)
    return torch.from_numpy(pixels)


def normalize_tiles(
    tiles: torch.Tensor, normalization: str, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Normalize uint8 tiles on their device.

    Args:
        tiles: (N, S, S, 3) uint8.
        normalization: a key of `NORMALIZATIONS`.
        dtype: dtype of the result; the computation is in float32.

    Returns:
        (N, 3, S, S).
    """
    mean, std = (torch.tensor(x, device=tiles.device).view(3, 1, 1) for x in NORMALIZATIONS[normalization])
    pixels = tiles.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(255).sub_(mean).div_(std).to(dtype)

"""Grids are compared with exact fractions, tiles with the input pixels, and JPEG with Pillow."""

import io
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from internvl_chat.data.encode.tiling import (
    Grid,
    candidate_grids,
    closest_grid,
    degrade_jpeg,
    normalize_tiles,
    pad_to_square,
    plan_grid,
    split_into_tiles,
    stack_tiles,
    tiles_per_image,
)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class TestCandidates:
    def test_up_to_six_by_hand(self):
        assert sorted(candidate_grids(1, 6)) == [
            (1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (1, 6),
            (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (4, 1), (5, 1), (6, 1),
        ]  # fmt: skip

    @pytest.mark.parametrize(("fewest", "most"), [(1, 1), (1, 12), (3, 12), (7, 7), (2, 40)])
    def test_every_pair_once_sorted_by_product(self, fewest, most):
        grids = candidate_grids(fewest, most)
        expected = {(c, r) for c in range(1, 50) for r in range(1, 50) if fewest <= c * r <= most}
        assert set(grids) == expected
        assert len(grids) == len(expected)
        products = [c * r for c, r in grids]
        assert products == sorted(products)


class TestClosestGrid:
    @pytest.mark.parametrize(
        ("size", "most", "grid"),
        [
            ((448, 448), 12, (1, 1)),
            ((1000, 500), 6, (2, 1)),
            ((500, 1000), 6, (1, 2)),
            ((900, 600), 6, (3, 2)),  # 1.5 exactly
            ((4000, 1000), 12, (4, 1)),
            ((5000, 100), 6, (6, 1)),
            ((100, 5000), 6, (1, 6)),
            ((1, 1), 1, (1, 1)),
            ((5000, 100), 1, (1, 1)),
        ],
    )
    def test_by_hand(self, size, most, grid):
        assert closest_grid(*size, 1, most, 448) == grid

    @pytest.mark.parametrize(
        ("side", "most", "grid"),
        [
            # For a square image 1x1, 2x2 and 3x3 tie: n x n needs more than n*n*448*448/2 pixels, which is
            # a side of more than 633.57 for 2x2, and of 950.35 for 3x3.
            (633, 12, (1, 1)),
            (634, 12, (2, 2)),
            (950, 12, (2, 2)),
            (951, 12, (3, 3)),
            (951, 8, (2, 2)),
            (5000, 3, (1, 1)),
        ],
    )
    def test_ties_of_squares_depend_on_the_number_of_pixels(self, side, most, grid):
        assert closest_grid(side, side, 1, most, 448) == grid

    @pytest.mark.parametrize(
        ("size", "grid"),
        [
            # 3:2 with up to five tiles is equally far from 1x1, 2x1 and 2x2, which need more than 200,704 and
            # 401,408 pixels.
            ((90, 60), (1, 1)),
            ((600, 400), (2, 1)),
            ((900, 600), (2, 2)),
        ],
    )
    def test_ties_of_different_shapes(self, size, grid):
        assert closest_grid(*size, 1, 5, 448) == grid

    @settings(max_examples=150)
    @given(
        width=st.integers(1, 6000),
        height=st.integers(1, 6000),
        fewest=st.integers(1, 4),
        more=st.integers(0, 12),
        tile=st.sampled_from([56, 224, 448]),
    )
    def test_no_grid_is_closer(self, width, height, fewest, more, tile):
        most = fewest + more
        columns, rows = closest_grid(width, height, fewest, most, tile)
        distances = {
            (c, r): abs(Fraction(width, height) - Fraction(c, r))
            for c in range(1, most + 1)
            for r in range(1, most + 1)
            if fewest <= c * r <= most
        }
        nearest = min(distances.values())
        assert distances[columns, rows] == nearest
        # Of grids with equal ratios (1x1, 2x2, ...): the largest that is half filled, else the smallest.
        same_shape = sorted(
            grid for grid, distance in distances.items()
            if distance == nearest and grid[0] * rows == grid[1] * columns
        )  # fmt: skip
        filled = [g for g in same_shape if 2 * width * height > tile * tile * g[0] * g[1]]
        assert (columns, rows) == (filled[-1] if filled else same_shape[0])


class TestPlan:
    def plan(self, size, most, thumbnail=True, fewest=1):
        return plan_grid(*size, min_tiles=fewest, max_tiles=most, tile_size=448, use_thumbnail=thumbnail)

    def test_thumbnail_with_multiple_tiles(self):
        assert self.plan((1000, 500), 6) == Grid(2, 1, True)
        assert self.plan((1000, 500), 6).tiles == 3

    def test_no_thumbnail_with_one_tile(self):
        assert self.plan((400, 400), 6) == Grid(1, 1, False)
        assert self.plan((400, 400), 6).tiles == 1

    def test_thumbnail_disabled(self):
        assert self.plan((1000, 500), 6, thumbnail=False) == Grid(2, 1, False)
        assert self.plan((1000, 500), 6, thumbnail=False).tiles == 2

    def test_min_tiles(self):
        assert self.plan((100, 100), 6, fewest=4) == Grid(2, 2, True)


@pytest.mark.parametrize(
    ("max_tiles", "images", "expected"),
    [(12, 1, 12), (12, 2, 6), (12, 5, 2), (12, 7, 1), (12, 12, 1), (12, 13, 1), (6, 4, 1), (1, 3, 1)],
)
def test_tiles_per_image(max_tiles, images, expected):
    assert tiles_per_image(max_tiles, images) == expected


class TestSplitting:
    def test_row_by_row_then_the_thumbnail(self):
        columns, rows, size = 3, 2, 8
        colors = np.array([[[40 * c, 100 * r, 200] for c in range(columns)] for r in range(rows)], np.uint8)
        image = Image.fromarray(colors.repeat(size, axis=0).repeat(size, axis=1))
        tiles = split_into_tiles(image, Grid(columns, rows, True), size)
        assert [tile.size for tile in tiles] == [(size, size)] * 7
        # The image already has the size of the grid, so every tile has one color.
        expected = [[[c * 40, r * 100, 200]] for r in range(rows) for c in range(columns)]
        assert [
            sorted(map(list, {tuple(p) for p in np.asarray(t).reshape(-1, 3)})) for t in tiles[:6]
        ] == expected
        assert np.array_equal(tiles[6], image.resize((size, size), Image.Resampling.BICUBIC))

    @pytest.mark.parametrize(("grid", "size"), [((2, 3), (50, 31)), ((4, 1), (11, 90)), ((1, 2), (16, 32))])
    def test_resized_with_bicubic_first(self, grid, size):
        image, (columns, rows), tile = noise(*size), grid, 12
        resized = np.asarray(image.resize((columns * tile, rows * tile), Image.Resampling.BICUBIC))
        tiles = stack_tiles(split_into_tiles(image, Grid(columns, rows, False), tile), tile).numpy()
        joined = np.concatenate(
            [np.concatenate(tiles[r * columns : (r + 1) * columns], axis=1) for r in range(rows)]
        )
        assert np.array_equal(joined, resized)

    def test_one_tile(self):
        image = noise(30, 20)
        (tile,) = split_into_tiles(image, Grid(1, 1, False), 16)
        assert np.array_equal(tile, image.resize((16, 16), Image.Resampling.BICUBIC))

    def test_image_is_not_modified(self):
        image = noise(30, 20)
        before = np.array(image)
        split_into_tiles(image, Grid(2, 1, True), 8)
        assert np.array_equal(image, before)


class TestPadToSquare:
    @pytest.mark.parametrize(
        ("size", "left", "top"), [((6, 2), 0, 2), ((2, 6), 2, 0), ((5, 2), 0, 1), ((2, 5), 1, 0)]
    )
    def test_centered(self, size, left, top):
        width, height = size
        image, fill = noise(width, height), (1, 2, 3)
        expected = np.tile(np.array(fill, np.uint8), (max(size), max(size), 1))
        expected[top : top + height, left : left + width] = np.asarray(image)
        assert np.array_equal(pad_to_square(image, fill), expected)

    def test_square_is_unchanged(self):
        image = noise(5, 5)
        assert np.array_equal(pad_to_square(image, (0, 0, 0)), image)


class TestJpeg:
    def test_every_result_is_an_encoding_of_quality_75_to_100(self):
        image = noise(24, 16)
        quality_of = {}
        for quality in range(60, 101):
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG", quality=quality)
            quality_of[np.asarray(Image.open(buffer)).tobytes()] = quality
        assert len(quality_of) == 41  # all qualities differ
        rng = random.Random(0)
        seen = {quality_of[np.asarray(degrade_jpeg(image, rng)).tobytes()] for _ in range(400)}
        assert seen == set(range(75, 101))

    def test_one_random_number_per_tile(self):
        image = noise(24, 16)
        first, second = random.Random(7), random.Random(7)
        tiles = [np.asarray(degrade_jpeg(image, first)) for _ in range(5)]
        again = [np.asarray(degrade_jpeg(image, second)) for _ in range(5)]
        assert all(np.array_equal(a, b) for a, b in zip(tiles, again, strict=True))
        assert len({a.tobytes() for a in tiles}) > 1

    def test_size_and_mode(self):
        degraded = degrade_jpeg(noise(24, 16), random.Random(0))
        assert (degraded.size, degraded.mode) == ((24, 16), "RGB")


class TestStack:
    def test_order_and_layout(self):
        images = [noise(4, 4, seed) for seed in range(3)]
        stacked = stack_tiles(images, 4)
        assert (stacked.shape, stacked.dtype) == ((3, 4, 4, 3), torch.uint8)
        assert all(np.array_equal(stacked[i], image) for i, image in enumerate(images))

    def test_none(self):
        assert stack_tiles([], 4).shape == (0, 4, 4, 3)

    def test_tiles_of_another_size(self):
        with pytest.raises(ValueError, match="broadcast"):
            stack_tiles([noise(5, 4)], 4)


# Constants of the reference; its CLIP standard deviation has one digit less than CLIP's.
STATISTICS = {
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "clip": ([0.4814546, 0.4578275, 0.40821073], [0.2686295, 0.2613025, 0.2757711]),
    "siglip": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
}


class TestNormalize:
    @pytest.mark.parametrize("name", STATISTICS)
    def test_against_numpy(self, name):
        tiles = np.random.default_rng(0).integers(0, 256, (3, 5, 5, 3), dtype=np.uint8)
        mean, std = (np.array(values) for values in STATISTICS[name])
        expected = ((tiles.astype(np.float64) / 255 - mean) / std).transpose(0, 3, 1, 2)
        given_tiles = torch.from_numpy(tiles.copy())
        pixels = normalize_tiles(given_tiles, name)
        assert (pixels.dtype, pixels.is_contiguous()) == (torch.float32, True)
        assert np.allclose(pixels.numpy(), expected, rtol=0, atol=1e-6)
        assert np.array_equal(given_tiles, tiles)

    def test_black_and_white_by_hand(self):
        tiles = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 1, 3)
        assert normalize_tiles(tiles, "siglip").flatten().tolist() == [-1.0] * 3 + [1.0] * 3
        black, white = normalize_tiles(tiles, "imagenet").flatten(1)
        assert black.tolist() == pytest.approx([-2.117904, -2.035714, -1.804444], abs=1e-5)
        assert white.tolist() == pytest.approx([2.248908, 2.428571, 2.64], abs=1e-5)

    def test_rounded_once_at_the_end(self):
        tiles = torch.arange(243, dtype=torch.uint8).view(1, 9, 9, 3)
        assert torch.equal(
            normalize_tiles(tiles, "imagenet", torch.bfloat16), normalize_tiles(tiles, "imagenet").bfloat16()
        )

    def test_no_tiles(self):
        assert normalize_tiles(torch.zeros(0, 7, 7, 3, dtype=torch.uint8), "imagenet").shape == (0, 3, 7, 7)

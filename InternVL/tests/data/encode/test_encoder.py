"""The encoder: tiles that fit the token budget, and their pixels compared with Pillow."""

import io
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tiling import Grid
from internvl_chat.data.encode.tokenizer_training import train_tokenizer
from internvl_chat.data.sources.problems import RecordError
from internvl_chat.data.sources.records import Message

TILE, TOKENS = 16, 10
WIDE, TALL, SQUARE = (400, 100), (100, 400), (16, 16)
BICUBIC = Image.Resampling.BICUBIC


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["what is this ? a cat on a mat"] * 20, 300)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    def build(**options) -> RecordEncoder:
        small = {"tile_size": TILE, "tokens_per_tile": TOKENS, "system_text": "s", "max_seq_length": 10_000}
        return RecordEncoder(tokenizer, Preprocessing(**{**small, **options}))

    return build


def conversation(images: int) -> list[Message]:
    return [Message("user", "<image>\n" * images + "what is this ?"), Message("assistant", "a cat")]


def text_of(*tiles: int) -> str:
    """Return the conversation as one string, including the image tokens."""
    images = "".join(f"<img>{'<IMG_CONTEXT>' * TOKENS * n}</img>\n" for n in tiles)
    return (
        f"<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n{images}what is this ?<|im_end|>\n"
        "<|im_start|>assistant\na cat<|im_end|>\n"
    )


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class TestEncode:
    @pytest.mark.parametrize(
        ("sizes", "most", "grids"),
        [
            ([], 4, []),
            ([SQUARE], 4, [(1, 1, False)]),
            ([WIDE], 4, [(4, 1, True)]),
            ([WIDE], 3, [(3, 1, True)]),
            ([WIDE, TALL], 8, [(4, 1, True), (1, 4, True)]),
            ([WIDE, TALL, SQUARE], 8, [(2, 1, True), (1, 2, True), (1, 1, False)]),  # 8 // 3 each
            ([WIDE, TALL, WIDE], 2, [(1, 1, False)] * 3),
        ],
    )
    def test_grids_and_tokens(self, encoder, tokenizer, sizes, most, grids):
        encoded = encoder(max_dynamic_patch=most).encode(conversation(len(sizes)), sizes)
        assert encoded.grids == tuple(Grid(*grid) for grid in grids)
        # Tokenized as one string; the template is tested in test_conversation.py.
        assert (
            encoded.input_ids.tolist()
            == tokenizer(text_of(*(grid.tiles for grid in encoded.grids))).input_ids
        )
        assert encoded.input_ids.dtype == encoded.labels.dtype == torch.int64
        answer = tokenizer("a cat<|im_end|>").input_ids
        assert encoded.labels[encoded.labels >= 0].tolist() == answer
        assert encoded.num_supervised == len(answer)

    def test_prompt(self, encoder, tokenizer):
        encoded = encoder(max_dynamic_patch=4).encode_prompt(conversation(1)[:1], [WIDE])
        assert tokenizer.decode(encoded.input_ids) == text_of(5).removesuffix("a cat<|im_end|>\n")
        assert encoded.num_supervised == 0
        assert encoded.grids == (Grid(4, 1, True),)

    def test_without_thumbnail(self, encoder):
        encoded = encoder(max_dynamic_patch=4, use_thumbnail=False).encode(conversation(1), [WIDE])
        assert encoded.grids == (Grid(4, 1, False),)

    def test_min_dynamic_patch(self, encoder):
        encoded = encoder(max_dynamic_patch=6, min_dynamic_patch=4).encode(conversation(1), [SQUARE])
        assert encoded.grids[0].tiles >= 4 + 1
        assert encoded.grids[0].columns * encoded.grids[0].rows in (4, 5, 6)


class TestTokenBudget:
    """With a limit of 4, 3, 2 or 1 tiles, WIDE has 5, 4, 3 (including the thumbnail) or 1."""

    @pytest.mark.parametrize(
        ("spare", "tiles"), [(60, 5), (50, 5), (49, 4), (40, 4), (39, 3), (30, 3), (29, 1), (10, 1)]
    )
    def test_one_image_loses_tiles(self, encoder, tokenizer, spare, tiles):
        longest = len(tokenizer(text_of(0)).input_ids) + spare
        encoded = encoder(max_dynamic_patch=4, max_seq_length=longest).encode(conversation(1), [WIDE])
        assert [grid.tiles for grid in encoded.grids] == [tiles]
        assert encoded.input_ids.tolist() == tokenizer(text_of(tiles)).input_ids

    @pytest.mark.parametrize(
        ("spare", "tiles"),
        [(110, (5, 5, 1)), (109, (4, 4, 1)), (89, (3, 3, 1)), (69, (1, 1, 1)), (30, (1, 1, 1))],
    )
    def test_several_images_lose_tiles_evenly(self, encoder, tokenizer, spare, tiles):
        longest = len(tokenizer(text_of(0, 0, 0)).input_ids) + spare
        encoded = encoder(max_dynamic_patch=12, max_seq_length=longest).encode(
            conversation(3), [WIDE, TALL, SQUARE]
        )
        assert tuple(grid.tiles for grid in encoded.grids) == tiles
        assert len(encoded.input_ids) <= longest

    @pytest.mark.parametrize("sizes", [[WIDE], [WIDE, TALL]])
    def test_no_image_is_dropped_or_truncated(self, encoder, tokenizer, sizes):
        needed = len(tokenizer(text_of(*[1] * len(sizes))).input_ids)
        with pytest.raises(RecordError) as caught:
            encoder(max_dynamic_patch=4, max_seq_length=needed - 1).encode(conversation(len(sizes)), sizes)
        assert f"{needed} tokens" in str(caught.value)
        assert f"max_seq_length {needed - 1}" in str(caught.value)

    def test_text_only(self, encoder, tokenizer):
        needed = len(tokenizer(text_of()).input_ids)
        assert len(encoder(max_seq_length=needed).encode(conversation(0), []).input_ids) == needed
        with pytest.raises(RecordError, match=f"{needed} tokens"):
            encoder(max_seq_length=needed - 1).encode(conversation(0), [])

    def test_prompt(self, encoder):
        with pytest.raises(RecordError, match="max_seq_length 9"):
            encoder(max_seq_length=9).encode_prompt(conversation(1)[:1], [WIDE])


class TestMeasure:
    SIZES = st.tuples(st.integers(1, 900), st.integers(1, 900))
    TEXTS = st.text("a b\n<", max_size=6) | st.sampled_from(
        ["<image>", "<IMG_CONTEXT>", "<img>", "<|im_end|>"]
    )

    @settings(max_examples=200)
    @given(st.data())
    def test_measure_and_encode_agree(self, encoder, data):
        sizes = data.draw(st.lists(self.SIZES, max_size=4))
        texts = data.draw(st.lists(self.TEXTS, min_size=1, max_size=5))
        messages = [Message("user", "<image>\n" * len(sizes))]
        messages += [Message(("assistant", "user")[i % 2], text) for i, text in enumerate(texts)]
        options = {"max_dynamic_patch": data.draw(st.sampled_from([1, 3, 6, 12]))}
        options["max_seq_length"] = data.draw(st.integers(10, 300) | st.just(10_000))
        options["use_thumbnail"] = data.draw(st.booleans())
        options["dynamic_image_size"] = data.draw(st.booleans())
        record_encoder = encoder(**options)
        try:
            expected = record_encoder.encode(messages, sizes).lengths
        except RecordError as problem:
            with pytest.raises(RecordError) as caught:
                record_encoder.measure(messages, sizes)
            assert str(caught.value) == str(problem)
        else:
            assert record_encoder.measure(messages, sizes) == expected

    def test_by_hand(self, encoder, tokenizer):
        lengths = encoder(max_dynamic_patch=8).measure(conversation(3), [WIDE, TALL, SQUARE])
        assert lengths == (len(tokenizer(text_of(3, 3, 1)).input_ids), 3, 7, 0, 0)


class TestPixels:
    def test_tiles_of_all_images_in_order(self, encoder):
        images = [noise(*WIDE, seed=1), noise(*SQUARE, seed=2), noise(*TALL, seed=3)]
        record_encoder = encoder(max_dynamic_patch=6)
        tiles = record_encoder.tiles(
            images, record_encoder.encode(conversation(3), [i.size for i in images]).grids
        ).numpy()
        assert tiles.shape == (3 + 1 + 3, TILE, TILE, 3)
        wide = np.asarray(images[0].resize((2 * TILE, TILE), BICUBIC))
        tall = np.asarray(images[2].resize((TILE, 2 * TILE), BICUBIC))
        expected = [
            wide[:, :TILE], wide[:, TILE:], np.asarray(images[0].resize((TILE, TILE), BICUBIC)),
            np.asarray(images[1]),
            tall[:TILE], tall[TILE:], np.asarray(images[2].resize((TILE, TILE), BICUBIC)),
        ]  # fmt: skip
        assert all(np.array_equal(tile, part) for tile, part in zip(tiles, expected, strict=True))

    def test_no_image(self, encoder):
        assert encoder().tiles([], ()).shape == (0, TILE, TILE, 3)

    def test_numbers_of_images_and_grids_must_match(self, encoder):
        with pytest.raises(ValueError, match="zip"):
            encoder().tiles([noise(*SQUARE)], ())

    @pytest.mark.parametrize(
        ("image", "color"),
        [
            (Image.new("L", (30, 20), 77), (77, 77, 77)),
            (Image.new("LA", (30, 20), (77, 5)), (77, 77, 77)),
            (Image.new("1", (30, 20), 1), (255, 255, 255)),
            (Image.new("RGBA", (30, 20), (10, 20, 30, 0)), (10, 20, 30)),  # transparency is ignored
            (Image.new("CMYK", (30, 20), (0, 0, 0, 0)), (255, 255, 255)),
            (Image.new("CMYK", (30, 20), (0, 0, 0, 255)), (0, 0, 0)),
            (Image.new("CMYK", (30, 20), (0, 255, 255, 0)), (255, 0, 0)),
        ],
        ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
    )
    @pytest.mark.parametrize("dynamic", [True, False])
    def test_modes(self, encoder, image, color, dynamic):
        record_encoder = encoder(dynamic_image_size=dynamic)
        tiles = record_encoder.tiles([image], record_encoder.encode(conversation(1), [image.size]).grids)
        assert np.unique(tiles.reshape(-1, 3).numpy(), axis=0).tolist() == [list(color)]

    def test_palette(self, encoder):
        image = Image.new("P", (30, 20), 1)
        image.putpalette([0, 0, 0, 200, 100, 50])
        tiles = encoder().tiles([image], [Grid(1, 1, False)])
        assert np.unique(tiles.reshape(-1, 3).numpy(), axis=0).tolist() == [[200, 100, 50]]

    def test_palette_images_are_resized_as_rgb(self, encoder):
        """Resizing palette indices would give wrong colors or nearest-neighbor pixels."""
        image = Image.new("P", (32, 16))
        image.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
        image.paste(2, (16, 0, 32, 16))
        tiles = encoder().tiles([image], [Grid(1, 1, False)])
        assert np.array_equal(tiles[0], image.convert("RGB").resize((TILE, TILE), BICUBIC))


class TestFixedImageSize:
    @pytest.mark.parametrize("size", [WIDE, TALL, SQUARE, (7, 9)])
    def test_one_tile_per_image(self, encoder, tokenizer, size):
        record_encoder = encoder(dynamic_image_size=False, max_dynamic_patch=12)
        encoded = record_encoder.encode(conversation(1), [size])
        assert encoded.grids == (Grid(1, 1, False),)
        assert encoded.input_ids.tolist() == tokenizer(text_of(1)).input_ids
        tiles = record_encoder.tiles([noise(*size)], encoded.grids)
        assert np.array_equal(tiles[0], noise(*size).resize((TILE, TILE), BICUBIC))

    @pytest.mark.parametrize("size", [(40, 10), (10, 40), (41, 10), (20, 20)])
    @pytest.mark.parametrize(
        ("statistics", "fill"), [("imagenet", (123, 116, 103)), ("siglip", (127, 127, 127))]
    )
    def test_padded_with_the_mean_color(self, encoder, size, statistics, fill):
        record_encoder = encoder(dynamic_image_size=False, pad2square=True, normalize_type=statistics)
        image, side = noise(*size), max(size)
        square = np.tile(np.array(fill, np.uint8), (side, side, 1))
        top, left = (side - size[1]) // 2, (side - size[0]) // 2
        square[top : top + size[1], left : left + size[0]] = np.asarray(image)
        tiles = record_encoder.tiles([image], record_encoder.encode(conversation(1), [size]).grids)
        assert np.array_equal(tiles[0], Image.fromarray(square).resize((TILE, TILE), BICUBIC))

    def test_tiles_of_a_grid_need_no_padding(self, encoder):
        image, grids = noise(*WIDE), [Grid(4, 1, True)]
        assert torch.equal(encoder(pad2square=True).tiles([image], grids), encoder().tiles([image], grids))


class TestAugmentation:
    IMAGES, GRIDS = (noise(*WIDE), noise(*TALL, seed=1)), (Grid(4, 1, True), Grid(1, 2, True))

    def test_jpeg_degradation_only(self, encoder):
        plain = encoder().tiles(self.IMAGES, self.GRIDS).numpy()
        degraded = encoder().tiles(self.IMAGES, self.GRIDS, random.Random(0)).numpy()
        for before, after in zip(plain, degraded, strict=True):
            encodings = []
            for quality in range(75, 101):
                buffer = io.BytesIO()
                Image.fromarray(before).save(buffer, format="JPEG", quality=quality)
                encodings.append(np.asarray(Image.open(buffer)))
            assert any(np.array_equal(after, encoding) for encoding in encodings)

    def test_precedes_resizing_of_a_single_tile(self, encoder):
        image = noise(40, 30)
        tiles = encoder(dynamic_image_size=False).tiles([image], [Grid(1, 1, False)], random.Random(3))
        expected = []
        for quality in range(75, 101):
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG", quality=quality)
            expected.append(np.asarray(Image.open(buffer).resize((TILE, TILE), BICUBIC)))
        assert any(np.array_equal(tiles[0], pixels) for pixels in expected)

    def test_reproducible_from_the_seed(self, encoder):
        tiles = [encoder().tiles(self.IMAGES, self.GRIDS, random.Random(seed)) for seed in (1, 1, 2)]
        assert torch.equal(tiles[0], tiles[1])
        assert not torch.equal(tiles[0], tiles[2])

    def test_disabled_without_a_generator(self, encoder):
        random.seed(0)
        first = encoder().tiles(self.IMAGES, self.GRIDS)
        random.seed(1)
        assert torch.equal(first, encoder().tiles(self.IMAGES, self.GRIDS))


def test_numbers_of_positions_and_images_must_match(encoder):
    for messages, sizes in (
        (conversation(2), [(100, 100)]),
        (conversation(0), [(100, 100)]),
        ([Message("user", "What is <IMG_CONTEXT>?")], []),
    ):
        with pytest.raises(RecordError, match=r"\d image placeholders in the conversation, but \d images"):
            encoder().encode_prompt(messages, sizes)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_images_are_rejected(encoder, mode):
    image = Image.new(mode, (60, 60))
    encoded = encoder().encode_prompt(conversation(1), [image.size])
    with pytest.raises(ValueError, match=f"more than 8 bits per channel .mode {mode}."):
        encoder().tiles([image], encoded.grids)

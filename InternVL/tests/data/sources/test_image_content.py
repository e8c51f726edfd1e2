"""Image content beyond a single frame of opaque 8-bit RGB: detection from the header, and preservation."""

import struct

import numpy as np
import pytest
from PIL import Image, features
from small_sets import noise, write_png

from internvl_chat.data.sources.image_content import (
    ImageContent,
    ImageOptions,
    content_warnings,
    read_content,
)
from internvl_chat.data.sources.images import decode_image, image_size

SIZE = (48, 32)
PLAIN = ImageContent()


def content_of(file) -> ImageContent:
    with Image.open(file) as image:
        return read_content(image)


def save(folder, name: str, image: Image.Image | None = None, **options):
    (image or noise(*SIZE)).save(folder / name, **options)
    return folder / name


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.png", "a.tif", "a.webp", "a.bmp", "a.ppm", "a.jp2", "a.avif", "a.gif"]
)
def test_plain(tmp_path, name):
    if name.endswith("avif") and not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    assert content_of(save(tmp_path, name)) == PLAIN


class TestFrames:
    @pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
    def test_counted(self, tmp_path, name):
        others = [noise(*SIZE, seed=1), noise(*SIZE, seed=2)]
        assert content_of(save(tmp_path, name, save_all=True, append_images=others)).frames == 3

    def test_reduced_copies_in_a_tiff_are_not_counted(self, tmp_path):
        copy = noise(24, 16)
        copy.encoderinfo = {"tiffinfo": {254: 1}}
        file = save(tmp_path, "a.tif", save_all=True, append_images=[copy])
        with Image.open(file) as image:
            assert image.n_frames == 2
        assert content_of(file).frames == 1

    @pytest.mark.parametrize("flag", [1, 4])
    def test_copy_or_mask_as_the_first_page_of_a_tiff(self, tmp_path, flag):
        copy = noise(24, 16)
        options = {"save_all": True, "append_images": [noise(*SIZE)], "tiffinfo": {254: flag}}
        assert content_of(save(tmp_path, "a.tif", copy, **options)).frames == 2

    def test_many_pages_of_a_tiff_are_not_all_counted(self, tmp_path):
        tags = [(256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 8), (278, 1), (279, 1)]
        page = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in tags)
        step = len(page) + 4
        pages = b"".join(page + struct.pack("<I", 8 + step * n) for n in range(1, 1201))
        file = tmp_path / "a.tif"
        file.write_bytes(struct.pack("<2sHI", b"II", 42, 8) + pages)
        [(_, message)] = content_warnings(["a.tif"], [content_of(file)], ImageOptions(), [False])
        assert message == "a.tif: only the first of 1000 or more pages or frames is used"

    def test_preview_of_a_photo(self, tmp_path):
        assert content_of(save(tmp_path, "a.mpo", save_all=True, append_images=[noise(8, 8)])).frames == 1


class TestBits:
    def test_png(self, tmp_path):
        assert content_of(write_png(tmp_path / "a.png", 8, 8, bits=16, colours=2, row=bytes(48))).bits == 16
        assert content_of(write_png(tmp_path / "b.png", 8, 8, bits=16, colours=4, row=bytes(32))).bits == 16

    @pytest.mark.parametrize(("largest", "bits"), [(255, 8), (4095, 12), (65535, 16)])
    def test_ppm(self, tmp_path, largest, bits):
        pixels = np.zeros((8, 8, 3), "u1" if largest < 256 else ">u2").tobytes()
        (tmp_path / "a.ppm").write_bytes(f"P6\n8 8\n{largest}\n".encode() + pixels)
        assert content_of(tmp_path / "a.ppm").bits == bits

    def test_jpeg_2000(self, tmp_path):
        image = Image.fromarray(np.zeros((8, 8), np.uint16))
        assert content_of(save(tmp_path, "a.jp2", image)).bits == 16
        assert content_of(save(tmp_path, "a.j2k", image)).bits == 16

    def test_tiff(self, tmp_path):
        # Pillow writes no 16-bit RGB: header, three values for the bits, a row per tag, and the pixels.
        tags = [
            (256, 4, 1, 8),
            (257, 4, 1, 8),
            (258, 3, 3, 8),
            (259, 3, 1, 1),
            (262, 3, 1, 2),
            (273, 4, 1, 200),
            (277, 3, 1, 3),
            (278, 4, 1, 8),
            (279, 4, 1, 384),
        ]
        directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        start = struct.pack("<2sHI", b"II", 42, 14) + struct.pack("<HHH", 16, 16, 16) + directory + bytes(4)
        (tmp_path / "a.tif").write_bytes(start.ljust(200, b"\0") + bytes(384))
        assert content_of(tmp_path / "a.tif").bits == 16
        assert decode_image(tmp_path / "a.tif").mode == "RGB"


class TestAlpha:
    @pytest.mark.parametrize(
        ("name", "mode", "options"),
        [
            ("a.png", "RGBA", {}),
            ("a.png", "LA", {}),
            ("a.png", "P", {"transparency": 0}),
            ("a.tif", "RGBA", {}),
            ("a.png", "RGB", {"transparency": (0, 0, 0)}),
            ("a.gif", "P", {"transparency": 0}),
        ],
    )
    def test_found(self, tmp_path, name, mode, options):
        assert content_of(save(tmp_path, name, noise(*SIZE).convert(mode), **options)).has_alpha

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
    def test_background(self, tmp_path, mode):
        image = Image.new("RGBA", SIZE, (0, 0, 0, 0))
        image.paste((0, 0, 0, 255), (0, 0, 24, 32))
        file = save(
            tmp_path, "a.tif" if mode == "PA" else "a.png", image.convert("LA" if mode == "PA" else mode)
        )
        read = {name: decode_image(file, ImageOptions(name)) for name in ("none", "white", "black")}
        assert all(image.mode == "RGB" for image in read.values())
        assert [image.getpixel((3, 3)) for image in read.values()] == [(0, 0, 0)] * 3
        assert [image.getpixel((40, 3)) for image in read.values()] == [(0, 0, 0), (255, 255, 255), (0, 0, 0)]

    def test_half_transparent(self, tmp_path):
        file = save(tmp_path, "a.png", Image.new("RGBA", SIZE, (0, 0, 0, 128)))
        assert decode_image(file, ImageOptions("white")).getpixel((0, 0)) == (127, 127, 127)

    def test_transparent_color_of_a_palette(self, tmp_path):
        image = Image.new("P", SIZE, 1)
        image.putpalette([9, 9, 9, 50, 60, 70])
        image.paste(0, (0, 0, 24, 32))
        file = save(tmp_path, "a.png", image, transparency=0)
        read = decode_image(file, ImageOptions("white"))
        assert [read.getpixel((x, 3)) for x in (3, 40)] == [(255, 255, 255), (50, 60, 70)]
        assert decode_image(file).getpixel((3, 3)) == (9, 9, 9)


class TestRotation:
    @pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_applied_on_request(self, tmp_path, name, orientation):
        file = save(tmp_path, name, exif=turned(orientation))
        assert content_of(file).orientation == orientation
        assert decode_image(file).size == image_size(file) == SIZE
        options = ImageOptions(exif_transpose=True)
        size = SIZE if orientation < 5 else SIZE[::-1]
        assert decode_image(file, options).size == image_size(file, options) == size

    def test_pixels(self, tmp_path):
        image = noise(*SIZE)
        file = save(tmp_path, "a.png", image, exif=turned(6))
        expected = image.transpose(Image.Transpose.ROTATE_270)
        assert decode_image(file, ImageOptions(exif_transpose=True)).tobytes() == expected.tobytes()
        assert decode_image(file).tobytes() == image.tobytes()

    @pytest.mark.parametrize("value", [0, 9, 1000])
    def test_invalid_orientation(self, tmp_path, value):
        assert content_of(save(tmp_path, "a.jpg", exif=turned(value))).orientation == 1

    def test_malformed_exif(self, tmp_path):
        file = save(tmp_path, "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
        assert content_of(file).orientation == 1

    def test_tiff_is_turned_by_pillow(self, tmp_path):
        file = save(tmp_path, "a.tif", tiffinfo={274: 6})
        assert content_of(file).orientation == 1
        assert decode_image(file).size == image_size(file) == SIZE[::-1]


class TestWarnings:
    LOST = ImageContent(frames=3, bits=16, orientation=6, has_alpha=True)

    def kinds(self, content, options=ImageOptions(), transparent=None):  # noqa: B008
        return [kind for kind, _ in content_warnings(["a"], [content], options, [transparent])]

    def test_one_of_each_kind(self):
        assert self.kinds(PLAIN) == []
        assert self.kinds(self.LOST) == ["multiple frames", "transparency", "color depth", "exif rotation"]

    def test_no_warning_about_preserved_content(self):
        assert self.kinds(self.LOST, ImageOptions("white", True)) == ["multiple frames", "color depth"]

    def test_opaque_pixels(self):
        content = ImageContent(has_alpha=True)
        assert self.kinds(content, transparent=False) == []
        assert self.kinds(content, transparent=True) == ["transparency"]

    def test_one_warning_for_all_images_of_a_record(self):
        found = list(
            content_warnings(["a", "b", "c"], [self.LOST] * 3, ImageOptions("white", True), [None] * 3)
        )
        assert found[0] == (
            "multiple frames",
            "a: only the first of 3 pages or frames is used (and 2 more images)",
        )

"""Image files of all kinds: read like Pillow reads them, or rejected with an error that names the file."""

import io
import os
import socket
import struct

import numpy as np
import pytest
from PIL import Image
from small_sets import TILE, image_record, noise, smooth, write_png, write_set

from internvl_chat.data.sources import images as images_module
from internvl_chat.data.sources.images import (
    MAX_PIXELS,
    check_decoding,
    decode_image,
    image_info,
    image_size,
    open_image,
    to_rgb,
)
from internvl_chat.data.sources.problems import RecordError
from internvl_chat.utils.errors import DataError


@pytest.fixture
def save(tmp_path):
    """Save an image in the image folder of a dataset."""

    def save(name: str, image: Image.Image, **options):
        (tmp_path / "images").mkdir(exist_ok=True)
        image.save(tmp_path / "images" / name, **options)
        return tmp_path / "images" / name

    return save


def problem_of(read, *arguments) -> tuple[str, str]:
    with pytest.raises(RecordError) as caught:
        read(*arguments)
    return caught.value.kind, str(caught.value)


class TestAccepted:
    """The tile of a single-tile record equals the image converted by Pillow and resized."""

    def check(self, tmp_path, file) -> None:
        records = write_set(tmp_path, [image_record(0, file.name)], max_dynamic_patch=1)
        with Image.open(file) as image:
            expected = image.convert("RGB").resize((TILE, TILE))
            size = image.size
        assert image_size(file) == size
        assert records.check(0, decode=True).lengths == records.load(0).encoded.lengths
        assert np.array_equal(records.load(0).tiles[0].numpy(), np.asarray(expected))

    def test_cmyk(self, tmp_path, save):
        self.check(tmp_path, save("cmyk.jpg", smooth(60, 40).convert("CMYK")))

    def test_palette(self, tmp_path, save):
        self.check(tmp_path, save("palette.png", smooth(60, 40).quantize(16)))

    def test_palette_with_transparency(self, tmp_path, save):
        self.check(tmp_path, save("palette.png", smooth(60, 40).quantize(16), transparency=3))

    @pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "1"])
    def test_modes(self, tmp_path, save, mode):
        self.check(tmp_path, save("mode.png", smooth(60, 40).convert(mode)))

    def test_progressive_jpeg(self, tmp_path, save):
        self.check(tmp_path, save("progressive.jpg", smooth(60, 40), progressive=True))

    @pytest.mark.parametrize("suffix", ["gif", "tiff", "webp", "bmp", "ppm", "jp2"])
    def test_formats(self, tmp_path, save, suffix):
        self.check(tmp_path, save(f"picture.{suffix}", smooth(60, 40)))

    def test_first_frame_of_an_animated_gif(self, tmp_path, save):
        frames = [smooth(60, 40, seed).quantize(16) for seed in range(3)]
        file = save("moving.gif", frames[0], save_all=True, append_images=frames[1:], duration=10)
        self.check(tmp_path, file)
        first = np.asarray(frames[0].convert("RGB"))
        assert np.array_equal(np.asarray(decode_image(file)), first)

    def test_exif_rotation_is_not_applied(self, tmp_path, save):
        """The reference ignores it; a grid planned for the rotated size would not match the pixels."""
        exif = Image.Exif()
        exif[0x0112] = 6
        file = save("turned.jpg", smooth(60, 40), exif=exif)
        self.check(tmp_path, file)
        assert decode_image(file).size == image_size(file) == (60, 40)

    def test_strip_of_1_by_5000_pixels(self, tmp_path, save):
        records = write_set(tmp_path, [image_record(0, save("strip.png", noise(1, 5000)).name)])
        assert records.load(0).encoded.grids[0].rows == 4
        assert len(records.load(0).tiles) == 5
        self.check(tmp_path, tmp_path / "images/strip.png")

    def test_30000_pixels_in_a_row(self, tmp_path):
        (tmp_path / "images").mkdir()
        self.check(tmp_path, write_png(tmp_path / "images/row.png", 30_000, 1))

    def test_format_does_not_depend_on_the_name(self, tmp_path, save):
        self.check(tmp_path, save("png.jpg", smooth(60, 40), format="PNG"))

    @pytest.mark.parametrize(
        ("colours", "pixel", "expected"),
        [
            (2, (0xFF00, 0x8000, 0x1234), (0xFF, 0x80, 0x12)),
            (6, (0xFF00, 0x8000, 0x1234, 0x0100), (0xFF, 0x80, 0x12)),
            (4, (0xA7FF, 0x0100), (0xA7, 0xA7, 0xA7)),
        ],
        ids=["RGB", "RGBA", "LA"],
    )
    def test_16_bit_color_is_read_as_8_bit(self, tmp_path, colours, pixel, expected):
        """For PNGs with multiple channels, Pillow keeps the upper 8 bits; transparency is dropped."""
        (tmp_path / "images").mkdir()
        row = struct.pack(f">{len(pixel)}H", *pixel) * 20
        file = write_png(tmp_path / "images/deep.png", 20, 20, bits=16, colours=colours, row=row)
        self.check(tmp_path, file)
        assert decode_image(file).getpixel((3, 3)) == expected


class TestRefused:
    def test_empty_file(self, tmp_path):
        file = tmp_path / "empty.jpg"
        file.touch()
        assert problem_of(open_image, file) == (
            "image unreadable", f"the image {file} cannot be read: it is empty"
        )  # fmt: skip

    @pytest.mark.parametrize(
        "content", [b"<html>not found</html>", b"\xff\xd8\xff", b"GIF89a", b"\x89PNG\r\n\x1a\n"]
    )
    def test_not_an_image(self, tmp_path, content):
        file = tmp_path / "page.jpg"
        file.write_bytes(content)
        kind, message = problem_of(open_image, file)
        assert kind == "image unreadable"
        assert message.startswith(f"the image {file} cannot be read: ")

    def test_text_named_jpg(self, tmp_path):
        file = tmp_path / "text.jpg"
        file.write_text("a text")
        assert "its format is not one of JPEG, PNG, GIF, TIFF" in problem_of(open_image, file)[1]

    def test_truncated_jpeg(self, tmp_path, save):
        file = save("truncated.jpg", noise(60, 40))
        file.write_bytes(file.read_bytes()[:-500])
        assert image_size(file) == (60, 40)
        kind, message = problem_of(decode_image, file)
        assert kind == "image unreadable"
        assert f"the image {file} cannot be decoded: image file is truncated" in message
        records = write_set(tmp_path, [image_record(0, file.name)])
        assert records.encode(0)[1].lengths.tiles == 5
        for function in (records.check, records.load):
            with pytest.raises(DataError, match="image file is truncated") as caught:
                function(0)
            assert (caught.value.kind, caught.value.record) == ("image unreadable", "r0")

    @pytest.mark.parametrize("suffix", ["png", "tiff"])
    def test_16_bit_grayscale(self, save, suffix):
        deep = Image.fromarray(np.arange(60 * 40, dtype=np.uint16).reshape(40, 60) * 20)
        file = save(f"deep.{suffix}", deep)
        for read in (image_size, decode_image, image_info):
            kind, message = problem_of(read, file)
            assert kind == "image depth"
            assert message.startswith(f"the image {file} has more than 8 bits per channel")
            assert message.endswith("convert it to 8 bits")

    def test_floating_point(self, save):
        assert problem_of(image_size, save("f.tiff", Image.new("F", (4, 4))))[0] == "image depth"

    def test_signed_pixel_values(self, save):
        file = save("signed.tiff", Image.new("L", (4, 4), 1), tiffinfo={339: 2})
        for read in (image_size, decode_image, image_info):
            kind, message = problem_of(read, file)
            assert kind == "image depth"
            assert message == f"the image {file} has signed pixel values; convert it to unsigned 8 bits"
        with Image.open(file) as opened, pytest.raises(ValueError, match="signed pixel values"):
            to_rgb(opened)

    def test_30000_by_30000_of_one_color(self, tmp_path):
        file = write_png(tmp_path / "bomb.png", 30_000, 30_000)
        assert file.stat().st_size < 1_000_000
        for read in (image_size, decode_image):
            kind, message = problem_of(read, file)
            assert kind == "image too large"
            assert message == f"the image {file} has more than {MAX_PIXELS:,} pixels; reduce its size"

    def test_limit_is_independent_of_pillow_settings(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        file = write_png(tmp_path / "bomb.png", 15_000, 15_000)
        assert problem_of(image_size, file) == (
            "image too large",
            f"the image {file} has 225,000,000 pixels, more than {MAX_PIXELS:,}; reduce its size",
        )

    def test_no_pixels(self, tmp_path):
        file = tmp_path / "none.gif"
        file.write_bytes(b"GIF89a" + bytes(7) + b"," + bytes(8) + b"\0\x02\0;")
        assert problem_of(image_size, file)[0] == "image unreadable"

    @pytest.mark.parametrize("kind", ["folder", "pipe", "socket"])
    def test_not_a_regular_file(self, tmp_path, kind):
        path = tmp_path / "thing.jpg"
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            socket.socket(socket.AF_UNIX).bind(str(path))
        assert problem_of(open_image, path) == (
            "image unreadable", f"the image {path} cannot be read: it is not a regular file"
        )  # fmt: skip

    def test_no_external_programs(self, tmp_path, save):
        """Pillow runs Ghostscript on this format."""
        assert "its format is not one of" in problem_of(open_image, save("picture.eps", smooth(20, 20)))[1]

    @pytest.mark.parametrize("name", ["a\0b.jpg", "\ud800.jpg", "x" * 5000, "a/" * 3000 + "b.jpg", ".", "\n"])
    def test_invalid_names(self, tmp_path, name):
        records = write_set(tmp_path, [image_record(0, name)])
        with pytest.raises(DataError, match="the image ") as caught:
            records.check(0)
        assert caught.value.kind in ("image missing", "image unreadable")
        assert len(str(caught.value)) < 1200
        assert str(caught.value).isprintable()


class TestLocateImage:
    @pytest.fixture
    def records(self, tmp_path, save):
        save("in.png", smooth(40, 40))
        smooth(40, 40).save(tmp_path / "out.png")
        (tmp_path / "images/link.png").symlink_to(tmp_path / "out.png")
        (tmp_path / "images/sub").mkdir()

        def records(name):
            return write_set(tmp_path, [image_record(0, name)])

        return records

    @pytest.mark.parametrize(
        "name", ["in.png", "./in.png", "sub/../in.png", "./../images/in.png", "link.png"]
    )
    def test_under_the_root(self, records, name):
        """Symbolic links are followed, even out of the root."""
        assert records(name).load(0).tiles.shape[0]

    def test_absolute_path(self, records, tmp_path):
        assert records(str(tmp_path / "out.png")).load(0).tiles.shape[0]

    @pytest.mark.parametrize("name", ["../out.png", "sub/../../out.png", "..", "a/b/../../../x"])
    def test_path_outside_the_root(self, records, tmp_path, name):
        for name_of_method in ("check", "measure", "encode", "load"):
            with pytest.raises(DataError, match="is outside 'root'") as caught:
                getattr(records(name), name_of_method)(0)
            assert caught.value.kind == "image outside root"
            assert str(tmp_path / "images") in str(caught.value)


class TestDecodingCache:
    def test_shared_image_is_decoded_once(self, tmp_path, save, monkeypatch):
        save("shared.png", smooth(40, 40))
        decoded, decode = [], images_module.decode_image
        monkeypatch.setattr(
            images_module, "decode_image", lambda path: (decoded.append(path), decode(path))[1]
        )
        records = write_set(tmp_path, [image_record(i, "shared.png") for i in range(5)])
        for i in range(5):
            records.check(i, decode=True)
        assert len(decoded) == 1

    def test_changed_file_is_decoded_again(self, tmp_path, save):
        file = save("changes.jpg", noise(60, 40))
        check_decoding(file, image_info(file))
        file.write_bytes(file.read_bytes()[:-500])
        assert problem_of(check_decoding, file, image_info(file))[0] == "image unreadable"


class TestFileEnd:
    """A file is decoded if its end is unusual; the record is rejected only if decoding fails."""

    @pytest.fixture
    def decoded(self, monkeypatch):
        decoded, decode = [], images_module.decode_image
        monkeypatch.setattr(
            images_module, "decode_image", lambda path: (decoded.append(path), decode(path))[1]
        )
        return decoded

    @pytest.fixture
    def check(self, tmp_path):
        """Check a record with an image; return the kind of problem, or None."""

        def check(file) -> str | None:
            try:
                write_set(tmp_path, [image_record(0, file.name)]).check(0)
            except DataError as error:
                return error.kind
            return None

        return check

    FORMATS = ("jpg", "png", "gif", "webp", "jp2", "tiff", "bmp", "ppm")
    WITH_END_MARKER = ("jpg", "png", "gif", "jp2")

    @pytest.mark.parametrize("suffix", FORMATS)
    def test_complete_file_is_not_decoded(self, save, check, decoded, suffix):
        assert check(save(f"x.{suffix}", noise(60, 40))) is None
        assert decoded == []

    @pytest.mark.parametrize("options", [{"progressive": True}, {"quality": 20}, {"comment": b"\xff\xd9"}])
    def test_jpeg_variants(self, save, check, decoded, options):
        assert check(save("x.jpg", noise(60, 40), **options)) is None
        assert decoded == []

    @pytest.mark.parametrize("fraction", [0.2, 0.5, 0.67, 0.9, 0.99])
    @pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "jp2"])
    def test_truncated_file(self, save, check, decoded, suffix, fraction):
        file = save(f"x.{suffix}", noise(200, 100))
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * fraction)])
        try:
            with Image.open(file) as image:
                image.load()
        except Exception:
            expected = "image unreadable"
        else:
            expected = None
        assert check(file) == expected
        # The header itself may be truncated.
        assert decoded or expected

    def test_jpeg_truncated_after_its_thumbnail(self, save, check):
        """The thumbnail is a complete JPEG with its own end marker."""
        with io.BytesIO() as buffer:
            smooth(40, 30).save(buffer, "JPEG")
            thumbnail = buffer.getvalue()
        file = save("x.jpg", noise(60, 40))
        content = file.read_bytes()
        marker = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
        file.write_bytes((content[:2] + marker + content[2:])[: -len(content) // 3])
        assert check(file) == "image unreadable"

    @pytest.mark.parametrize("suffix", WITH_END_MARKER)
    def test_padding_is_ignored(self, save, check, decoded, suffix):
        file = save(f"x.{suffix}", noise(60, 40))
        file.write_bytes(file.read_bytes() + bytes(700) + b"\r\n")
        assert check(file) is None
        assert decoded == []

    @pytest.mark.parametrize("after", [b"<!-- served by a cache -->", bytes(10_000)], ids=["text", "zeros"])
    @pytest.mark.parametrize("suffix", WITH_END_MARKER)
    def test_other_trailing_data_is_decoded(self, save, check, decoded, suffix, after):
        file = save(f"x.{suffix}", noise(60, 40))
        file.write_bytes(file.read_bytes() + after)
        assert check(file) is None
        assert decoded == [file]

    def test_png_padded_with_zeros_is_unreadable(self, save, check):
        file = save("x.png", noise(200, 100))
        content = file.read_bytes()
        file.write_bytes(content[:8000] + bytes(len(content) - 8000))
        assert check(file) == "image unreadable"

    def test_end_is_read_once_for_all_records(self, tmp_path, save, monkeypatch):
        read_files, has_end = [], images_module._has_end
        monkeypatch.setattr(
            images_module, "_has_end", lambda path, *rest: (read_files.append(path), has_end(path, *rest))[1]
        )
        file = save("x.jpg", noise(60, 40))
        records = write_set(tmp_path, [image_record(i, "x.jpg", "x.jpg") for i in range(4)])
        for i in range(4):
            records.check(i)
        assert read_files == [file]

    def test_real_figures_have_an_end(self, shared):
        for file in sorted((shared / "pmc_mi/images").iterdir()):
            assert image_info(file).has_end

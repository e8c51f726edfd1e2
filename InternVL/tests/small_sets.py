"""Small datasets and images for tests; a tile has 16 x 16 pixels and 3 tokens."""

import json
import struct
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer_training import train_tokenizer
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.meta import DatasetSpec

TILE, TOKENS = 16, 3


@lru_cache(maxsize=1)
def tokenizer():
    return train_tokenizer(["what is this ? a cat on a mat"] * 20, 300)


def encoder(*, truncate_text: bool = False, **options) -> RecordEncoder:
    small = {"tile_size": TILE, "tokens_per_tile": TOKENS, "max_dynamic_patch": 4, "max_seq_length": 400}
    return RecordEncoder(tokenizer(), Preprocessing(**{**small, **options}), truncate_text=truncate_text)


def text_record(number: int, answer: str = "a cat", **extra) -> dict:
    messages = [{"from": "human", "value": f"what is {number} ?"}, {"from": "gpt", "value": answer}]
    return {"id": f"r{number}", "conversations": messages, **extra}


def image_record(number: int, *images: str, **extra) -> dict:
    record = text_record(number, image=list(images), **extra)
    record["conversations"][0]["value"] = "<image>\n" * len(images) + f"what is {number} ?"
    return record


def write_lines(file: Path, records: list) -> Path:
    """Write one line per record (objects as JSON, bytes unchanged) unless the file has this content."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in records]
    content = b"\n".join(lines) + b"\n"
    if not file.is_file() or file.read_bytes() != content:
        file.write_bytes(content)
    return file


def write_set(folder: Path, records: list, name: str = "qa", *, by: RecordEncoder | None = None, **entry):
    """Write a dataset whose images are in `folder/images`, and open it."""
    (folder / "images").mkdir(exist_ok=True)
    file = write_lines(folder / f"{name}.jsonl", records)
    return RecordSet(DatasetSpec(name, folder / "images", file, **entry), by or encoder())


def entry_of(folder: Path, name: str = "qa") -> dict:
    """Return the meta file entry of a dataset written by `write_set`."""
    paths = {"root": str(folder / "images"), "annotation": str(folder / f"{name}.jsonl")}
    return {**paths, "data_augment": False, "repeat_time": 1}


def write_meta(file: Path, sets: list[RecordSet], **entry) -> Path:
    """Write the meta file of datasets created by `write_set`."""
    meta = {
        s.spec.name: {
            "root": str(s.spec.root),
            "annotation": str(s.spec.annotation),
            "data_augment": False,
            "repeat_time": s.spec.repeat_time,
            **entry,
        }
        for s in sets
    }
    file.write_text(json.dumps(meta))
    return file


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a smooth image, which changes little when it is scaled or compressed."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def break_inside(file: Path) -> Path:
    """Damage the middle of a PNG file; its header, end and size stay valid."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 16] = bytes(16)
    file.write_bytes(content)
    return file


def write_png(
    file: Path, width: int, height: int, *, bits: int = 1, colours: int = 0, row: bytes = b""
) -> Path:
    """Write a PNG of identical rows without holding it in memory.

    Args:
        bits: bits per channel.
        colours: 0 for grayscale, 2 for RGB, 4 for grayscale with alpha, 6 for RGB with alpha.
        row: packed pixels of a row (default: black).
    """

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    packer = zlib.compressobj(1)
    filtered = b"\0" + (row or bytes(-(-width * bits // 8)))
    pixels = b"".join(packer.compress(filtered) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return file

"""Fuzzing of records, images and meta files, reproducible from a seed."""

import copy
import io
import json
import random
import signal
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from helpers import HANG_SECONDS
from PIL import Image
from small_sets import encoder, entry_of, image_record, smooth, text_record, write_set

from internvl_chat.data.audit.checks import audit
from internvl_chat.data.index.build import index_records
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.images import MAX_PIXELS
from internvl_chat.data.sources.meta import DatasetSpec, load_meta
from internvl_chat.data.sources.problems import ERRORS
from internvl_chat.utils.errors import DataError

# Byte sequences that often break parsers.
FRAGMENTS = (
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n", b'"', b"\\", b"\\u0000", b"\\ud800", b"{",
    b"}", b"[" * 2000, b"]" * 2000, b"9" * 5000, b"1e999", b"-", b"NaN", b"Infinity", b"null", b"true",
    b"<image>", b"<IMG_CONTEXT>", b"<|im_end|>", b"\xe2\x80\xa8", b" " * 3000, b"/../" * 50, b"\x1b[2J",
)  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 10**300, 1e308, float("nan"), float("inf"), "", " ", "\0", "\ud800", 0.5, 3,
    "<image>" * 3, "<image>" * 500, "<IMG_CONTEXT>", "x" * 3000, "a.png", "../a.png", "/dev/null", "/", ".",
    [], [[]], {}, {"a": {}}, ["a.png"], ["a.png", None], ["a.png"] * 300, "system", "gpt", "human", "robot",
    "$HOME", "~nobody/x", "中" * 500,
)  # fmt: skip


@contextmanager
def time_limit():
    """Fail the test if the block takes too long."""

    def fail(*_):
        pytest.fail(f"took more than {HANG_SECONDS} seconds")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Damage bytes at one to four positions."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(len(out) + 1)
        length = min(rng.choice((1, 1, 4, 40)), len(out) - position)
        kind = rng.randrange(6)
        if kind == 0 and length:
            out[position : position + length] = rng.randbytes(length)
        elif kind == 1:
            del out[position : position + length]
        elif kind == 2:
            out[position:position] = rng.choice(FRAGMENTS)
        elif kind == 3:
            out[position:position] = out[position : position + rng.randint(1, 200)]
        elif kind == 4 and rng.random() < 0.3:
            del out[position:]
        elif length:
            out[position] ^= 1 << rng.randrange(8)
    return bytes(out)


def mutate_value(rng: random.Random, value):
    """Replace, remove or duplicate parts of a JSON value."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        holder = value
        while isinstance(holder, dict | list) and holder:
            key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            inner = holder[key]
            if isinstance(inner, dict | list) and inner and rng.random() < 0.75:
                holder = inner
                continue
            choice = rng.randrange(4)
            if choice < 2:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
            elif choice == 2:
                del holder[key]
            elif isinstance(holder, list):
                holder.insert(key, copy.deepcopy(rng.choice([inner, *VALUES])))
            else:
                holder[rng.choice(["image", "images", "id", "messages", "conversations", "root"])] = (
                    copy.deepcopy(inner)
                )
            break
    return value


def valid_record(rng: random.Random) -> dict:
    """Return a valid record."""
    number = rng.randrange(100)
    messages = text_record(number)["conversations"]
    shown = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}
    return rng.choice(
        [
            text_record(number),
            image_record(number, "a.png"),
            image_record(number, "a.png", "b.jpg"),
            {"id": number, "image": "b.jpg", "conversations": messages},
            {"messages": [shown, {"role": "assistant", "content": "a"}], "images": ["a.png"]},
            {"conversations": [{"from": "system", "value": "s"}, *messages]},
        ]
    )


def check_records(folder, lines: list[bytes]) -> dict[str, int]:
    """Index the lines of a file; return the number of records per outcome."""
    file = folder / "fuzz.jsonl"
    file.write_bytes(b"\n".join(line.replace(b"\n", b" ") for line in lines) + b"\n")
    try:
        records = RecordSet(DatasetSpec("fuzz", folder / "images", file), encoder())
    except DataError:
        return {"file": len(lines)}
    with time_limit():
        [index] = index_records([records], decode=True, cache=folder / "cache", workers=1)
    outcomes: dict[str, int] = {}
    bad = {problem.index: problem for problem in index.problems if problem.is_error}
    for i in range(len(records)):
        kind = bad[i].kind if i in bad else "good"
        outcomes[kind] = outcomes.get(kind, 0) + 1
        if kind == "good":
            sample = records.load(i)
            assert sample.encoded.lengths == index.lengths[i]
            assert len(sample.tiles) == index.lengths[i].tiles
            assert sample.encoded.num_supervised > 0
        else:
            assert kind in ERRORS
            assert str(bad[i]).startswith(f"{file}, line {records.file.line(i)}")
            assert str(bad[i]).isprintable()
            assert len(str(bad[i])) < 1500
            if i % 7 == 0:
                with pytest.raises(DataError) as caught:
                    records.load(i)
                assert caught.value.kind == kind
    return outcomes


def fuzz_records(folder, seed: int, count: int) -> dict[str, int]:
    rng, lines = random.Random(seed), []
    for _ in range(count):
        record = valid_record(rng)
        kind = rng.randrange(5)
        if kind < 3:
            record = mutate_value(rng, record)
        line = json.dumps(record, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        lines.append(mutate_bytes(rng, line) if kind in (2, 3) else line)
    return check_records(folder, lines)


def sample_images() -> list[tuple[str, bytes]]:
    """Return small images of all supported formats."""
    images = []
    plain = smooth(40, 30)
    for name, image, options in (
        ("JPEG", plain, {}),
        ("JPEG", plain, {"progressive": True}),
        ("JPEG", plain.convert("CMYK"), {}),
        ("PNG", plain, {}),
        ("PNG", plain.quantize(8), {}),
        ("PNG", plain.convert("RGBA"), {}),
        ("GIF", plain, {}),
        ("TIFF", plain, {}),
        ("TIFF", plain, {"compression": "tiff_lzw"}),
        ("WEBP", plain, {}),
        ("BMP", plain, {}),
        ("PPM", plain, {}),
        ("JPEG2000", plain, {}),
    ):
        with io.BytesIO() as buffer:
            image.save(buffer, name, **options)
            images.append((name.lower(), buffer.getvalue()))
    return images


def fuzz_images(folder, seed: int, count: int) -> dict[str, int]:
    """Damage images, mostly in their headers; images that still decode must match Pillow's result."""
    rng, originals = random.Random(seed), sample_images()
    outcomes: dict[str, int] = {}
    for number in range(count):
        name, content = rng.choice(originals)
        head = rng.choice((40, 200, len(content)))
        damaged = mutate_bytes(rng, content[:head]) + content[head:]
        file = folder / "images" / f"{number}.{name}"
        file.write_bytes(damaged)
        records = write_set(folder, [image_record(0, file.name)], max_dynamic_patch=1)
        with time_limit():
            try:
                checked = records.check(0, decode=True)
            except DataError as error:
                assert error.kind in ERRORS
                assert str(error).isprintable()
                outcomes[error.kind] = outcomes.get(error.kind, 0) + 1
                with pytest.raises(DataError):
                    records.load(0)
            else:
                outcomes["good"] = outcomes.get("good", 0) + 1
                sample = records.load(0)
                assert sample.encoded.lengths == checked.lengths
                with Image.open(file) as image:
                    assert image.width * image.height <= MAX_PIXELS
                    expected = np.asarray(image.convert("RGB").resize((16, 16)))
                assert np.array_equal(sample.tiles[0].numpy(), expected)
        file.unlink()
    return outcomes


def fuzz_metas(folder, seed: int, count: int) -> dict[str, int]:
    rng = random.Random(seed)
    write_set(folder, [text_record(0), image_record(1, "a.png"), text_record(2)])
    entry = {**entry_of(folder), "max_dynamic_patch": 4, "length": 3}
    outcomes: dict[str, int] = {"good": 0, "error": 0}
    for _ in range(count):
        meta = {"a": dict(entry), "b": {**entry, "repeat_time": rng.choice([0.5, 2])}}
        kind = rng.randrange(5)
        if kind < 3:
            meta = mutate_value(rng, meta)
        content = json.dumps(meta).encode()
        path = folder / "meta.json"
        path.write_bytes(mutate_bytes(rng, content) if kind in (2, 3) else content)
        with time_limit():
            try:
                specs = load_meta(path, folder)
                found = audit(specs, encoder(), cache=folder / "cache", workers=1)
            except DataError as error:
                assert error.file is not None
                outcomes["error"] += 1
            else:
                outcomes["good"] += 1
                assert len(found.sets) == len(specs) > 0
                assert all(problem.kind in ERRORS or not problem.is_error for problem in found.problems)
    return outcomes

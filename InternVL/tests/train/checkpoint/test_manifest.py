"""The manifest detects damage to a checkpoint folder."""

import hashlib
import json
import random

import pytest

from internvl_chat.train.checkpoint.manifest import MANIFEST, find_damage, hash_files, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(random.Random(0).randbytes(100_000))
    (tmp_path / "state.json").write_text('{"step": 3}')
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "below").mkdir()
    (tmp_path / "below/rng.pth").write_bytes(b"random")
    write_manifest(tmp_path)
    return tmp_path


def test_manifest_contains_sizes_and_hashes(folder):
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert list(files) == ["below/rng.pth", "empty", "model.safetensors", "state.json"]
    assert files["state.json"] == {"bytes": 11, "sha256": hashlib.sha256(b'{"step": 3}').hexdigest()}
    assert find_damage(folder) is None


def test_flipped_bits_and_truncation_are_detected(folder):
    rng = random.Random(1)
    for name in ("model.safetensors", "state.json", "below/rng.pth"):
        file = folder / name
        content = file.read_bytes()
        for _ in range(40):
            position = rng.randrange(len(content))
            flipped = bytearray(content)
            flipped[position] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
            assert find_damage(folder) == f"the content of {name} has changed since it was written"
            file.write_bytes(content[:position])
            assert find_damage(folder) == f"{name} has {position:,} bytes instead of {len(content):,}"
        file.write_bytes(content)
    assert find_damage(folder) is None


def test_missing_files(folder):
    (folder / "empty").unlink()
    assert find_damage(folder) == "empty is missing"


def test_files_not_in_the_manifest_are_ignored(folder):
    (folder / "notes.txt").write_text("mine")
    assert find_damage(folder) is None


UNREADABLE = [
    "",
    "{",
    "[]",
    "null",
    '{"version": 1}',
    '{"version": 9, "files": {}}',
    '{"version": 1, "files": {"a": 1}}',
    "[" * 100_000,
    "\x00\x01",
]


@pytest.mark.parametrize("content", UNREADABLE, ids=range(len(UNREADABLE)))
def test_unreadable_manifest(folder, content):
    (folder / MANIFEST).write_text(content)
    assert find_damage(folder).startswith(f"its {MANIFEST} cannot be read")


def test_missing_manifest(folder):
    (folder / MANIFEST).unlink()
    assert find_damage(folder) == f"it has no {MANIFEST}, so it was never finished"


def test_flipped_bits_in_the_manifest(folder):
    """Every flipped bit is detected or does not change the parsed content."""
    content = (folder / MANIFEST).read_bytes()
    rng = random.Random(2)
    for _ in range(300):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (folder / MANIFEST).write_bytes(flipped)
        try:
            same = json.loads(flipped) == json.loads(content)
        except ValueError:
            same = False
        assert same or find_damage(folder) or json.loads(flipped)["files"] == json.loads(content)["files"]


def test_hashes_are_in_the_order_of_the_files(folder):
    files = [folder / "state.json", folder / "empty", folder / "state.json"]
    hashes = list(hash_files(files))
    assert hashes[0] == hashes[2] != hashes[1] == hashlib.sha256(b"").hexdigest()

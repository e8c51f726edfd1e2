"""A folder is as its manifest says, or it is said what is not."""

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


def test_holds_sizes_and_hashes(folder):
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert list(files) == ["below/rng.pth", "empty", "model.safetensors", "state.json"]
    assert files["state.json"] == {"bytes": 11, "sha256": hashlib.sha256(b'{"step": 3}').hexdigest()}
    assert find_damage(folder) is None


def test_every_flipped_bit_and_every_cut_is_found(folder):
    rng = random.Random(1)
    for name in ("model.safetensors", "state.json", "below/rng.pth"):
        file = folder / name
        whole = file.read_bytes()
        for _ in range(40):
            place = rng.randrange(len(whole))
            flipped = bytearray(whole)
            flipped[place] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
            assert find_damage(folder) == f"the content of {name} has changed since it was written"
            file.write_bytes(whole[:place])
            assert find_damage(folder) == f"{name} has {place:,} bytes instead of {len(whole):,}"
        file.write_bytes(whole)
    assert find_damage(folder) is None


def test_missing_files(folder):
    (folder / "empty").unlink()
    assert find_damage(folder) == "empty is missing"


def test_files_of_others_are_nobodys_concern(folder):
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
def test_a_manifest_that_cannot_be_read(folder, content):
    (folder / MANIFEST).write_text(content)
    assert find_damage(folder).startswith(f"its {MANIFEST} cannot be read")


def test_without_a_manifest_it_was_never_finished(folder):
    (folder / MANIFEST).unlink()
    assert find_damage(folder) == f"it has no {MANIFEST}, so it was never finished"


def test_every_bit_of_the_manifest_matters(folder):
    """Whatever is flipped in it, the folder is damaged, or what is read is the same."""
    whole = (folder / MANIFEST).read_bytes()
    rng = random.Random(2)
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (folder / MANIFEST).write_bytes(flipped)
        try:
            same = json.loads(flipped) == json.loads(whole)
        except ValueError:
            same = False
        assert same or find_damage(folder) or json.loads(flipped)["files"] == json.loads(whole)["files"]


def test_hashes_come_in_the_order_of_the_files(folder):
    files = [folder / "state.json", folder / "empty", folder / "state.json"]
    hashes = list(hash_files(files))
    assert hashes[0] == hashes[2] != hashes[1] == hashlib.sha256(b"").hexdigest()

"""The cache of downloaded images: bounded, shared by processes, and never with a truncated file."""

import contextlib
import multiprocessing
import os
import random
from pathlib import Path

import pytest

from internvl_chat.data.storage.cache import ImageCache, image_cache
from internvl_chat.utils.errors import UsageError


@pytest.fixture
def cache(tmp_path):
    return ImageCache(tmp_path / "images", 1000)


def size_of(cache: ImageCache) -> int:
    sizes = []
    for file in cache.folder.glob("??/*"):
        with contextlib.suppress(FileNotFoundError):  # deleted by another process
            sizes.append(file.stat().st_size)
    return sum(sizes)


def age(cache: ImageCache, key: str, seconds: int) -> None:
    os.utime(cache._file(key), (1e9 - seconds, 1e9 - seconds))


def test_round_trip(cache):
    assert cache.get("a", 3) is None
    cache.put("a", b"abc")
    assert cache.get("a", 3) == b"abc"


def test_least_recently_used_is_deleted(cache):
    for position, key in enumerate("abcd"):
        cache.put(key, bytes(240))
        age(cache, key, 100 - position)
    assert cache.get("a", 240)  # now the most recent one
    cache.put("e", bytes(240))
    assert [key for key in "abcde" if cache.get(key, 240)] == ["a", "d", "e"]
    assert size_of(cache) <= 1000


def test_truncated_file_is_ignored(cache):
    cache.put("a", b"abc")
    cache._file("a").write_bytes(b"ab")
    assert cache.get("a", 3) is None
    cache.put("a", b"abc")
    assert cache.get("a", 3) == b"abc"


def test_content_over_the_limit_is_not_stored(cache):
    cache.put("a", bytes(950))
    assert cache.get("a", 950) is None


def test_files_of_killed_processes_are_deleted(cache):
    cache.put("a", bytes(500))
    left = cache._file("a").with_name(".x.partial")
    left.write_bytes(bytes(400))
    os.utime(left, (1e9, 1e9))
    cache._total.unlink()  # also lost
    cache.put("b", bytes(300))
    assert not left.exists()
    assert cache.get("a", 500) and cache.get("b", 300)


def test_unwritable_folder(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_bytes(b"")
    cache = ImageCache(tmp_path / "file/images", 1000)
    for key in "ab":
        cache.put(key, b"abc")
        assert cache.get(key, 3) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Set M3LLM_CACHE" in caplog.text


def _use(folder: Path, seed: int) -> int:
    """Read and write random keys; return the number of hits."""
    rng, cache, hits = random.Random(seed), ImageCache(folder, 20_000), 0
    for step in range(200):
        key = rng.randrange(60)
        expected = bytes([key]) * (200 + 10 * key)
        content = cache.get(str(key), len(expected))
        if content is None:
            cache.put(str(key), expected)
        else:
            assert content == expected
            hits += 1
        assert step % 20 or size_of(cache) <= 22_000  # other processes may be about to delete files
    return hits


def test_many_processes(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        hits = pool.starmap(_use, [(tmp_path / "images", seed) for seed in range(4)])
    assert all(hits)
    assert 0 < size_of(ImageCache(tmp_path / "images", 0)) <= 20_000


def test_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("M3LLM_CACHE", str(tmp_path))
    assert (image_cache().folder, image_cache().limit) == (tmp_path / "images", 20_000_000_000)
    monkeypatch.setenv("M3LLM_CACHE_GB", "0.5")
    assert image_cache().limit == 500_000_000
    monkeypatch.setenv("M3LLM_CACHE_GB", "0")
    image_cache().put("a", b"abc")
    assert image_cache().get("a", 3) is None
    monkeypatch.setenv("M3LLM_CACHE_GB", "much")
    with pytest.raises(UsageError, match="M3LLM_CACHE_GB is 'much'; it must be a number of gigabytes"):
        image_cache()

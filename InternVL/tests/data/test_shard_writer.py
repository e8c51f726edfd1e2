"""`m3llm data shard`: same bytes, readable by other programs, and safe against interruptions."""

import json
import shutil
import tarfile

import pytest
from small_sets import image_record, noise, text_record, write_lines

from internvl_chat.cli import main as m3llm
from internvl_chat.data import shard_writer
from internvl_chat.data.sources.meta import load_meta
from internvl_chat.utils.files import sha256

NAMES = ["b/2.jpg", "a/1.png", "caf\u00e9 \u4e2d.png", "c/3.jpg", "c/4.jpg"]


@pytest.fixture
def data(tmp_path):
    """A meta file with two datasets that share a root, and one with another root."""
    for seed, name in enumerate(NAMES):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        noise(60, 40, seed=seed).save(file)
    (tmp_path / "other/b").mkdir(parents=True)
    noise(30, 30, seed=9).save(tmp_path / "other/b/2.jpg")
    write_lines(tmp_path / "one.jsonl", [image_record(0, *NAMES[:2]), image_record(1, f"./c//../{NAMES[1]}")])
    write_lines(tmp_path / "two.jsonl", [image_record(0, *NAMES[1:]), text_record(1)])
    write_lines(tmp_path / "three.jsonl", [image_record(0, NAMES[0])])
    meta = {
        "one": {"root": "images", "annotation": "one.jsonl", "repeat_time": 2, "data_augment": True},
        "two": {"root": "images", "annotation": "two.jsonl", "max_dynamic_patch": 3, "length": "2"},
        "three": {"root": "other", "annotation": "three.jsonl", "repeat_time": 0.5},
    }
    (tmp_path / "PMC-data.json").write_text(json.dumps(meta))
    return tmp_path


def shard(data, *options) -> int:
    argv = ["data", "shard", data / "PMC-data.json", data / "out", "--data_root", data, *options]
    return m3llm([str(argument) for argument in argv])


@pytest.fixture
def small_shards(monkeypatch):
    """Two images per shard."""
    plan = shard_writer._plan
    monkeypatch.setattr(shard_writer, "_plan", lambda sources, _: plan(sources, 15_000))


def members(folder) -> list[dict[str, bytes]]:
    """Return the members of each shard, read with Python's library."""
    shards = []
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as tar:
            shards.append({member.name: tar.extractfile(member).read() for member in tar})
    return shards


def test_content(data, small_shards, capsys):
    assert shard(data, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    folder = data / "out/image-shards"
    shards = members(folder)
    assert [name for members in shards for name in members] == NAMES  # once each, in the order of the records
    assert len(shards) > 1
    for part in shards:
        assert part == {name: (data / "images" / name).read_bytes() for name in part}
    [other] = members(data / "out/image-shards-2")
    assert other == {"b/2.jpg": (data / "other/b/2.jpg").read_bytes()}
    size = sum(file.stat().st_size for file in (data / "out").rglob("*.tar"))
    meta = str(data / "out/PMC-data.json")
    assert result == {"meta": meta, "shards": len(shards) + 1, "images": 6, "bytes": size}
    header, *rows = map(json.loads, (folder / "manifest.jsonl").read_text().splitlines())
    files = [(folder / f"shard-{number:06d}.tar").read_bytes() for number in range(len(shards))]
    assert [entry["sha256"] for entry in header["shards"]] == list(map(sha256, files))
    for name, number, offset, length, digest in rows:
        content = files[number][offset : offset + length]
        assert (content, digest) == (shards[number][name], sha256(content))


def test_meta_file(data):
    assert shard(data) == 0
    moved = data / "moved"
    shutil.move(data / "out", moved)
    before, after = load_meta(data / "PMC-data.json", data), load_meta(moved / "PMC-data.json", data)
    for old, new in zip(before, after, strict=True):
        assert new.annotation.parent == moved / "shard-annotations"
        assert new.annotation.read_bytes() == old.annotation.read_bytes()
        assert {**vars(new), "root": 0, "annotation": 0} == {**vars(old), "root": 0, "annotation": 0}
    assert [spec.root.name for spec in after] == ["image-shards", "image-shards", "image-shards-2"]


def test_webdataset_reads_the_shards(data, small_shards):
    webdataset = pytest.importorskip("webdataset", reason="needs webdataset: pip install webdataset")
    assert shard(data) == 0
    urls = [str(file) for file in sorted((data / "out/image-shards").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [name.rpartition(".")[0] for name in NAMES]
    assert samples[0]["jpg"] == (data / "images" / NAMES[0]).read_bytes()


class TestInterruption:
    def test_same_shards(self, data, small_shards, monkeypatch, capfd):
        assert shard(data) == 0
        expected = members(data / "out/image-shards")
        manifest = (data / "out/image-shards/manifest.jsonl").read_text()
        shutil.rmtree(data / "out")
        read, count = shard_writer._read, []

        def interrupt(source):
            count.append(source.name)
            if len(count) == 4:
                raise KeyboardInterrupt
            return read(source)

        monkeypatch.setattr(shard_writer, "_read", interrupt)
        assert shard(data) == 130
        assert "run the same command again to continue" in capfd.readouterr().err
        files = {file.name for file in (data / "out/image-shards").iterdir()}
        assert files == {".progress.jsonl", "shard-000000.tar"}
        count.clear()
        monkeypatch.setattr(shard_writer, "_read", lambda source: count.append(source.name) or read(source))
        assert shard(data) == 0
        assert count == [*NAMES[2:], NAMES[0]]
        assert members(data / "out/image-shards") == expected
        assert (data / "out/image-shards/manifest.jsonl").read_text() == manifest
        assert not (data / "out/image-shards/.progress.jsonl").exists()

    def test_finished_folders_are_kept(self, data, monkeypatch):
        """An interruption in the second folder does not repeat the first."""
        read, count = shard_writer._read, []

        def interrupt(source):
            if source.num_bytes == (data / "other/b/2.jpg").stat().st_size:
                raise KeyboardInterrupt
            return read(source)

        monkeypatch.setattr(shard_writer, "_read", interrupt)
        assert shard(data) == 130
        monkeypatch.setattr(shard_writer, "_read", lambda source: count.append(source.name) or read(source))
        assert shard(data) == 0
        assert count == [NAMES[0]]
        assert not list((data / "out").rglob(".progress.jsonl"))

    def test_leftovers_are_deleted(self, data, small_shards, monkeypatch):
        """A process was killed; the next one uses a different --shard_mb."""
        monkeypatch.setattr(shard_writer, "write_json_lines", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shard(data)
        folder = data / "out/image-shards"
        (folder / ".shard-000009.tar.0123.partial").touch()
        assert len(list(folder.glob("*.tar"))) > 1
        monkeypatch.undo()
        assert shard(data) == 0
        assert {file.name for file in folder.iterdir()} == {"manifest.jsonl", "shard-000000.tar"}

    def test_changed_images_are_written_again(self, data, small_shards, monkeypatch):
        monkeypatch.setattr(shard_writer, "write_json_lines", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shard(data)
        monkeypatch.undo()
        plan = shard_writer._plan
        monkeypatch.setattr(shard_writer, "_plan", lambda sources, _: plan(sources, 15_000))
        noise(60, 40, seed=77).save(data / "images" / NAMES[0])
        assert shard(data) == 0
        [first, *_] = members(data / "out/image-shards")
        assert first[NAMES[0]] == (data / "images" / NAMES[0]).read_bytes()


class TestErrors:
    def test_unusable_records(self, data, capfd):
        (data / "images" / NAMES[0]).unlink()
        write_lines(data / "three.jsonl", [image_record(0, str(data / "images" / NAMES[1])), b"{"])
        assert shard(data) == 1
        message = capfd.readouterr().err
        for text in (
            "3 records cannot be used",
            "b/2.jpg does not exist",
            "has an absolute path",
            "three.jsonl, line 2",
        ):
            assert text in message
        assert not (data / "out").exists()
        assert shard(data, "--on_bad_record", "skip") == 0
        [shards] = members(data / "out/image-shards")
        assert list(shards) == NAMES[1:]

    def test_existing_folder(self, data, capfd):
        assert shard(data) == 0
        assert shard(data) == 2
        assert "out/PMC-data.json already exists; choose a different folder" in capfd.readouterr().err

    def test_no_space(self, data, capfd, monkeypatch):
        usage = shutil.disk_usage(data)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        assert shard(data) == 2
        assert "needs 0.0 GB, but only 0.0 GB are free" in capfd.readouterr().err

    def test_image_that_changes(self, data, capfd, monkeypatch):
        write = shard_writer._write_shard

        def change(*arguments):
            (data / "images" / NAMES[3]).write_bytes(b"other")
            return write(*arguments)

        monkeypatch.setattr(shard_writer, "_write_shard", change)
        assert shard(data) == 1
        assert f"{NAMES[3]}: the image has changed since it was listed" in capfd.readouterr().err
        assert not list((data / "out/image-shards").glob("*.tar"))

    def test_content_read_back_differs(self, data, capfd, monkeypatch):
        read = shard_writer._read_back
        monkeypatch.setattr(shard_writer, "_read_back", lambda *arguments: read(*arguments)[1:])
        assert shard(data) == 1
        assert "the content read back differs; check the disk" in capfd.readouterr().err

    def test_without_images(self, data, capfd):
        write_lines(data / "text.jsonl", [text_record(0)])
        argv = ["data", "shard", data / "text.jsonl", data / "out", "--image_root", data]
        assert m3llm([str(argument) for argument in argv]) == 1
        assert "the records have no images to write" in capfd.readouterr().err

"""Positions of images in tar shards: in a manifest, or in tar files that other programs wrote."""

import io
import json
import subprocess
import tarfile

import pytest

from internvl_chat.data.storage.manifest import MANIFEST, has_shards, index_shards
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.files import sha256

IMAGES = {"a.jpg": b"first", "PMC1/fig 2.jpg": b"second image", "é" * 80 + ".png": bytes(1000)}


def write_tar(file, images, **options):
    """Write a tar file with Python's library; names may occur twice."""
    with tarfile.open(file, "w", **options) as tar:
        for name, content in images:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def read(folder, index, name):
    member = index.get(name)
    with open(folder / member.shard, "rb") as stream:
        stream.seek(member.offset)
        return stream.read(member.num_bytes)


class TestTarFiles:
    @pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    def test_without_manifest(self, tmp_path, layout):
        write_tar(tmp_path / "figures-000000.tar", [("./a.jpg", b"first")], format=layout)
        write_tar(tmp_path / "figures-000001.tar", list(IMAGES.items())[1:], format=layout)
        assert has_shards(tmp_path)
        index = index_shards(tmp_path)
        assert {name: read(tmp_path, index, name) for name in IMAGES} == IMAGES
        assert index.get("b.jpg") is None
        assert index.get("a.jpg").sha256 is None

    def test_written_by_tar(self, tmp_path):
        (tmp_path / "images/sub").mkdir(parents=True)
        for name in ("a.jpg", "sub/b.jpg"):
            (tmp_path / "images" / name).write_bytes(name.encode())
        command = ["tar", "-cf", "x-0.tar", "-C", "images", "."]
        subprocess.run(command, cwd=tmp_path, check=True)
        index = index_shards(tmp_path)
        assert read(tmp_path, index, "sub/b.jpg") == b"sub/b.jpg"
        assert index.get("sub") is None

    def test_links_and_other_names_are_not_images(self, tmp_path):
        with tarfile.open(write_tar(tmp_path / "x-0.tar", [("../out.jpg", b"1")]), "a") as tar:
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        index = index_shards(tmp_path)
        assert index.get("link.jpg") is None
        assert index.get("out.jpg") is None

    def test_repeated_name(self, tmp_path):
        write_tar(tmp_path / "x-0.tar", [("a.jpg", b"1")])
        write_tar(tmp_path / "x-1.tar", [("./a.jpg", b"2")])
        with pytest.raises(DataError, match=r"the tar files cannot be used: 'a.jpg' occurs twice"):
            index_shards(tmp_path)

    @pytest.mark.parametrize("end", [100, 600, 1000, 1536, 1600])
    def test_truncated(self, tmp_path, end):
        file = write_tar(tmp_path / "x-0.tar", [("a.jpg", bytes(700)), ("b.jpg", b"1")])
        file.write_bytes(file.read_bytes()[:end])
        with pytest.raises(DataError, match="this tar file"):
            index_shards(tmp_path)

    def test_damaged_header(self, tmp_path):
        file = write_tar(tmp_path / "x-0.tar", [(name, bytes(700)) for name in ("a.jpg", "b.jpg", "c.jpg")])
        file.write_bytes(file.read_bytes().replace(b"b.jpg", b"B.jpg"))
        with pytest.raises(
            DataError, match="cannot be read: damaged or truncated at byte 1,536; copy it again"
        ):
            index_shards(tmp_path)

    def test_compressed(self, tmp_path):
        with tarfile.open(tmp_path / "x-0.tar", "w:gz"):
            pass
        with pytest.raises(DataError, match="this tar file cannot be read"):
            index_shards(tmp_path)

    def test_folder_of_images(self, tmp_path):
        (tmp_path / "a.jpg").write_bytes(b"1")
        write_tar(tmp_path / "images.tar", [("a.jpg", b"1")])
        assert not has_shards(tmp_path)
        assert not has_shards(tmp_path / "nowhere")


def write_manifest(folder, rows, **header):
    file = write_tar(folder / "shard-000000.tar", [("a.jpg", b"first"), ("b.jpg", b"second")])
    shard = {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file.read_bytes())}
    first = {"format": "m3llm image shards", "version": 1, "images": 2, "shards": [shard], **header}
    lines = [json.dumps(line) + "\n" for line in [first, *rows]]
    (folder / MANIFEST).write_text("".join(lines))


ROWS = [["a.jpg", 0, 512, 5, sha256(b"first")], ["b.jpg", 0, 1536, 6, sha256(b"second")]]


class TestManifest:
    def test_positions_and_hashes(self, tmp_path):
        write_manifest(tmp_path, ROWS)
        index = index_shards(tmp_path)
        assert read(tmp_path, index, "b.jpg") == b"second"
        assert index.get("b.jpg").sha256 == sha256(b"second")
        assert index.get("a.jpg").version != index.get("b.jpg").version >= 0

    @pytest.mark.parametrize(
        ("rows", "header", "message"),
        [
            (ROWS[:1], {}, "it lists 1 of 2 images"),
            ([ROWS[0], ROWS[0]], {}, "'a.jpg' occurs twice"),
            ([ROWS[0], ["b.jpg", 0, 1536, 10**9, sha256(b"second")]], {}, "'b.jpg' is outside its shard"),
            ([ROWS[0], ["b.jpg", 0, -1, 6, sha256(b"second")]], {}, "'b.jpg' is outside its shard"),
            ([ROWS[0], ["b.jpg", 1, 1536, 6, sha256(b"second")]], {}, "index out of range"),
            ([ROWS[0], ["b.jpg", -1, 1536, 6, sha256(b"second")]], {}, "'b.jpg' is outside its shard"),
            ([ROWS[0], ["b.jpg", 0, 1536, 6, "00"]], {}, "damaged"),
            ([ROWS[0], ["b.jpg", 0, 1536, 6]], {}, "damaged"),
            ([ROWS[0], [7, 0, 1536, 6, sha256(b"second")]], {}, "the row of 7 is malformed"),
            ([ROWS[0], {"name": "b.jpg"}], {}, "damaged"),
            (ROWS, {"version": 2}, "expected format 'm3llm image shards', version 1"),
            (ROWS, {"shards": [{"file": "../x.tar", "bytes": 9999, "sha256": ""}]}, "not a plain file name"),
            (ROWS, {"shards": 3}, "damaged"),
        ],
    )
    def test_damaged(self, tmp_path, rows, header, message):
        write_manifest(tmp_path, rows, **header)
        with pytest.raises(DataError, match=message) as caught:
            index_shards(tmp_path)
        assert str(tmp_path / MANIFEST) in str(caught.value)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]\n", b"{}\n", b"\xff\n", b"null\n"])
    def test_other_content(self, tmp_path, content):
        (tmp_path / MANIFEST).write_bytes(content)
        with pytest.raises(DataError, match="this manifest of shards is damaged") as caught:
            index_shards(tmp_path)
        assert "attribute" not in str(caught.value)

    def test_missing_and_shortened_shards(self, tmp_path):
        write_manifest(tmp_path, ROWS)
        shard = tmp_path / "shard-000000.tar"
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(DataError, match=r"shard-000000.tar: size differs from manifest.jsonl"):
            index_shards(tmp_path)
        shard.unlink()
        with pytest.raises(DataError, match=r"shard-000000.tar: missing, but listed in manifest.jsonl"):
            index_shards(tmp_path)

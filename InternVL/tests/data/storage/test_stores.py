"""Images in shards and object storage, as records use them."""

import dataclasses
import multiprocessing
import pickle
import shutil
from functools import partial

import numpy as np
import pytest
from data.storage.test_manifest import IMAGES, write_tar
from small_sets import encoder, image_record, noise, write_lines

from internvl_chat.data.audit.benchmark_files import read_benchmark
from internvl_chat.data.audit.contamination import find_leaks
from internvl_chat.data.batching.collator import PackDataset
from internvl_chat.data.browse.pictures import thumbnail
from internvl_chat.data.browse.record_view import view_record
from internvl_chat.data.dataset import SampleIndex, TrainingData, build_sets
from internvl_chat.data.index import build
from internvl_chat.data.index.build import index_records
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.shard_writer import write_shards
from internvl_chat.data.sources.images import decode_image, image_info, locate_image
from internvl_chat.data.sources.meta import DatasetSpec, load_meta
from internvl_chat.data.sources.problems import RecordError
from internvl_chat.data.storage import stores
from internvl_chat.data.storage.stores import ObjectStore, ShardStore, fetch_file, open_root, parse_root
from internvl_chat.utils.errors import DataError, StorageError, UsageError

NAMES = [f"PMC{number}/fig.{kind}" for number, kind in enumerate(("png", "jpg", "webp", "jpg"))]
RECORDS = [
    image_record(0, *NAMES[:2]),
    image_record(1, NAMES[2]),
    image_record(2, *NAMES[2:]),
    image_record(3),
]


@pytest.fixture
def figures(tmp_path):
    """A dataset in a folder."""
    for seed, name in enumerate(NAMES):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True)
        noise(40 + 9 * seed, 30, seed=seed).save(file)
    return DatasetSpec("qa", tmp_path / "images", write_lines(tmp_path / "qa.jsonl", RECORDS))


@pytest.fixture
def sharded(figures, tmp_path):
    """The dataset in two shards."""
    options = {"meta_name": "meta.json", "shard_bytes": 6000, "skip_unusable": False, "progress": iter}
    result = write_shards([RecordSet(figures, encoder())], tmp_path / "sharded", **options)
    assert (result.images, result.shards) == (4, 2)
    return load_meta(result.meta, tmp_path)[0]


def content_of(spec):
    """Return all that training and the data check read from a dataset."""
    records = RecordSet(spec, encoder())
    samples = [records.load(index) for index in range(len(records))]
    checked = [records.check(index, decode=True) for index in range(len(records))]
    tiles = [sample.tiles.numpy().tobytes() for sample in samples]
    return tiles, [(row.lengths, [(f.name, f.num_bytes) for f in row.images]) for row in checked]


class TestLocate:
    def test_names(self, tmp_path):
        store = ShardStore("/data", None, is_remote=False)
        assert locate_image(store, "./PMC1//a/../fig.jpg") == store.image("PMC1/fig.jpg")
        assert str(locate_image(store, "PMC1/fig.jpg")) == "/data/PMC1/fig.jpg"
        assert locate_image(store, "/other/fig.jpg").is_absolute()

    @pytest.mark.parametrize("name", ["../a.jpg", "a/../../b.jpg", ".."])
    def test_outside(self, name):
        with pytest.raises(RecordError, match=r"is outside 'root' \(s3://b/images\)") as caught:
            locate_image(ObjectStore("s3://b/images"), name)
        assert caught.value.kind == "image outside root"

    def test_signed_url_is_not_shown(self, tmp_path):
        with pytest.raises(RecordError, match=r"https://h/a.jpg\?\*\*\* is a URL"):
            locate_image(tmp_path, "https://h/a.jpg?X-Amz-Signature=abc")

    def test_roots(self, tmp_path):
        assert open_root(tmp_path) == tmp_path
        assert parse_root(str(tmp_path)) == tmp_path
        assert parse_root("s3://b/images/") == "s3://b/images"
        with pytest.raises(DataError, match="the scheme is not one of"):
            open_root("ftp://b/images")


class TestShards:
    def test_same_as_folder(self, figures, sharded):
        assert content_of(sharded) == content_of(figures)

    def test_pages_and_contamination(self, figures, sharded, tmp_path):
        extra = [image_record(0, NAMES[0], preview_file=NAMES[1]), image_record(1, "PMC9/no.jpg")]
        spec = dataclasses.replace(sharded, annotation=write_lines(tmp_path / "extra.jsonl", extra))
        records = RecordSet(spec, encoder())
        assert [kind for kind, _ in records.check(0).warnings] == ["ignored file"]
        assert view_record(records, 0).images[0].size == (40, 30)
        assert thumbnail(records, 0, 0).startswith(b"\xff\xd8")
        assert [problem.kind for problem in view_record(records, 1).problems] == ["image missing"]
        shutil.copy(figures.root / NAMES[0], tmp_path / "copy.png")
        for benchmark in (tmp_path / "copy.png", sharded.root.parent / "meta.json"):
            leaks = find_leaks([records], read_benchmark([benchmark], tmp_path))
            assert {leak.kind for leak in leaks if leak.index == 0} >= {"same image"}

    def test_shards_without_manifest(self, figures, tmp_path):
        folder = tmp_path / "tars"
        folder.mkdir()
        for number, name in enumerate(NAMES):
            write_tar(folder / f"pmc-{number:06d}.tar", [(name, (figures.root / name).read_bytes())])
        assert content_of(DatasetSpec("qa", folder, figures.annotation)) == content_of(figures)

    def test_manifest_as_root(self, sharded):
        manifest = DatasetSpec("qa", sharded.root / "manifest.jsonl", sharded.annotation)
        assert content_of(manifest) == content_of(sharded)

    def test_missing_image(self, sharded):
        image = open_root(sharded.root).image("PMC9/fig.jpg")
        with pytest.raises(RecordError, match=r"PMC9/fig.jpg is in none of the 2 tar shards") as caught:
            image_info(image)
        assert caught.value.kind == "image missing"

    def test_damaged_image(self, sharded):
        shard = sharded.root / "shard-000000.tar"
        content = bytearray(shard.read_bytes())
        content[600] ^= 1
        shard.write_bytes(content)
        with pytest.raises(
            RecordError, match=r"PMC0/fig.png is damaged: the shard shard-000000.tar differs from"
        ):
            decode_image(open_root(sharded.root).image(NAMES[0]))
        shard.rename(shard.with_suffix(".old"))
        with pytest.raises(DataError, match="missing, but listed in"):
            open_root(sharded.root)

    def test_empty_image(self, tmp_path):
        write_tar(tmp_path / "x-0.tar", [("a.jpg", b"")])
        with pytest.raises(RecordError, match=r"a.jpg cannot be read: it is empty"):
            image_info(open_root(tmp_path).image("a.jpg"))

    def test_index_notices_changed_images(self, figures, sharded, tmp_path):
        index = partial(index_records, cache=tmp_path / "index")
        [before] = index([RecordSet(sharded, encoder())])
        folder = sharded.root
        shutil.rmtree(folder.parent)
        noise(33, 30, seed=9).save(figures.root / NAMES[1])
        options = {"meta_name": "meta.json", "shard_bytes": 6000, "skip_unusable": False, "progress": iter}
        write_shards([RecordSet(figures, encoder())], folder.parent, **options)
        records = RecordSet(sharded, encoder())
        assert before.images.changed_records(records.root).tolist() == [0]


class TestObjects:
    def test_same_as_folder(self, s3, figures):
        root = s3.upload(figures.root, "objects")
        annotation = "s3://figures/objects.jsonl"
        s3.put("objects.jsonl", figures.annotation.read_bytes())
        remote = DatasetSpec("qa", root, fetch_file(annotation))
        assert content_of(remote) == content_of(figures)

    def test_one_download_per_image(self, s3, figures):
        root = s3.upload(figures.root, "once")
        s3.requests()
        remote = DatasetSpec("qa", root, figures.annotation)
        content_of(remote)
        requests = s3.requests()
        # One more request looks for a manifest, and is repeated as a search for a folder with this name.
        assert sum("manifest.jsonl" in line for line in requests) == 2
        images = [line.split()[0] for line in requests if "manifest.jsonl" not in line]
        assert sorted(images) == ["GET"] * 4 + ["HEAD"] * 4
        stores._open_url.cache_clear()
        content_of(remote)  # from the cache
        assert not any(line.startswith("GET") and "?" not in line for line in s3.requests())

    def test_index_lists_the_folder(self, s3, figures, tmp_path, monkeypatch):
        monkeypatch.setattr(stores, "_MIN_LISTED", 4)
        root = s3.upload(figures.root, "listed")
        sets = [RecordSet(DatasetSpec("qa", root, figures.annotation), encoder())]
        s3.requests()
        [index] = index_records(sets, cache=tmp_path / "index")
        assert not index.problems
        assert [line.split()[0] for line in s3.requests()] == ["GET"] * 5  # one listing, four images
        s3.put(f"listed/{NAMES[2]}", (figures.root / NAMES[3]).read_bytes())
        stores._open_url.cache_clear()
        again = [RecordSet(sets[0].spec, encoder())]
        checked = []
        real = build._check_records
        monkeypatch.setattr(
            build, "_check_records", lambda *task: checked.extend(task[1].indices) or real(*task)
        )
        [changed] = index_records(again, cache=tmp_path / "index")
        assert checked == [1, 2]
        assert not changed.images.equals(index.images)

    def test_shards_of_objects(self, s3, figures, tmp_path, monkeypatch):
        """Writing shards lists the folder instead of sending a second request per image."""
        monkeypatch.setattr(stores, "_MIN_LISTED", 4)
        root = s3.upload(figures.root, "source")
        records = RecordSet(DatasetSpec("qa", root, figures.annotation), encoder())
        s3.requests()
        options = {"meta_name": "meta.json", "shard_bytes": 6000, "skip_unusable": False, "progress": iter}
        result = write_shards([records], tmp_path / "sharded", **options)
        assert [line.split()[0] for line in s3.requests()] == ["GET"] * 5  # one listing, four images
        assert content_of(load_meta(result.meta, tmp_path)[0]) == content_of(figures)

    def test_known_states_need_no_request(self, s3, figures, tmp_path):
        root = s3.upload(figures.root, "known")
        records = RecordSet(DatasetSpec("qa", root, figures.annotation), encoder())
        [index] = index_records([records], cache=tmp_path / "index")
        stores._open_url.cache_clear()
        other = RecordSet(records.spec, encoder())
        other.remember_images(index.images.names, index.images.states)
        s3.requests()
        assert len(other.load(0).tiles)
        assert s3.requests() == []  # from the cache of the index

    def test_missing_image(self, s3):
        with pytest.raises(RecordError, match=r"s3://figures/none/a.jpg does not exist; check 'root'"):
            image_info(open_root("s3://figures/none").image("a.jpg"))

    def test_changed_image(self, s3, monkeypatch):
        monkeypatch.setenv("M3LLM_CACHE_GB", "0")
        s3.put("changed/a.jpg", b"0123456789")
        image = open_root("s3://figures/changed").image("a.jpg")
        assert image.read() == b"0123456789"
        s3.put("changed/a.jpg", b"01234")
        with pytest.raises(RecordError, match=r"a.jpg has changed since it was listed") as caught:
            image.read()
        assert caught.value.kind == "changed"

    def test_invalid_settings(self, s3, monkeypatch):
        monkeypatch.setenv("M3LLM_CACHE_GB", "-1")
        with pytest.raises(UsageError, match="M3LLM_CACHE_GB is '-1'"):
            open_root("s3://figures/settings")

    def test_unavailable_storage_is_not_a_bad_record(self, s3, figures, monkeypatch):
        monkeypatch.setenv("M3LLM_RETRY_SECONDS", "0")
        root = s3.upload(figures.root, "gone")
        records = RecordSet(DatasetSpec("qa", root, figures.annotation), encoder())
        monkeypatch.setattr(stores, "file_state", partial(_fail, "refused"))
        with pytest.raises(StorageError, match=rf"{figures.annotation}, line 1 \(record 'r0'\): refused"):
            records.check(0)
        with pytest.raises(StorageError, match="refused"):
            index_records([records])
        packs = PackDataset(TrainingData([records], max_bad_fraction=1.0))
        assert isinstance(packs[[SampleIndex(0, 0)]], StorageError)  # not skipped

    def test_prefetch_ends_in_an_outage(self, s3, monkeypatch):
        store, requested = open_root("s3://figures/outage"), []

        def fail(url, **_):
            requested.append(url)
            raise StorageError("no answer")

        monkeypatch.setattr(stores, "file_state", fail)
        store.prefetch(f"{number}.jpg" for number in range(200))
        assert stores._THREADS <= len(requested) < 2 * stores._THREADS


def _fail(message, *_, **__):
    raise StorageError(message)


class TestRemoteShards:
    @pytest.fixture
    def remote(self, s3, sharded):
        return DatasetSpec("qa", s3.upload(sharded.root, "shards"), sharded.annotation)

    def test_same_as_folder(self, figures, remote):
        assert content_of(remote) == content_of(figures)

    def test_one_range_request_per_image(self, s3, remote):
        records = RecordSet(remote, encoder())
        s3.requests()
        for index in range(len(records)):
            records.load(index)
        requests = s3.requests()
        assert len(requests) == 4
        assert all(
            line.startswith("GET /figures/shards/shard-00000") and "bytes=" in line for line in requests
        )

    def test_damaged_cache_is_repaired(self, s3, remote, figures):
        image = open_root(remote.root).image(NAMES[0])
        content = image.read()
        [file] = [file for file in stores.image_cache().folder.glob("??/*")]
        file.write_bytes(bytes(len(content)))
        assert image.read() == content == file.read_bytes()

    def test_incomplete_upload(self, s3, sharded):
        for name in ("manifest.jsonl", "shard-000000.tar"):
            s3.put(f"half/{name}", (sharded.root / name).read_bytes())
        with pytest.raises(DataError, match=r"s3://figures/half: shard-000001.tar: missing, but listed in"):
            open_root("s3://figures/half")

    def test_cache_that_cannot_be_created(self, remote, monkeypatch):
        """This is not mistaken for a missing manifest."""
        monkeypatch.setenv("M3LLM_CACHE", "/proc/nowhere")
        with pytest.raises(UsageError, match=r"cannot be stored in the cache: .* set M3LLM_CACHE"):
            open_root(remote.root)

    def test_forked_and_pickled(self, remote):
        """A process that has used the storage can fork dataloader workers, which use it as well."""
        records = RecordSet(remote, encoder())
        expected = records.load(0).tiles
        copied = pickle.loads(pickle.dumps(records))
        shutil.rmtree(stores.image_cache().folder)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            tiles = [sample.tiles for sample in pool.map(copied.load, [0, 0])]
        assert all(np.array_equal(one, expected) for one in tiles)


class TestMeta:
    def test_remote_annotation(self, s3, figures, tmp_path):
        s3.put("meta/qa.jsonl", figures.annotation.read_bytes())
        entry = '{"qa": {"root": "$BUCKET/meta/", "annotation": "$BUCKET/meta/qa.jsonl"}}'
        (tmp_path / "meta.json").write_text(entry.replace("$BUCKET", "s3://figures"))
        [spec] = load_meta(tmp_path / "meta.json", tmp_path)
        assert spec.root == "s3://figures/meta"
        assert spec.annotation.name == "qa.jsonl"
        assert spec.annotation.read_bytes() == figures.annotation.read_bytes()
        assert len(build_sets([spec], encoder())[0]) == 4

    def test_problems(self, s3, tmp_path):
        entry = '{"a": {"root": "s3://K:hunter22@b/x", "annotation": "s3://figures/nowhere.jsonl"}}'
        (tmp_path / "meta.json").write_text(entry)
        with pytest.raises(DataError) as caught:
            load_meta(tmp_path / "meta.json", tmp_path)
        assert "a: 'root': s3://***@b/x: a URL must not contain credentials" in str(caught.value)
        assert "a: the annotation file s3://figures/nowhere.jsonl does not exist" in str(caught.value)
        assert "hunter22" not in str(caught.value)


def test_names_without_manifest(tmp_path):
    write_tar(tmp_path / "x-0.tar", IMAGES.items())
    store = open_root(tmp_path)
    assert {name: store.image(name).read() for name in IMAGES} == IMAGES
    assert store.contains("./a.jpg") and not store.contains("b.jpg")

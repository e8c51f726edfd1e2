"""Tests of the contamination check: image hashes, matching images and articles, benchmark files."""

import base64
import hashlib
import io
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_sets import encoder, image_record, smooth, text_record, write_meta, write_set

from internvl_chat.data.audit.benchmark_files import read_benchmark
from internvl_chat.data.audit.contamination import MAX_DIFFERENT_BITS, MIN_SIMILARITY, find_leaks
from internvl_chat.data.audit.image_hash import fingerprint, near_pairs, perceptual_hash, similarity
from internvl_chat.data.sources.problems import LEAKS
from internvl_chat.utils.errors import DataError


def figure(seed: int, size: int = 200) -> Image.Image:
    return smooth(size, size * 3 // 4, seed)


@pytest.fixture
def folder(tmp_path):
    """Folder with the training images a.png to e.png and an empty benchmark."""
    (tmp_path / "images").mkdir()
    for seed, name in enumerate("abcde"):
        figure(seed).save(tmp_path / f"images/{name}.png")
    (tmp_path / "bench").mkdir()
    return tmp_path


@pytest.fixture
def compare(folder):
    """Compare records with the benchmark; return the line, kind and message of each problem."""

    def compare(records, *paths):
        sets = [write_set(folder, records)]
        result = find_leaks(sets, read_benchmark(paths or [folder / "bench"], folder))
        return [(problem.line, problem.kind, problem.message) for problem in result]

    return compare


@pytest.fixture
def leaks(compare):
    """Like `compare`, without the warnings."""
    return lambda *arguments: [result for result in compare(*arguments) if result[1] in LEAKS]


class TestHash:
    @pytest.mark.parametrize("seed", range(4))
    def test_copies_match(self, seed):
        image = figure(seed, 400)
        look = perceptual_hash(image)
        with io.BytesIO() as buffer:
            image.save(buffer, "JPEG", quality=40)
            copies = [Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")]
        copies += [image.resize((133, 100)), image.resize((900, 700)), image.convert("L").convert("RGB")]
        for copy in copies:
            assert (perceptual_hash(copy) ^ look).bit_count() <= MAX_DIFFERENT_BITS

    def test_different_images_do_not_match(self):
        looks = np.array([perceptual_hash(figure(seed)) for seed in range(60)], np.uint64)
        assert near_pairs(looks, looks, MAX_DIFFERENT_BITS) == [(i, i, 0) for i in range(60)]

    def test_uniform_image_has_no_hash(self):
        assert perceptual_hash(Image.new("RGB", (50, 50), (200, 10, 10))) is None

    def test_fingerprints_of_files(self, folder):
        figure(0).save(folder / "same.png")
        figure(0, 800).save(folder / "large.jpg", quality=60)
        first, same, large = (fingerprint(folder / n) for n in ("images/a.png", "same.png", "large.jpg"))
        assert first == same
        assert large.content != first.content
        assert (large.look ^ first.look).bit_count() <= MAX_DIFFERENT_BITS

    @pytest.mark.parametrize("content", [b"", b"text", b"\xff\xd8\xff\xe0 cut"])
    def test_undecodable_file(self, tmp_path, content):
        """Only the content hash is available."""
        (tmp_path / "x.jpg").write_bytes(content)
        result = fingerprint(tmp_path / "x.jpg")
        assert result[:2] == (hashlib.sha256(content).hexdigest(), None)
        assert result.problem.startswith("cannot be decoded, so only its bytes are compared: the image ")
        missing = fingerprint(tmp_path / "nowhere.jpg")
        assert missing[:2] == (None, None)
        assert missing.problem.startswith("cannot be read, so not compared: ")
        assert similarity(tmp_path / "x.jpg", tmp_path / "x.jpg") == -1

    def test_fingerprint_of_a_uniform_image(self, tmp_path):
        Image.new("RGB", (50, 50), (200, 10, 10)).save(tmp_path / "x.png")
        assert fingerprint(tmp_path / "x.png")[1:] == (None, None)

    def test_similarity(self, folder):
        figure(0).resize((90, 70)).save(folder / "small.png")
        assert similarity(folder / "images/a.png", folder / "small.png") > MIN_SIMILARITY
        assert similarity(folder / "images/a.png", folder / "images/b.png") < 0.9

    @settings(max_examples=50)
    @given(
        first=st.lists(st.integers(0, 2**64 - 1), max_size=9),
        second=st.lists(st.integers(0, 2**64 - 1), max_size=9),
        near=st.integers(0, 40),
        block=st.integers(1, 30),
    )
    def test_near_pairs_against_brute_force(self, first, second, near, block):
        expected = [(i, j, (a ^ b).bit_count()) for i, a in enumerate(first) for j, b in enumerate(second)
                    if (a ^ b).bit_count() <= near]  # fmt: skip
        result = near_pairs(np.array(first, np.uint64), np.array(second, np.uint64), near, block)
        assert result == expected

    def test_real_figures(self, shared):
        """Different figures do not match, and downscaled copies do."""
        paths = sorted((shared / "pmc_mi/images").iterdir())
        prints = [fingerprint(path) for path in paths]
        looks = np.array([p.look for p in prints], np.uint64)
        assert [pair for pair in near_pairs(looks, looks, MAX_DIFFERENT_BITS) if pair[0] != pair[1]] == []
        for path, known in list(zip(paths, prints, strict=True))[::15]:
            with Image.open(path) as image:
                half = image.convert("RGB").resize((max(1, image.width // 2), max(1, image.height // 2)))
            assert (perceptual_hash(half) ^ known.look).bit_count() <= MAX_DIFFERENT_BITS


class TestImages:
    def test_identical_file(self, folder, leaks):
        figure(1).save(folder / "bench/other_name.png")
        records = [image_record(0, "a.png"), image_record(1, "b.png"), image_record(2, "c.png", "b.png")]
        a, b = folder / "images/b.png", folder / "bench/other_name.png"
        message = f"{a} is identical to {b}"
        assert leaks(records) == [(2, "same image", message), (3, "same image", message)]

    def test_scaled_copy(self, folder, leaks):
        figure(1).resize((120, 90)).save(folder / "bench/copy.jpg", quality=70)
        [(line, kind, message)] = leaks([image_record(0, "a.png"), image_record(1, "b.png")])
        assert (line, kind) == (2, "similar image")
        assert f"{folder / 'images/b.png'} looks like {folder / 'bench/copy.jpg'} (" in message
        assert message.endswith("of 64 bits differ)")

    def test_different_images(self, folder, leaks):
        figure(50).save(folder / "bench/x.png")
        assert leaks([image_record(i, f"{name}.png") for i, name in enumerate("abcde")]) == []

    def test_two_images_of_a_record(self, folder, leaks):
        figure(0).save(folder / "bench/x.png")
        figure(1).save(folder / "bench/y.png")
        [(_, kind, message)] = leaks([image_record(0, "a.png", "b.png")])
        assert (kind, message[-13:]) == ("same image", " (and 1 more)")

    def test_several_workers(self, folder):
        figure(1).save(folder / "bench/x.png")
        sets = [write_set(folder, [image_record(i, f"{name}.png") for i, name in enumerate("abcde")])]
        benchmark = read_benchmark([folder / "bench"], folder)
        assert find_leaks(sets, benchmark, workers=2) == find_leaks(sets, benchmark, workers=1) != []

    @pytest.mark.parametrize("cut", [100, 5000])
    def test_identical_undecodable_file(self, folder, compare, cut):
        """The record is unusable, but the training set contains the benchmark image."""
        content = (folder / "images/b.png").read_bytes()[:cut]
        (folder / "images/b.png").write_bytes(content)
        (folder / "bench/x.png").write_bytes(content)
        warning, leak = compare([image_record(0, "a.png"), image_record(1, "b.png")])
        assert warning[:2] == (None, "not compared")
        assert warning[2].startswith("cannot be decoded, so only its bytes are compared: ")
        a, b = folder / "images/b.png", folder / "bench/x.png"
        assert leak == (2, "same image", f"{a} is identical to {b}")

    def test_unusable_records_are_skipped(self, folder, leaks):
        figure(1).save(folder / "bench/x.png")
        (folder / "images/text.png").write_text("text")
        records = [b"{", image_record(1, "no.png"), image_record(2, "../x"), image_record(3, "text.png"),
                   image_record(4, "b.png")]  # fmt: skip
        assert [(line, kind) for line, kind, _ in leaks(records)] == [(5, "same image")]


class TestArticles:
    @pytest.fixture(autouse=True)
    def _benchmark(self, folder):
        items = [{"question": "?", "images": ["PMC123_f1.jpg"]}, {"question": "see PMC77", "gt": "."}]
        (folder / "bench/items.json").write_text(json.dumps(items, indent=1))

    @pytest.mark.parametrize("record", [
        text_record(0, id="PMC123-4"), text_record(0, answer="as in PMC123."),
        text_record(0, source="x/PMC123_f9.jpg"), text_record(0, meta={"deep": [["PMC123"]]}),
    ], ids=["id", "text", "other field", "deep"])  # fmt: skip
    def test_article_in_any_field(self, folder, leaks, record):
        [(line, kind, message)] = leaks([text_record(5), record])
        assert (line, kind) == (2, "same article")
        assert message == f"PMC123 is in {folder / 'bench/items.json'}, line 2"

    @pytest.mark.parametrize("name", ["PMC1234", "PMC12", "XPMC123", "pmc123", "PMC 123", "PMC-123"])
    def test_similar_ids_do_not_match(self, leaks, name):
        assert leaks([text_record(0, id=name)]) == []

    def test_article_in_an_image_path(self, folder, leaks):
        figure(0).save(folder / "images/PMC77_x.png")
        [(_, kind, message)] = leaks([image_record(0, "PMC77_x.png")])
        assert (kind, message) == ("same article", f"PMC77 is in {folder / 'bench/items.json'}, line 8")

    def test_article_in_the_name_of_a_benchmark_image(self, folder, leaks):
        figure(9).save(folder / "bench/PMC555_a.png")
        assert leaks([text_record(0, id="PMC555")]) == [
            (1, "same article", f"PMC555 is in {folder / 'bench/PMC555_a.png'}")
        ]


class TestBenchmark:
    def test_meta_file(self, folder, leaks):
        (folder / "held").mkdir()
        held = write_set(folder / "held", [image_record(0, "x.png", id="PMC9-1")], "held")
        figure(2).save(folder / "held/images/x.png")
        meta = write_meta(folder / "held/meta.json", [held])
        result = leaks([image_record(0, "c.png"), text_record(1, id="PMC9-2")], meta)
        assert [(line, kind) for line, kind, _ in result] == [(1, "same image"), (2, "same article")]

    @pytest.mark.parametrize("parent", ["bench", "bench/images", "images"])
    def test_folders_of_images(self, tmp_path, parent):
        (tmp_path / "bench").mkdir()
        (tmp_path / parent).mkdir(exist_ok=True)
        figure(3).save(tmp_path / parent / "x.png")
        (tmp_path / "bench/items.jsonl").write_text('{"images": ["x.png", "y.png"]}\n')
        result = read_benchmark([tmp_path / "bench/items.jsonl"], tmp_path)
        assert result.images == [tmp_path / parent / "x.png"]
        [problem] = result.problems
        assert (problem.kind, problem.file, problem.line) == (
            "not compared", tmp_path / "bench/items.jsonl", 1
        )  # fmt: skip
        assert problem.message == "the image y.png was not found, so not compared"

    def test_single_json_object(self, tmp_path):
        (tmp_path / "x.json").write_text('{"items": {"1": {"article": "PMC4"}}}')
        assert read_benchmark([tmp_path / "x.json"], tmp_path).articles == {"PMC4": str(tmp_path / "x.json")}

    @pytest.mark.parametrize(("content", "message"), [
        (None, "no such file or folder"), ("[{]", "not valid JSON"), ("{", "cannot be read"),
        ("[1]", "no PMC ids or images in"), ("{" + '"a":{' * 10**5, "cannot be read"),
    ])  # fmt: skip
    def test_unusable_benchmark_file(self, tmp_path, content, message):
        file = tmp_path / "x.json"
        if content is not None:
            file.write_text(content)
        with pytest.raises(DataError, match=message):
            read_benchmark([file], tmp_path)

    def test_invalid_json_is_an_error(self, folder):
        """Skipping the file would hide contamination."""
        figure(0).save(folder / "bench/x.png")
        (folder / "bench/items.json").write_text("[{")
        with pytest.raises(DataError, match=r"items\.json"):
            read_benchmark([folder / "bench"], folder)

    def test_published_benchmark(self, shared):
        result = read_benchmark([shared / "pmc_mi/benchmark"], shared)
        assert (len(result.articles), len(result.images), result.problems) == (146, 306, [])
        assert encoder().tokenizer


class TestNotCompared:
    """A folder may contain arbitrary files; those that cannot be compared are reported."""

    @pytest.fixture
    def read(self, folder):
        """Read the benchmark; return it and the file, line and message of each problem."""

        def read(*paths):
            result = read_benchmark(paths or [folder / "bench"], folder)
            names = [(p.file.name, p.line, p.message) for p in result.problems]
            assert all((p.kind, p.dataset, p.is_error) == ("not compared", "benchmark", False)
                       for p in result.problems)  # fmt: skip
            return result, names

        return read

    @pytest.mark.parametrize("name", ["x.tsv", "x.csv", "x.txt", "README.md", "notes", "x.yaml", "X.TSV"])
    def test_articles_in_text_files(self, folder, read, name):
        (folder / "bench" / name).write_bytes(b"index\tquestion\n1\tsee PMC11, \xe4 PMC12\n")
        for paths in ((), (folder / "bench" / name,)):
            result, names = read(*paths)
            assert result.articles == dict.fromkeys(
                ["PMC11", "PMC12"], f"{folder / 'bench' / name}, line 2"
            )  # fmt: skip
            assert names == []

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("x.tsv", "id\tfile\n1\ta, b.png\n2\t['d.png']\n3\tgone.png\n"),
            ("x.csv", 'id,file\n1,"d.png"\n2;a, b.png\n3,gone.png\n'),
        ],
    )
    def test_images_in_table_cells(self, folder, read, name, content):
        for image in ("a, b.png", "b.png", "d.png"):
            figure(1).save(folder / "bench" / image)
        (folder / "bench" / name).write_text(content)
        result, names = read(folder / "bench" / name)
        expected = ["a, b.png", "d.png"] if name == "x.tsv" else ["d.png", "b.png"]
        assert [image.name for image in result.images] == expected
        assert names == [(name, 4, "the image gone.png was not found, so not compared")]

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
    @pytest.mark.parametrize("name", ["x.tsv", "x.jsonl", "x.json", "x.txt"])
    def test_embedded_images_are_reported(self, folder, read, kind, name):
        with io.BytesIO() as buffer:
            figure(2).save(buffer, kind)
            text = base64.b64encode(buffer.getvalue()).decode()
        rows = [{"id": "PMC5", "image": text}, {"id": "PMC6", "image": f"data:image/x;base64,{text}"}]
        contents = {
            "x.tsv": "".join(f"{row['id']}\t{row['image']}\n" for row in rows),
            "x.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
            "x.json": json.dumps({"rows": rows}),
            "x.txt": "".join(f"{row['id']} {row['image']}\n" for row in rows),
        }
        (folder / "bench" / name).write_text(contents[name])
        result, names = read()
        assert sorted(result.articles) == ["PMC5", "PMC6"]
        message = "2 embedded base64 images are not compared; save them as files"
        assert names == [(name, None, message)]

    def test_other_file_types(self, folder, read):
        figure(1).save(folder / "bench/picture", "PNG")
        (folder / "bench/a.parquet").write_bytes(b"PAR1\x15\x04" + bytes(50))
        (folder / "bench/b.csv").write_text("PMC1\n", encoding="utf-16")
        (folder / "bench/.git").mkdir()
        (folder / "bench/.git/index").write_bytes(bytes(50))
        (folder / "bench/lost.json").symlink_to(folder / "nowhere")
        (folder / "bench/linked").symlink_to(folder / "images")
        result, names = read()
        assert result.images == [folder / "bench/picture"]
        assert names == [
            ("linked", None, "links to folders are not followed; pass the folder itself"),
            ("a.parquet", None, "neither an image nor text, so not compared"),
            ("b.csv", None, "neither an image nor text, so not compared"),
            ("lost.json", None, "not a readable file, so not compared"),
        ]

    def test_folder_without_comparable_files(self, folder):
        (folder / "bench/a.parquet").write_bytes(b"PAR1\x15\x04" + bytes(50))
        for path in (folder / "bench", folder / "bench/a.parquet"):
            with pytest.raises(DataError, match=r"no PMC ids or images in .*neither an image nor text"):
                read_benchmark([path], folder)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root can read all files")
    def test_unreadable_folder(self, folder):
        figure(1).save(folder / "bench/x.png")
        (folder / "bench/closed").mkdir(mode=0)
        with pytest.raises(DataError, match="cannot be read"):
            read_benchmark([folder / "bench"], folder)

    def test_warnings_come_before_leaks(self, folder, compare):
        figure(1).save(folder / "bench/x.png")
        (folder / "bench/y.jpg").write_text("a page")
        (folder / "bench/a.parquet").write_bytes(bytes(50))
        result = compare([image_record(1, "b.png")])
        assert [kind for _, kind, _ in result] == ["not compared", "not compared", "same image"]

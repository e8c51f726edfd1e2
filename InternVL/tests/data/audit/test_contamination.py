"""The leak guard: benchmark articles and images found in a training set, and nothing else."""

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
from internvl_chat.data.audit.contamination import LEAST_SIMILARITY, MOST_BITS, find_leaks
from internvl_chat.data.audit.image_hash import fingerprint, near_pairs, perceptual_hash, similarity
from internvl_chat.data.sources.problems import LEAKS
from internvl_chat.utils.errors import DataError


def figure(seed: int, size: int = 200) -> Image.Image:
    return smooth(size, size * 3 // 4, seed)


@pytest.fixture
def folder(tmp_path):
    """Five training images a.png to e.png, and an empty benchmark."""
    (tmp_path / "images").mkdir()
    for seed, name in enumerate("abcde"):
        figure(seed).save(tmp_path / f"images/{name}.png")
    (tmp_path / "bench").mkdir()
    return tmp_path


@pytest.fixture
def compare(folder):
    """Compare records with the benchmark; returns line, kind and message of what was found."""

    def compare(records, *paths):
        sets = [write_set(folder, records)]
        found = find_leaks(sets, read_benchmark(paths or [folder / "bench"], folder))
        return [(problem.line, problem.kind, problem.message) for problem in found]

    return compare


@pytest.fixture
def leaks(compare):
    """As `compare`, without the warnings of what is not compared."""
    return lambda *arguments: [found for found in compare(*arguments) if found[1] in LEAKS]


class TestHash:
    @pytest.mark.parametrize("seed", range(4))
    def test_copies_are_near(self, seed):
        image = figure(seed, 400)
        look = perceptual_hash(image)
        with io.BytesIO() as buffer:
            image.save(buffer, "JPEG", quality=40)
            copies = [Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")]
        copies += [image.resize((133, 100)), image.resize((900, 700)), image.convert("L").convert("RGB")]
        for copy in copies:
            assert (perceptual_hash(copy) ^ look).bit_count() <= MOST_BITS

    def test_others_are_far(self):
        looks = np.array([perceptual_hash(figure(seed)) for seed in range(60)], np.uint64)
        assert near_pairs(looks, looks, MOST_BITS) == [(i, i, 0) for i in range(60)]

    def test_a_plain_area_looks_like_nothing(self):
        assert perceptual_hash(Image.new("RGB", (50, 50), (200, 10, 10))) is None

    def test_of_files(self, folder):
        figure(0).save(folder / "same.png")
        figure(0, 800).save(folder / "large.jpg", quality=60)
        first, same, large = (fingerprint(folder / n) for n in ("images/a.png", "same.png", "large.jpg"))
        assert first == same
        assert large.content != first.content
        assert (large.look ^ first.look).bit_count() <= MOST_BITS

    @pytest.mark.parametrize("content", [b"", b"text", b"\xff\xd8\xff\xe0 cut"])
    def test_of_what_is_no_image(self, tmp_path, content):
        """Its bytes have a fingerprint all the same."""
        (tmp_path / "x.jpg").write_bytes(content)
        found = fingerprint(tmp_path / "x.jpg")
        assert found[:2] == (hashlib.sha256(content).digest()[:16], None)
        assert found.problem.startswith("only its bytes are compared, not its look: the image ")
        gone = fingerprint(tmp_path / "nowhere.jpg")
        assert gone[:2] == (None, None)
        assert gone.problem.startswith("it cannot be read, so not compared: ")
        assert similarity(tmp_path / "x.jpg", tmp_path / "x.jpg") == -1

    def test_of_a_plain_area(self, tmp_path):
        Image.new("RGB", (50, 50), (200, 10, 10)).save(tmp_path / "x.png")
        assert fingerprint(tmp_path / "x.png")[1:] == (None, None)

    def test_similarity(self, folder):
        figure(0).resize((90, 70)).save(folder / "small.png")
        assert similarity(folder / "images/a.png", folder / "small.png") > LEAST_SIMILARITY
        assert similarity(folder / "images/a.png", folder / "images/b.png") < 0.9

    @settings(max_examples=50)
    @given(
        first=st.lists(st.integers(0, 2**64 - 1), max_size=9),
        second=st.lists(st.integers(0, 2**64 - 1), max_size=9),
        near=st.integers(0, 40),
        block=st.integers(1, 30),
    )
    def test_pairs_against_a_plain_search(self, first, second, near, block):
        expected = [(i, j, (a ^ b).bit_count()) for i, a in enumerate(first) for j, b in enumerate(second)
                    if (a ^ b).bit_count() <= near]  # fmt: skip
        found = near_pairs(np.array(first, np.uint64), np.array(second, np.uint64), near, block)
        assert found == expected

    def test_real_figures(self, shared):
        """No two of them are taken for the same, and each is known again when it is smaller."""
        paths = sorted((shared / "pmc_mi/images").iterdir())
        prints = [fingerprint(path) for path in paths]
        looks = np.array([p.look for p in prints], np.uint64)
        assert [pair for pair in near_pairs(looks, looks, MOST_BITS) if pair[0] != pair[1]] == []
        for path, known in list(zip(paths, prints, strict=True))[::15]:
            with Image.open(path) as image:
                half = image.convert("RGB").resize((max(1, image.width // 2), max(1, image.height // 2)))
            assert (perceptual_hash(half) ^ known.look).bit_count() <= MOST_BITS


class TestImages:
    def test_the_same_file(self, folder, leaks):
        figure(1).save(folder / "bench/other_name.png")
        records = [image_record(0, "a.png"), image_record(1, "b.png"), image_record(2, "c.png", "b.png")]
        a, b = folder / "images/b.png", folder / "bench/other_name.png"
        message = f"{a} is {b}, byte for byte"
        assert leaks(records) == [(2, "same image", message), (3, "same image", message)]

    def test_a_copy(self, folder, leaks):
        figure(1).resize((120, 90)).save(folder / "bench/copy.jpg", quality=70)
        [(line, kind, message)] = leaks([image_record(0, "a.png"), image_record(1, "b.png")])
        assert (line, kind) == (2, "similar image")
        assert f"{folder / 'images/b.png'} looks like {folder / 'bench/copy.jpg'} (" in message
        assert message.endswith("of 64 bits differ)")

    def test_nothing_in_common(self, folder, leaks):
        figure(50).save(folder / "bench/x.png")
        assert leaks([image_record(i, f"{name}.png") for i, name in enumerate("abcde")]) == []

    def test_two_of_a_record(self, folder, leaks):
        figure(0).save(folder / "bench/x.png")
        figure(1).save(folder / "bench/y.png")
        [(_, kind, message)] = leaks([image_record(0, "a.png", "b.png")])
        assert (kind, message[-13:]) == ("same image", " (and 1 more)")

    def test_by_several_processes(self, folder):
        figure(1).save(folder / "bench/x.png")
        sets = [write_set(folder, [image_record(i, f"{name}.png") for i, name in enumerate("abcde")])]
        benchmark = read_benchmark([folder / "bench"], folder)
        assert find_leaks(sets, benchmark, workers=2) == find_leaks(sets, benchmark, workers=1) != []

    @pytest.mark.parametrize("cut", [100, 5000])
    def test_the_bytes_of_what_does_not_decode(self, folder, compare, cut):
        """It cannot be trained on as it is; but the training set holds what it must not."""
        content = (folder / "images/b.png").read_bytes()[:cut]
        (folder / "images/b.png").write_bytes(content)
        (folder / "bench/x.png").write_bytes(content)
        warning, leak = compare([image_record(0, "a.png"), image_record(1, "b.png")])
        assert warning[:2] == (None, "not compared")
        assert warning[2].startswith("only its bytes are compared, not its look: ")
        a, b = folder / "images/b.png", folder / "bench/x.png"
        assert leak == (2, "same image", f"{a} is {b}, byte for byte")

    def test_records_that_cannot_be_used_do_not_stop_it(self, folder, leaks):
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
    def test_wherever_it_is_named(self, folder, leaks, record):
        [(line, kind, message)] = leaks([text_record(5), record])
        assert (line, kind) == (2, "same article")
        assert message == f"PMC123 is in {folder / 'bench/items.json'}, line 2"

    @pytest.mark.parametrize("name", ["PMC1234", "PMC12", "XPMC123", "pmc123", "PMC 123", "PMC-123"])
    def test_other_ids(self, leaks, name):
        assert leaks([text_record(0, id=name)]) == []

    def test_in_an_image_path(self, folder, leaks):
        figure(0).save(folder / "images/PMC77_x.png")
        [(_, kind, message)] = leaks([image_record(0, "PMC77_x.png")])
        assert (kind, message) == ("same article", f"PMC77 is in {folder / 'bench/items.json'}, line 8")

    def test_of_a_benchmark_image(self, folder, leaks):
        figure(9).save(folder / "bench/PMC555_a.png")
        assert leaks([text_record(0, id="PMC555")]) == [
            (1, "same article", f"PMC555 is in {folder / 'bench/PMC555_a.png'}")
        ]


class TestBenchmark:
    def test_a_meta_file(self, folder, leaks):
        (folder / "held").mkdir()
        held = write_set(folder / "held", [image_record(0, "x.png", id="PMC9-1")], "held")
        figure(2).save(folder / "held/images/x.png")
        meta = write_meta(folder / "held/meta.json", [held])
        found = leaks([image_record(0, "c.png"), text_record(1, id="PMC9-2")], meta)
        assert [(line, kind) for line, kind, _ in found] == [(1, "same image"), (2, "same article")]

    @pytest.mark.parametrize("place", ["bench", "bench/images", "images"])
    def test_images_named_in_a_file_are_found_near_it(self, tmp_path, place):
        (tmp_path / "bench").mkdir()
        (tmp_path / place).mkdir(exist_ok=True)
        figure(3).save(tmp_path / place / "x.png")
        (tmp_path / "bench/items.jsonl").write_text('{"images": ["x.png", "y.png"]}\n')
        found = read_benchmark([tmp_path / "bench/items.jsonl"], tmp_path)
        assert found.images == [tmp_path / place / "x.png"]
        [problem] = found.problems
        assert (problem.kind, problem.file, problem.line) == (
            "not compared", tmp_path / "bench/items.jsonl", 1
        )  # fmt: skip
        assert problem.message == "the image y.png is named there, but was not found, so not compared"

    def test_one_object(self, tmp_path):
        (tmp_path / "x.json").write_text('{"items": {"1": {"article": "PMC4"}}}')
        assert read_benchmark([tmp_path / "x.json"], tmp_path).articles == {"PMC4": str(tmp_path / "x.json")}

    @pytest.mark.parametrize(("content", "message"), [
        (None, "no such file or folder to compare with"), ("[{]", "not valid JSON"), ("{", "cannot be read"),
        ("[1]", "no PMC ids and no images in"), ("{" + '"a":{' * 10**5, "cannot be read"),
    ])  # fmt: skip
    def test_that_is_none(self, tmp_path, content, message):
        file = tmp_path / "x.json"
        if content is not None:
            file.write_text(content)
        with pytest.raises(DataError, match=message):
            read_benchmark([file], tmp_path)

    def test_an_unreadable_file_among_others_is_an_error(self, folder):
        """A guard that passes over what it cannot read would say that all is well."""
        figure(0).save(folder / "bench/x.png")
        (folder / "bench/items.json").write_text("[{")
        with pytest.raises(DataError, match=r"items\.json"):
            read_benchmark([folder / "bench"], folder)

    def test_the_published_benchmark(self, shared):
        found = read_benchmark([shared / "pmc_mi/benchmark"], shared)
        assert (len(found.articles), len(found.images), found.problems) == (146, 306, [])
        assert encoder().tokenizer


class TestWhatIsNotCompared:
    """A folder may hold anything: it is read as far as possible, and the rest is named."""

    @pytest.fixture
    def read(self, folder):
        """Read the benchmark; returns it and what is not compared, by file, line and message."""

        def read(*paths):
            found = read_benchmark(paths or [folder / "bench"], folder)
            names = [(p.file.name, p.line, p.message) for p in found.problems]
            assert all((p.kind, p.dataset, p.is_error) == ("not compared", "benchmark", False)
                       for p in found.problems)  # fmt: skip
            return found, names

        return read

    @pytest.mark.parametrize("name", ["x.tsv", "x.csv", "x.txt", "README.md", "notes", "x.yaml", "X.TSV"])
    def test_articles_of_any_text(self, folder, read, name):
        (folder / "bench" / name).write_bytes(b"index\tquestion\n1\tsee PMC11, \xe4 PMC12\n")
        for paths in ((), (folder / "bench" / name,)):
            found, names = read(*paths)
            assert found.articles == dict.fromkeys(
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
    def test_images_of_a_table(self, folder, read, name, content):
        for image in ("a, b.png", "b.png", "d.png"):
            figure(1).save(folder / "bench" / image)
        (folder / "bench" / name).write_text(content)
        found, names = read(folder / "bench" / name)
        expected = ["a, b.png", "d.png"] if name == "x.tsv" else ["d.png", "b.png"]
        assert [image.name for image in found.images] == expected
        assert names == [(name, 4, "the image gone.png is named there, but was not found, so not compared")]

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
    @pytest.mark.parametrize("name", ["x.tsv", "x.jsonl", "x.json", "x.txt"])
    def test_images_inside_a_text_are_named(self, folder, read, kind, name):
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
        found, names = read()
        assert sorted(found.articles) == ["PMC5", "PMC6"]
        message = "2 images inside it as text (base64) are not compared; save them as files"
        assert names == [(name, None, message)]

    def test_files_of_other_kinds(self, folder, read):
        figure(1).save(folder / "bench/picture", "PNG")
        (folder / "bench/a.parquet").write_bytes(b"PAR1\x15\x04" + bytes(50))
        (folder / "bench/b.csv").write_text("PMC1\n", encoding="utf-16")
        (folder / "bench/.git").mkdir()
        (folder / "bench/.git/index").write_bytes(bytes(50))
        (folder / "bench/lost.json").symlink_to(folder / "nowhere")
        (folder / "bench/linked").symlink_to(folder / "images")
        found, names = read()
        assert found.images == [folder / "bench/picture"]
        assert names == [
            ("linked", None, "a link to a folder, which is not followed; give the folder itself"),
            ("a.parquet", None, "neither an image nor text, so not compared"),
            ("b.csv", None, "neither an image nor text, so not compared"),
            ("lost.json", None, "no file that can be read, so not compared"),
        ]

    def test_alone_they_are_nothing_to_compare_with(self, folder):
        (folder / "bench/a.parquet").write_bytes(b"PAR1\x15\x04" + bytes(50))
        for path in (folder / "bench", folder / "bench/a.parquet"):
            with pytest.raises(DataError, match=r"no PMC ids and no images in .*neither an image nor text"):
                read_benchmark([path], folder)

    @pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may read everything")
    def test_a_folder_that_cannot_be_listed(self, folder):
        figure(1).save(folder / "bench/x.png")
        (folder / "bench/closed").mkdir(mode=0)
        with pytest.raises(DataError, match="cannot be read"):
            read_benchmark([folder / "bench"], folder)

    def test_they_come_before_the_leaks(self, folder, compare):
        figure(1).save(folder / "bench/x.png")
        (folder / "bench/y.jpg").write_text("a page")
        (folder / "bench/a.parquet").write_bytes(bytes(50))
        found = compare([image_record(1, "b.png")])
        assert [kind for _, kind, _ in found] == ["not compared", "not compared", "same image"]

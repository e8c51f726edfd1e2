"""Tests of the written sample data: format, reproducibility, and answers checked against the pixels only."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvl_chat.data.audit.contamination import MAX_DIFFERENT_BITS, MIN_SIMILARITY
from internvl_chat.data.audit.image_hash import fingerprint, near_pairs, similarity
from internvl_chat.data.synthetic import sample_data
from internvl_chat.data.synthetic.figures import Figure, plan_figures
from internvl_chat.data.synthetic.panels import draw_figure
from internvl_chat.data.synthetic.sample_data import DATASETS, write_sample_data

TRAIN, HELD_OUT = 6, 3
COUNTS = {"train": TRAIN, "held_out": HELD_OUT}
PACK = np.array([1 << 16, 1 << 8, 1])


@pytest.fixture(scope="module")
def metas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_sample_data(tmp_path_factory.mktemp("sample") / "data", train=TRAIN, held_out=HELD_OUT)


@pytest.fixture(scope="module")
def images(metas: dict[str, Path]) -> Path:
    return metas["train"].parent / "images"


def records_of(metas: dict[str, Path], split: str) -> dict[str, list[dict]]:
    """Return the records of a split, keyed by category, as listed in its meta file."""
    meta = json.loads(metas[split].read_text(encoding="utf-8"))
    lines = {name: Path(entry["annotation"]).read_text(encoding="utf-8") for name, entry in meta.items()}
    return {DATASETS[name]: [json.loads(line) for line in text.splitlines()] for name, text in lines.items()}


def prompt(record: dict) -> str:
    return record["conversations"][0]["value"]


def answer(record: dict) -> str:
    return record["conversations"][1]["value"]


def test_meta_files(metas: dict[str, Path]) -> None:
    assert set(metas) == {"train", "held_out"}
    for split, path in metas.items():
        assert path.name == f"{split}.json"
        meta = json.loads(path.read_text(encoding="utf-8"))
        assert list(meta) == list(DATASETS)
        for name, entry in meta.items():
            assert entry == {
                "root": str(path.parent / "images"),
                "annotation": str(path.parent / split / f"{DATASETS[name]}.jsonl"),
                "data_augment": False,
                "repeat_time": 1,
                "length": COUNTS[split],
            }
            assert Path(entry["root"]).is_absolute() and Path(entry["annotation"]).is_absolute()


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_records(metas: dict[str, Path], images: Path, split: str) -> None:
    identities = []
    for category, records in records_of(metas, split).items():
        assert len(records) == COUNTS[split]
        for record in records:
            identities.append(record["id"])
            assert [message["from"] for message in record["conversations"]] == ["human", "gpt"]
            assert prompt(record).strip() and answer(record).strip()
            assert prompt(record).count("<image>") == len(record.get("image", []))
            if category == "puretext":
                assert "image" not in record
                continue
            header = "".join(f"Fig-{number}: <image>\n" for number in range(len(record["image"])))
            assert prompt(record).startswith(header)
            assert all((images / name).is_file() for name in record["image"])
            assert len(set(record["image"])) == len(record["image"])
            assert all(name.startswith(f"{record['image'][0]}_") for name in record["image"][1:])
    assert len(set(identities)) == len(identities)


def test_image_sizes_and_modes(images: Path) -> None:
    modes = Counter()
    for path in images.iterdir():
        with Image.open(path) as picture:
            picture.load()
            modes[picture.format, picture.mode] += 1
            assert picture.format == {".jpg": "JPEG", ".png": "PNG"}[path.suffix]
            if path.stem.endswith("_fig1"):
                assert picture.mode == "RGB" and 700 <= picture.width <= 1600
            else:
                assert 250 <= picture.width <= 700 and 250 <= picture.height <= 700
    assert set(modes) == {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB")}


def contents(folder: Path) -> dict[str, bytes]:
    root = str(folder).encode()
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes().replace(root, b"ROOT") for path in files}


def test_output_depends_only_on_the_seed(metas: dict[str, Path], tmp_path: Path) -> None:
    first = contents(metas["train"].parent)
    write_sample_data(tmp_path / "same", train=TRAIN, held_out=HELD_OUT)
    assert contents(tmp_path / "same") == first
    write_sample_data(tmp_path / "other", seed=1, train=TRAIN, held_out=HELD_OUT)
    other = contents(tmp_path / "other")
    differing = [name for name in first if name.endswith((".jpg", ".png", ".jsonl"))]
    assert len(differing) > 12 and all(other.get(name) != first[name] for name in differing)


def test_splits_share_no_image(metas: dict[str, Path], images: Path) -> None:
    used = {
        split: {name for records in by_category.values() for r in records for name in r.get("image", [])}
        for split, by_category in ((split, records_of(metas, split)) for split in COUNTS)
    }
    assert used["train"] and used["held_out"] and not used["train"] & used["held_out"]
    assert len({path.read_bytes() for path in images.iterdir()}) == len(list(images.iterdir()))


def test_drawing_that_looks_like_an_earlier_one_is_redrawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first drawings of all figures are identical, and the later ones random."""
    seen: set[str] = set()

    def draw(figure: Figure, rng: np.random.Generator) -> Image.Image:
        alike = figure.name not in seen
        seen.add(figure.name)
        return draw_figure(figure, np.random.default_rng(0) if alike else rng)

    def plan(count: int, first: int, rng: np.random.Generator) -> list[Figure]:
        figure = planned[0]
        return [replace(figure, name=f"SYN{first + i:04d}_fig1.jpg") for i in range(count)]

    planned = plan_figures(1, 1, np.random.default_rng(0))
    monkeypatch.setattr(sample_data, "draw_figure", draw)
    monkeypatch.setattr(sample_data, "plan_figures", plan)
    monkeypatch.setattr(sample_data, "image_records", lambda *_: [])
    write_sample_data(tmp_path / "data", train=4, held_out=4)
    files = sorted((tmp_path / "data/images").iterdir())
    assert len(files) == 12 * (1 + len(planned[0].panels))
    hashes = np.array([fingerprint(file).look for file in files], np.uint64)
    pairs = [(files[i], files[j]) for i, j, _ in near_pairs(hashes, hashes, MAX_DIFFERENT_BITS) if i < j]
    assert not [pair for pair in pairs if similarity(*pair) >= MIN_SIMILARITY]


def test_panel_count_equals_the_number_of_files(images: Path, metas: dict[str, Path]) -> None:
    counted = 0
    for split in COUNTS:
        for record in records_of(metas, split)["compound_image"]:
            if record.get("choices") == ["2", "3", "4", "5", "6"]:
                counted += 1
                assert len(list(images.glob(f"{record['image'][0]}_*"))) == int(answer(record))
    assert counted >= 2


def locate(crop: Image.Image, figure: Image.Image) -> tuple[int, int]:
    """Return the only position (left, top) at which a figure contains exactly the pixels of a crop."""
    big, small = np.asarray(figure, np.int32) @ PACK, np.asarray(crop, np.int32) @ PACK
    last_top, last_left = np.array(big.shape) - small.shape
    _, first, counts = np.unique(small, return_index=True, return_counts=True)
    rare = [np.unravel_index(first[index], small.shape) for index in np.argsort(counts)[:200]]
    row, column = rare[0]
    reachable = big[row : row + last_top + 1, column : column + last_left + 1]
    tops, lefts = np.nonzero(reachable == small[row, column])
    for row, column in rare[1:]:
        matching = big[tops + row, lefts + column] == small[row, column]
        tops, lefts = tops[matching], lefts[matching]
    height, width = small.shape
    positions = [
        (left, top)
        for left, top in zip(lefts.tolist(), tops.tolist(), strict=True)
        if np.array_equal(big[top : top + height, left : left + width], small)
    ]
    assert len(positions) == 1
    return positions[0]


def test_panels_are_crops_in_reading_order(images: Path) -> None:
    figure_paths = list(images.glob("SYN????_fig1.png"))
    assert figure_paths
    for path in figure_paths:
        positions = []
        with Image.open(path) as figure:
            for crop_path in sorted(images.glob(f"{path.name}_*")):
                with Image.open(crop_path) as crop:
                    positions.append(locate(crop, figure))
        assert positions == sorted(positions, key=lambda position: (position[1], position[0]))
        assert len(set(positions)) == len(positions) >= 2


def test_positions_agree_with_the_pixels(images: Path, metas: dict[str, Path]) -> None:
    """Locate both panels in the lossless figures and compare their positions."""
    checked = 0
    for split in COUNTS:
        for record in records_of(metas, split)["bbox"]:
            if not record["image"][0].endswith(".png"):
                continue
            figure, first, second = (Image.open(images / name) for name in record["image"])
            (left_1, top_1), (left_2, top_2) = locate(first, figure), locate(second, figure)
            truth = {
                "left": left_1 + first.width <= left_2,
                "right": left_2 + second.width <= left_1,
                "above": top_1 + first.height <= top_2,
                "below": top_2 + second.height <= top_1,
            }
            if answer(record) in ("yes", "no"):
                assert (answer(record) == "yes") == truth["left" if "left of" in prompt(record) else "above"]
            else:
                answered = set(re.findall(r"\b(?:left|right|above|below)\b", answer(record)))
                assert answered == {side for side, holds in truth.items() if holds}
            checked += 1
    assert checked >= 1


def test_nonempty_folder_is_rejected(metas: dict[str, Path], tmp_path: Path) -> None:
    before = contents(metas["train"].parent)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        write_sample_data(metas["train"].parent, train=1, held_out=1)
    assert contents(metas["train"].parent) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        write_sample_data(tmp_path / "file", train=1, held_out=1)


@pytest.mark.parametrize("counts", [{"train": 0}, {"held_out": -1}])
def test_count_below_one_is_rejected(counts: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        write_sample_data(tmp_path / "data", **counts)
    assert not (tmp_path / "data").exists()


def test_interrupted_run_leaves_no_meta_file(tmp_path: Path) -> None:
    seen: list[str] = []

    def stop_at_third(figures: Iterable[Figure]) -> Iterator[Figure]:
        for figure in figures:
            if len(seen) == 3:
                raise KeyboardInterrupt
            seen.append(figure.name)
            yield figure

    with pytest.raises(KeyboardInterrupt):
        write_sample_data(tmp_path / "data", train=1, held_out=1, progress=stop_at_third)
    assert seen == sorted(seen) and len(list((tmp_path / "data" / "images").glob("SYN????_fig1.???"))) == 3
    assert not list((tmp_path / "data").rglob("*.json"))

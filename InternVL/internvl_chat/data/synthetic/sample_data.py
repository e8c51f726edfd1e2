"""Write a small self-made data set of compound figures with questions and answers (`m3llm sample-data`).
Exists so that the whole training pipeline can be tried without any download."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from internvl_chat.data.synthetic.figures import MIN_FIGURES, Figure, plan_figures
from internvl_chat.data.synthetic.panels import draw_figure
from internvl_chat.data.synthetic.questions import image_records
from internvl_chat.data.synthetic.text_questions import FACTS, text_records

# Data set name in the meta file -> its category, which is also the name of its JSONL file.
DATASETS = {
    "qa-puretext": "puretext",
    "qa-bbox": "bbox",
    "qa-single_subimage": "single_subimage",
    "qa-multiple_subimage": "multiple_subimage",
    "qa-subimage-option": "subimage_option",
    "qa-compound-image": "compound_image",
}


def write_sample_data(
    folder: Path,
    *,
    seed: int = 0,
    train: int = 60,
    held_out: int = 20,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> dict[str, Path]:
    """Write figures, records and two meta files into `folder`; return the metas' paths by split.

    `train`, `held_out`: records in each of the six categories. The two splits share no image. Everything
    follows from `seed`. `progress` wraps the iterable of figures being drawn, for a progress bar. The meta
    files come last, so that a folder which holds both is complete. Raises FileExistsError where `folder`
    exists and is not an empty folder, ValueError where a count is below 1.
    """
    counts = {"train": train, "held_out": held_out}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; it is the number of records per category, at least 1")
    folder = _empty_folder(folder)
    plan_rng, draw_rng, ask_rng = np.random.default_rng(seed).spawn(3)
    fact_order = ask_rng.permutation(len(FACTS)).tolist()
    figures: dict[str, list[Figure]] = {}
    for split, count in counts.items():
        first_number = 1 + sum(map(len, figures.values()))
        figures[split] = plan_figures(max(count, MIN_FIGURES), first_number, plan_rng)
    images = folder / "images"
    images.mkdir()
    every_figure = [figure for split in figures.values() for figure in split]
    for figure in progress(every_figure) if progress else every_figure:
        _write_figure(figure, images, draw_rng)
    metas = {
        split: _write_records(folder, split, counts[split], figures[split], fact_order, ask_rng)
        for split in counts
    }
    for split, meta in metas.items():
        _write_meta(folder / f"{split}.json", meta)
    return {split: folder / f"{split}.json" for split in counts}


def _empty_folder(folder: Path) -> Path:
    """Make `folder` and return its absolute path; refuse one that holds anything."""
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; name a new one or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_figure(figure: Figure, images: Path, rng: Generator) -> None:
    """Write a figure and, as crops of it with their letters, its panels."""
    picture = draw_figure(figure, rng)
    _save(picture, images / figure.name, figure.quality)
    for index, panel in enumerate(figure.panels):
        crop = picture.crop(panel.box)
        crop = crop.convert("L") if panel.saved_grey else crop
        _save(crop, images / figure.panel_name(index), figure.quality)


def _save(picture: Image.Image, path: Path, quality: int) -> None:
    options = {"quality": quality} if path.suffix == ".jpg" else {"compress_level": 4}
    picture.save(path, **options)


def _write_records(
    folder: Path, split: str, count: int, figures: Sequence[Figure], fact_order: Sequence[int], rng: Generator
) -> dict[str, dict[str, object]]:
    """Write one JSONL file per category; return the contents of the meta file that names them."""
    (folder / split).mkdir()
    meta: dict[str, dict[str, object]] = {}
    for dataset, category in DATASETS.items():
        if category == "puretext":
            records = text_records(count, split, fact_order)
        else:
            records = image_records(category, figures, count, split, rng)
        annotation = folder / split / f"{category}.jsonl"
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        annotation.write_text("".join(lines), encoding="utf-8")
        meta[dataset] = {
            "root": str(folder / "images"),
            "annotation": str(annotation),
            "data_augment": False,
            "repeat_time": 1,
            "length": len(records),
        }
    return meta


def _write_meta(path: Path, meta: dict[str, dict[str, object]]) -> None:
    """Write a meta file under another name first, so that it is there in full or not at all."""
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)

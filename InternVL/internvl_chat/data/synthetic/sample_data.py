"""Sample dataset of synthetic compound figures with questions and answers (`m3llm sample-data`)."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from internvl_chat.data.synthetic.figures import MIN_FIGURES, Figure, plan_figures
from internvl_chat.data.synthetic.panels import draw_figure
from internvl_chat.data.synthetic.questions import image_records
from internvl_chat.data.synthetic.text_questions import FACTS, text_records
from internvl_chat.utils.files import write_json, write_json_lines

# Dataset name in the meta file -> category, which is also the name of its JSONL file.
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
    """Write figures, records and the meta files of two splits; return the path of each meta file.

    The splits share no image. The meta files are written last, so a folder with both is complete.

    Args:
        folder: output folder; must be missing or empty.
        seed: determines the entire dataset.
        train: records per category in the training split.
        held_out: records per category in the held-out split.
        progress: wraps the iterable of figures to draw, for a progress bar.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: a count is below 1.
    """
    counts = {"train": train, "held_out": held_out}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}, but must be at least 1 record per category")
    folder = _empty_folder(folder)
    plan_rng, draw_rng, ask_rng = np.random.default_rng(seed).spawn(3)
    fact_order = ask_rng.permutation(len(FACTS)).tolist()
    figures: dict[str, list[Figure]] = {}
    for split, count in counts.items():
        first_number = 1 + sum(map(len, figures.values()))
        figures[split] = plan_figures(max(count, MIN_FIGURES), first_number, plan_rng)
    images = folder / "images"
    images.mkdir()
    all_figures = [figure for split in figures.values() for figure in split]
    for figure in progress(all_figures) if progress else all_figures:
        _write_figure(figure, images, draw_rng)
    metas = {
        split: _write_records(folder, split, counts[split], figures[split], fact_order, ask_rng)
        for split in counts
    }
    for split, meta in metas.items():
        write_json(folder / f"{split}.json", meta)
    return {split: folder / f"{split}.json" for split in counts}


def _empty_folder(folder: Path) -> Path:
    """Create a folder and return its absolute path; refuse one that is not empty."""
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; choose another or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_figure(figure: Figure, images: Path, rng: Generator) -> None:
    """Write a figure, and its panels as crops of it."""
    image = draw_figure(figure, rng)
    _save(image, images / figure.name, figure.quality)
    for index, panel in enumerate(figure.panels):
        crop = image.crop(panel.box)
        crop = crop.convert("L") if panel.saved_grey else crop
        _save(crop, images / figure.panel_name(index), figure.quality)


def _save(image: Image.Image, path: Path, quality: int) -> None:
    options: dict[str, Any] = {"quality": quality} if path.suffix == ".jpg" else {"compress_level": 4}
    image.save(path, **options)


def _write_records(
    folder: Path, split: str, count: int, figures: Sequence[Figure], fact_order: Sequence[int], rng: Generator
) -> dict[str, dict[str, object]]:
    """Write one JSONL file per category; return the content of the meta file."""
    (folder / split).mkdir()
    meta: dict[str, dict[str, object]] = {}
    for dataset, category in DATASETS.items():
        if category == "puretext":
            records = text_records(count, split, fact_order)
        else:
            records = image_records(category, figures, count, split, rng)
        annotation = folder / split / f"{category}.jsonl"
        write_json_lines(annotation, records)
        meta[dataset] = {
            "root": str(folder / "images"),
            "annotation": str(annotation),
            "data_augment": False,
            "repeat_time": 1,
            "length": len(records),
        }
    return meta

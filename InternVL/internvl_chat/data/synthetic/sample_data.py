"""Sample dataset of synthetic compound figures with questions and answers (`m3llm sample-data`)."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from internvl_chat.data.audit.contamination import MAX_DIFFERENT_BITS, MIN_SIMILARITY
from internvl_chat.data.audit.image_hash import correlation, gray_levels, near_pairs, perceptual_hash
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
# A drawing that looks like an earlier one is redrawn. The thresholds are stricter than those of the
# contamination check, to allow for JPEG compression.
_MAX_DRAWINGS = 20
_SIMILAR_BITS = MAX_DIFFERENT_BITS + 2
_SIMILARITY = MIN_SIMILARITY - 0.01


def write_sample_data(
    folder: Path,
    *,
    seed: int = 0,
    train: int = 60,
    held_out: int = 20,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> dict[str, Path]:
    """Write the figures, records and meta files of two splits; return the path to each meta file.

    No two images match in the contamination check, unless `_MAX_DRAWINGS` drawings of a figure all look like
    an earlier image. Records are unique, so the text-only category has at most 75 training and 25 held-out
    records. The meta files are written last, so a folder that contains both is complete.

    Args:
        folder: output folder; must be missing or empty.
        seed: seed of the entire dataset.
        train: records per category in the training split; the text-only category may have fewer.
        held_out: records per category in the held-out split; the text-only category may have fewer.
        progress: wraps the figures to draw in a progress bar.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: a count is below 1.
    """
    counts = {"train": train, "held_out": held_out}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}, but there must be at least 1 record per category")
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
    gallery = _Gallery()
    for figure in progress(all_figures) if progress else all_figures:
        _write_figure(figure, images, gallery, draw_rng)
    metas = {
        split: _write_records(folder, split, counts[split], figures[split], fact_order, ask_rng)
        for split in counts
    }
    for split, meta in metas.items():
        write_json(folder / f"{split}.json", meta)
    return {split: folder / f"{split}.json" for split in counts}


def _empty_folder(folder: Path) -> Path:
    """Create a folder and return its absolute path; raise `FileExistsError` if it is not empty."""
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not an empty folder; choose a different folder, or delete it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class _Gallery:
    """Hashes and gray levels of the images drawn so far."""

    def __init__(self) -> None:
        self._hashes: list[int] = []
        self._grays: list[np.ndarray] = []

    def add(self, images: Sequence[Image.Image], *, even_if_similar: bool) -> bool:
        """Add images unless one of them looks like an earlier image or like another of them.

        With `even_if_similar`, they are always added. Return whether they were added.
        """
        known = len(self._hashes)
        self._hashes += [perceptual_hash(image) or 0 for image in images]
        self._grays += [gray_levels(image) for image in images]
        hashes = np.array(self._hashes, np.uint64)
        similar = any(
            i + known > j and correlation(self._grays[i + known], self._grays[j]) >= _SIMILARITY
            for i, j, _ in near_pairs(hashes[known:], hashes, _SIMILAR_BITS)
        )
        if similar and not even_if_similar:
            del self._hashes[known:], self._grays[known:]
            return False
        return True


def _write_figure(figure: Figure, folder: Path, gallery: _Gallery, rng: Generator) -> None:
    """Draw a figure until it looks different from all earlier ones; write it and the crop of each panel."""
    for attempt in range(_MAX_DRAWINGS):
        image = draw_figure(figure, rng)
        crops = [image.crop(panel.box) for panel in figure.panels]
        if gallery.add([image, *crops], even_if_similar=attempt == _MAX_DRAWINGS - 1):
            break
    _save(image, folder / figure.name, figure.quality)
    for index, (panel, crop) in enumerate(zip(figure.panels, crops, strict=True)):
        crop = crop.convert("L") if panel.saved_gray else crop
        _save(crop, folder / figure.panel_name(index), figure.quality)


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

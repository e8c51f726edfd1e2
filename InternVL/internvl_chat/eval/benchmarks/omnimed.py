"""OmniMedVQA (Hu et al., CVPR 2024): multiple-choice questions on single images, one task per modality."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item
from internvl_chat.eval.benchmarks.reading import (
    EVERYTHING,
    Format,
    Request,
    check_images,
    check_keys,
    choice_item,
    file_rows,
    find_image,
    optional_string,
    read_rows,
    required_strings,
    with_indices,
)
from internvl_chat.utils.errors import DataError

# Modality in the published tables -> regular expression for its names in the dataset.
_MODALITIES = {
    "OCT": r"^oct(?![a-z])|optical coherence",
    "CT": r"^ct(?![a-z])|computed tomography",
    "MR": r"^mri?(?![a-z])|magnetic resonance",
    "FP": r"fundus",
    "Der": r"dermoscop",
    "Mic": r"microscop",
    "X-Ray": r"x[-_ ]?ray",
    "US": r"ultrasound",
}
_ORDER = ("CT", "FP", "MR", "OCT", "Der", "Mic", "X-Ray", "US")


def read_omnimed(data: Path, request: Request = EVERYTHING) -> Benchmark:
    """Read all JSON files in `QA_information/Open-access`, or in `QA_information` if that folder is missing.

    Tasks are named after the modalities in the published tables; other modalities keep their names.

    Args:
        data: folder with `QA_information/` and the images.
        request: whether the images must exist; its tasks are ignored, and all tasks are read.

    Raises:
        DataError: there is no JSON file.
    """
    folder = data / "QA_information"
    folder = folder / "Open-access" if (folder / "Open-access").is_dir() else folder
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise DataError("not OmniMedVQA: no JSON file in QA_information", file=data)
    parse = partial(_parse, data=data, images=request.images)
    rule = Format(parse, _task_of, answer_key="gt_answer", answers="text")
    items = [item for file in files for item in read_rows(file_rows(RecordFile(file)), rule)]
    items = with_indices(items)
    order = {name: number for number, name in enumerate(_ORDER)}
    items.sort(key=lambda item: (order.get(item.task, len(order)), item.task, item.index))
    return Benchmark("omnimedvqa", tuple(items), pooled=True)


def _task_of(raw: Mapping[str, Any]) -> str:
    """Return the task of an item, or "" if it has no modality."""
    # Some files of the dataset use a different key.
    modality = raw.get("modality" if "modality" in raw else "modality_type")
    return short_modality(modality) if isinstance(modality, str) else ""


def _parse(raw: Mapping[str, Any], *, data: Path, images: bool) -> Item:
    question, image, _, _, modality = required_strings(
        raw, "question", "image_path", "option_A", "option_B",
        "modality" if "modality" in raw else "modality_type",
    )  # fmt: skip
    answer = optional_string(raw, "gt_answer")
    options = [f"option_{letter}" for letter in ascii_uppercase if raw.get(f"option_{letter}")]
    check_keys(raw, options)
    choices = required_strings(raw, *options)
    check_images(raw, ("image_path", "question"), [image], question)
    figure = Figure(image, path=find_image(image, [data], required=images))
    return choice_item(short_modality(modality), question, answer, (figure,), choices)


def short_modality(name: str) -> str:
    """Return the short name of a modality, as in the published tables; other names are returned unchanged.

    >>> short_modality("OCT (Optical Coherence Tomography"), short_modality("Endoscopy")
    ('OCT', 'Endoscopy')
    """
    for short, pattern in _MODALITIES.items():
        if re.search(pattern, name.strip(), re.IGNORECASE):
            return short
    return name.strip()

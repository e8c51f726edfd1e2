"""OmniMedVQA (Hu et al., CVPR 2024): multiple choice on single images, counted by modality."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item
from internvl_chat.eval.benchmarks.reading import (
    find_image,
    list_options,
    read_items,
    right_letter,
    text_under,
)
from internvl_chat.utils.errors import DataError

# The names of the published tables, by how a modality's own name begins or what it contains.
_MODALITIES = {
    "OCT": ("oct", "optical coherence"),
    "CT": ("ct", "computed tomography"),
    "MR": ("mr", "magnetic resonance"),
    "FP": ("fundus",),
    "Der": ("dermoscopy",),
    "Mic": ("microscopy",),
    "X-Ray": ("x-ray", "x_ray", "xray", "x ray"),
    "US": ("ultrasound",),
}
_ORDER = ("CT", "FP", "MR", "OCT", "Der", "Mic", "X-Ray", "US")


def read_omnimed(data: Path) -> Benchmark:
    """Read `QA_information/Open-access/*.json`, or without that folder all of `QA_information`.

    A modality beyond the eight of the published tables keeps its own name.

    Args:
        data: the folder of `QA_information/` and of the images.

    Raises:
        DataError: there are no questions, or items cannot be used.
    """
    folder = data / "QA_information"
    folder = folder / "Open-access" if (folder / "Open-access").is_dir() else folder
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise DataError("no questions of OmniMedVQA: no JSON file in QA_information", file=data)
    items = read_items([(RecordFile(file), partial(_parse, data=data)) for file in files])
    place = {name: number for number, name in enumerate(_ORDER)}
    items.sort(key=lambda item: (place.get(item.task, len(place)), item.task, item.index))
    return Benchmark("omnimedvqa", tuple(items), pooled=True)


def _parse(raw: Mapping[str, Any], *, data: Path) -> Item:
    question, answer, image, *_ = text_under(
        raw, "question", "gt_answer", "image_path", "option_A", "option_B"
    )
    # Some files of the set have the one name, some the other.
    [modality] = text_under(raw, "modality" if "modality" in raw else "modality_type")
    options = [f"option_{letter}" for letter in "ABCD" if raw.get(f"option_{letter}")]
    choices = text_under(raw, *options)
    figure = Figure(image, path=find_image(image, [data]))
    asked = f"{question}\n{list_options(choices)}"
    task = short_modality(modality)
    return Item(task, 0, asked, right_letter(answer, choices), (figure,), tuple(choices))


def short_modality(name: str) -> str:
    """Return the published tables' name of a modality, or its own.

    >>> short_modality("OCT (Optical Coherence Tomography"), short_modality("Endoscopy")
    ('OCT', 'Endoscopy')
    """
    lowered = name.strip().lower()
    for short, (beginning, *contained) in _MODALITIES.items():
        if lowered.startswith(beginning) or any(part in lowered for part in contained):
            return short
    return name.strip()

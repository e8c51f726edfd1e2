"""OmniMedVQA (Hu et al., CVPR 2024): multiple-choice questions on single images, one task per modality."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item
from internvl_chat.eval.benchmarks.reading import (
    check_images,
    choice_item,
    find_image,
    read_items,
    required_strings,
)
from internvl_chat.utils.errors import DataError

# Name in the published tables -> prefix of the name in the dataset, or a part of it.
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
    """Read `QA_information/Open-access/*.json`, or all of `QA_information` if there is no such folder.

    Modalities that the published tables do not have keep their names.

    Args:
        data: folder of `QA_information/` and the images.

    Raises:
        DataError: there are no questions, or items are invalid.
    """
    folder = data / "QA_information"
    folder = folder / "Open-access" if (folder / "Open-access").is_dir() else folder
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise DataError("no questions of OmniMedVQA: no JSON file in QA_information", file=data)
    items = read_items([(RecordFile(file), partial(_parse, data=data)) for file in files])
    order = {name: number for number, name in enumerate(_ORDER)}
    items.sort(key=lambda item: (order.get(item.task, len(order)), item.task, item.index))
    return Benchmark("omnimedvqa", tuple(items), pooled=True)


def _parse(raw: Mapping[str, Any], *, data: Path) -> Item:
    question, answer, image, *_ = required_strings(
        raw, "question", "gt_answer", "image_path", "option_A", "option_B"
    )
    # The key differs between the files of the dataset.
    [modality] = required_strings(raw, "modality" if "modality" in raw else "modality_type")
    options = [f"option_{letter}" for letter in "ABCD" if raw.get(f"option_{letter}")]
    choices = required_strings(raw, *options)
    check_images(raw, ("image_path", "question"), [image], question)
    figure = Figure(image, path=find_image(image, [data]))
    return choice_item(short_modality(modality), question, answer, (figure,), choices)


def short_modality(name: str) -> str:
    """Return the name of a modality in the published tables, or the given name if they do not have it.

    >>> short_modality("OCT (Optical Coherence Tomography"), short_modality("Endoscopy")
    ('OCT', 'Endoscopy')
    """
    lowered = name.strip().lower()
    for short, (prefix, *parts) in _MODALITIES.items():
        if lowered.startswith(prefix) or any(part in lowered for part in parts):
            return short
    return name.strip()

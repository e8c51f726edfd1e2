"""Sample answers of the validations, grouped by record, with thumbnails of the figures."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from internvl_chat.constants import IMAGE_PLACEHOLDER
from internvl_chat.data.sources.images import ImageLocation, locate_image
from internvl_chat.data.sources.preview import jpeg_preview
from internvl_chat.data.sources.problems import RecordError
from internvl_chat.data.storage.stores import open_root
from internvl_chat.metrics.overlap import exact_match
from internvl_chat.train.report.run import Run, Sample
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.files import is_file
from internvl_chat.utils.html import image_data_url

# Answers shown per record and run: first, last, and evenly spaced ones between.
MAX_ANSWERS = 6
MAX_RECORDS = 24
_MAX_FIGURES = 8
_PIXELS = 420
_MAX_CHARACTERS = 4000
_IMAGE_LINE = re.compile(rf"(?:Fig-\d+: )?{IMAGE_PLACEHOLDER}\n?")


@dataclass(frozen=True)
class Figure:
    """Figure of a record.

    Attributes:
        name: file name.
        source: data URL; None if the file cannot be read.
    """

    name: str
    source: str | None


@dataclass(frozen=True)
class Answer:
    """Answer to a question, with the run and step that gave it."""

    label: str
    text: str
    correct: bool
    truncated: bool


@dataclass(frozen=True)
class Question:
    """Question of a validation record and its answers, in the order of runs and steps."""

    dataset: str
    index: int
    text: str
    reference: str
    figures: Sequence[Figure]
    answers: Sequence[Answer]


def sample_questions(runs: Mapping[str, Run]) -> list[Question]:
    """Return the sampled questions with the answers of a run, or the last answer of each of several runs."""
    groups: dict[tuple[str, int, str], list[tuple[str, Sample]]] = {}
    for name, run in runs.items():
        of_run: dict[tuple[str, int, str], list[Sample]] = {}
        for sample in run.samples:
            of_run.setdefault((sample.dataset, sample.index, sample.question), []).append(sample)
        for key, samples in of_run.items():
            shown = samples[-1:] if len(runs) > 1 else _spread(samples)
            label = f"{name}, step" if len(runs) > 1 else "step"
            groups.setdefault(key, []).extend((f"{label} {s.step:,}", s) for s in shown)
    return [_question([*group]) for group in list(groups.values())[:MAX_RECORDS]]


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    chosen = np.linspace(0, len(samples) - 1, min(len(samples), MAX_ANSWERS)).round().astype(int)
    return [samples[position] for position in chosen]


def _question(group: Sequence[tuple[str, Sample]]) -> Question:
    sample = group[-1][1]
    return Question(
        sample.dataset,
        sample.index,
        _shorten(_IMAGE_LINE.sub("", sample.question).strip()),
        _shorten(sample.reference),
        [Figure(path.name, _thumbnail(path)) for path in sample.images[:_MAX_FIGURES]],
        [
            Answer(label, _shorten(s.answer), bool(exact_match(s.answer, s.reference)), s.truncated)
            for label, s in group
        ],
    )


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} …"


@lru_cache(maxsize=1024)  # the report is written many times with --watch
def _thumbnail(path: Path) -> str | None:
    """Return a thumbnail as a data URL; None if the image cannot be read, or is in object storage."""
    try:
        return image_data_url(jpeg_preview(_locate(path), _PIXELS), "jpeg")
    except (RecordError, DataError, OSError):
        return None


def _locate(path: Path) -> ImageLocation:
    """Return the location of an image, which may be in tar shards: then only the folder above it exists."""
    if is_file(path):
        return path
    folder = next(parent for parent in path.parents if parent.is_dir())
    root = open_root(folder)
    return locate_image(root, str(path.relative_to(folder)))

"""Descriptions of synthetic compound figures, used to generate images, questions and answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.random import Generator

Box = tuple[int, int, int, int]
T = TypeVar("T")

KINDS = ("CT", "MRI", "X-ray", "ultrasound", "histology", "chart")
RADIOLOGY = ("CT", "MRI", "X-ray", "ultrasound")
PANEL_COUNTS = (2, 3, 4, 5, 6)
MIN_FIGURES = len(KINDS)  # number of figures whose first panels cover all kinds

# Kind -> variant -> noun phrase for a panel of that variant.
VARIANTS: dict[str, dict[str, str]] = {
    "CT": {"head": "an axial head CT", "chest": "an axial chest CT", "abdomen": "an axial abdominal CT"},
    "MRI": {"T1": "a T1-weighted axial brain MRI", "T2": "a T2-weighted axial brain MRI"},
    "X-ray": {"chest": "a frontal chest X-ray"},
    "ultrasound": {"wide": "a wide-fan ultrasound image", "narrow": "a narrow-fan ultrasound image"},
    "histology": {"gland": "H&E histology with glands", "dense": "H&E histology with densely packed nuclei"},
    "chart": {"bar": "a bar chart", "line": "a line chart"},
}
_LESION = dict.fromkeys(RADIOLOGY, "a bright round lesion") | {"ultrasound": "a dark round cyst"}
_ARROW = dict.fromkeys(RADIOLOGY, "a white arrow") | {"histology": "a black arrow"}

_COLUMNS = {2: (1, 2), 3: (1, 2, 3), 4: (2,), 5: (2, 3), 6: (2, 3)}
_COLUMN_WIDTHS = {1: (676, 700), 2: (350, 600), 3: (250, 490)}
_ROW_HEIGHTS = (250, 520)


@dataclass(frozen=True)
class Finding:
    """A lesion or an arrow in a panel.

    The drawing slightly zooms, shifts and rotates a lesion together with the anatomy, but never moves it to
    the other half of the panel.

    Attributes:
        x: distance to the right of the panel's center, in units of half the panel's short side.
        y: distance below the panel's center, in the same unit.
    """

    name: Literal["lesion", "arrow"]
    x: float
    y: float

    @property
    def side(self) -> str:
        """Half of the panel that contains the finding: "left" or "right" as seen by the viewer."""
        return "left" if self.x < 0 else "right"


@dataclass(frozen=True)
class Panel:
    """One panel of a figure.

    Attributes:
        box: (left, top, right, bottom) in pixels of the figure, with right and bottom exclusive.
        saved_gray: whether the separate image file of the panel is grayscale; the figure is always RGB.
    """

    label: str
    kind: str
    variant: str
    finding: Finding | None
    box: Box
    saved_gray: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        left, top, right, bottom = self.box
        return right - left, bottom - top

    @property
    def has_lesion(self) -> bool:
        """Whether the panel shows a lesion or cyst."""
        return self.finding is not None and self.finding.name == "lesion"

    @property
    def finding_phrase(self) -> str | None:
        """The finding as a noun phrase, such as "a white arrow"; None without a finding."""
        if self.finding is None:
            return None
        return (_LESION if self.finding.name == "lesion" else _ARROW)[self.kind]

    @property
    def description(self) -> str:
        """The panel as a noun phrase, including any finding and the half that contains it."""
        phrase = VARIANTS[self.kind][self.variant]
        if self.finding is None:
            return phrase
        conjunction = "and" if " with " in phrase else "with"
        return f"{phrase} {conjunction} {self.finding_phrase} in the {self.finding.side} half"


@dataclass(frozen=True)
class Figure:
    """A compound figure.

    Attributes:
        name: file name.
        size: (width, height) in pixels.
        quality: JPEG quality.
        boxed_letters: whether the panel letters are drawn on filled boxes.
    """

    name: str
    size: tuple[int, int]
    panels: tuple[Panel, ...]
    quality: int
    boxed_letters: bool

    def panel_name(self, index: int) -> str:
        """Return the file name of panel `index` (0 = A), such as `SYN0001_fig1.jpg_0.jpg`."""
        return f"{self.name}_{index}.{self.name.rsplit('.', 1)[1]}"


def horizontal_relation(first: Panel, second: Panel) -> str | None:
    """Return whether `first` is "left" or "right" of `second`; None if their columns overlap."""
    if first.box[2] <= second.box[0]:
        return "left"
    return "right" if second.box[2] <= first.box[0] else None


def vertical_relation(first: Panel, second: Panel) -> str | None:
    """Return whether `first` is "above" or "below" `second`; None if their rows overlap."""
    if first.box[3] <= second.box[1]:
        return "above"
    return "below" if second.box[3] <= first.box[1] else None


def plan_figures(count: int, first_number: int, rng: Generator) -> list[Figure]:
    """Plan `count` figures with consecutive numbers, named SYN<number>_fig1.

    The number of panels, the kind of the first panel, and whether all panels have the same kind are balanced:
    each possible value occurs about equally often. The first panels of the first `MIN_FIGURES` figures cover
    all kinds.
    """
    counts = _shuffled_rounds(PANEL_COUNTS, count, rng)
    leads = _shuffled_rounds(KINDS, count, rng)
    single_kind = _shuffled_rounds((True, False), count, rng)
    numbers = range(first_number, first_number + count)
    plans = zip(numbers, counts, leads, single_kind, strict=True)
    return [_plan_figure(number, panels, lead, single, rng) for number, panels, lead, single in plans]


def _shuffled_rounds(values: Sequence[T], count: int, rng: Generator) -> list[T]:
    """Return `count` values in rounds; each round contains every value once, in a new random order."""
    rounds = -(-count // len(values))
    return [value for _ in range(rounds) for value in _shuffled(values, rng)][:count]


def _shuffled(values: Sequence[T], rng: Generator) -> list[T]:
    return [values[int(index)] for index in rng.permutation(len(values))]


def _plan_figure(number: int, panels: int, lead: str, single_kind: bool, rng: Generator) -> Figure:
    kinds = [lead] * panels
    if not single_kind:
        second = pick([kind for kind in KINDS if kind != lead], rng)
        kinds[1:] = _shuffled([second, *(pick(KINDS, rng) for _ in kinds[2:])], rng)
    suffix = "png" if lead == "chart" else "jpg"
    size, boxes = _lay_out(panels, rng)
    return Figure(
        name=f"SYN{number:04d}_fig1.{suffix}",
        size=size,
        panels=tuple(
            _plan_panel(label, kind, box, suffix == "jpg", rng)
            for label, kind, box in zip("ABCDEF", kinds, boxes, strict=False)
        ),
        quality=int(rng.integers(85, 96)),
        boxed_letters=bool(rng.random() < 0.4),
    )


def _plan_panel(label: str, kind: str, box: Box, jpeg: bool, rng: Generator) -> Panel:
    gray = bool(rng.random() < 0.4) and jpeg and kind in RADIOLOGY
    return Panel(label, kind, pick(tuple(VARIANTS[kind]), rng), _plan_finding(kind, rng), box, gray)


def _plan_finding(kind: str, rng: Generator) -> Finding | None:
    chance, side = rng.random(), float(rng.choice((-1.0, 1.0)))
    x, y = side * rng.uniform(0.34, 0.42), rng.uniform(-0.35, -0.05)
    if kind == "ultrasound":
        y += 0.35  # the fan is too narrow at the top
    if kind in RADIOLOGY and chance < 0.45:
        return Finding("lesion", x, y)
    return Finding("arrow", x, y) if kind != "chart" and chance > 0.8 else None


def _lay_out(panels: int, rng: Generator) -> tuple[tuple[int, int], list[Box]]:
    """Return the figure's size and its panels' boxes in pixels, row by row."""
    columns = int(rng.choice(_COLUMNS[panels]))
    rows = -(-panels // columns)
    margin, gutter = int(rng.integers(12, 21)), int(rng.integers(6, 18))
    widths = rng.integers(*_COLUMN_WIDTHS[columns], size=columns, endpoint=True).tolist()
    widths = [(width + widths[0]) // 2 for width in widths]
    typical = sum(widths) / columns * (0.55 if columns == 1 else 1.0)
    heights = np.clip(typical * rng.uniform(0.8, 1.05, size=rows), *_ROW_HEIGHTS).astype(int).tolist()
    lefts = [margin + sum(widths[:column]) + gutter * column for column in range(columns)]
    tops = [margin + sum(heights[:row]) + gutter * row for row in range(rows)]
    size = (lefts[-1] + widths[-1] + margin, tops[-1] + heights[-1] + margin)
    cells = [divmod(index, columns) for index in range(panels)]
    return size, [(lefts[c], tops[r], lefts[c] + widths[c], tops[r] + heights[r]) for r, c in cells]


def pick(values: Sequence[T], rng: Generator) -> T:
    """Return a random element."""
    return values[int(rng.integers(len(values)))]

"""Tests of the synthetic images: layout, side of the findings, and distinguishability of the kinds."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from internvl_chat.data.synthetic.figures import KINDS, RADIOLOGY, VARIANTS, Finding, Panel, plan_figures
from internvl_chat.data.synthetic.panels import draw_figure, draw_panel


def test_panels_do_not_overlap() -> None:
    for figure in plan_figures(60, 1, np.random.default_rng(3)):
        assert [panel.label for panel in figure.panels] == list("ABCDEF"[: len(figure.panels)])
        covered = np.zeros(figure.size[::-1], np.uint8)
        for panel in figure.panels:
            left, top, right, bottom = panel.box
            assert 0 <= left < right <= figure.size[0] and 0 <= top < bottom <= figure.size[1]
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1


@pytest.mark.parametrize("kind", RADIOLOGY)
@pytest.mark.parametrize("name", ["lesion", "arrow"])
@pytest.mark.parametrize("size", [(300, 300), (690, 290)])
def test_finding_is_on_the_described_side(
    kind: str, name: Literal["lesion", "arrow"], size: tuple[int, int]
) -> None:
    variant = next(iter(VARIANTS[kind]))
    bare = Panel("A", kind, variant, None, (0, 0, *size))
    for x, side in ((-0.4, "left"), (0.4, "right")):
        marked = replace(bare, finding=Finding(name, x, 0.05))
        drawn = [np.asarray(draw_panel(panel, np.random.default_rng(7)), int) for panel in (bare, marked)]
        columns = np.nonzero(np.abs(drawn[1] - drawn[0]).max(axis=(0, 2)) > 40)[0]
        assert len(columns) > 10
        assert f"in the {side} half" in marked.description
        assert columns.max() < size[0] / 2 if side == "left" else columns.min() >= size[0] / 2


def simple_statistics(picture: Image.Image) -> list[float]:
    pixels = np.asarray(picture.resize((96, 96)), np.float32)
    gray = pixels.mean(axis=2)
    texture = np.abs(np.diff(gray, axis=1)).mean()
    color = np.ptp(pixels, axis=2).mean()
    return [gray.mean(), gray.std(), color, texture, (gray < 30).mean(), (gray > 200).mean()]


def test_kinds_differ_in_simple_statistics() -> None:
    rng = np.random.default_rng(11)
    rows = []
    for kind in KINDS:
        for number in range(24):
            variants = list(VARIANTS[kind])
            panel = Panel("A", kind, variants[number % len(variants)], None, (0, 0, 300, 280))
            rows.append(simple_statistics(draw_panel(panel, rng)))
    table = np.array(rows).reshape(len(KINDS), 24, -1)
    table = (table - table.mean(axis=(0, 1))) / table.std(axis=(0, 1))
    centers = table[:, :12].mean(axis=1)
    guesses = ((table[:, 12:, None] - centers) ** 2).sum(axis=-1).argmin(axis=-1)
    assert (guesses == np.arange(len(KINDS))[:, None]).mean() > 0.85


def test_figure_has_its_size_and_a_white_background() -> None:
    planned = plan_figures(6, 1, np.random.default_rng(3))
    figure = next(figure for figure in planned if len(figure.panels) == 5)
    pixels = np.asarray(draw_figure(figure, np.random.default_rng(0)))
    assert pixels.shape == (figure.size[1], figure.size[0], 3)
    outside = np.ones(pixels.shape[:2], bool)
    for left, top, right, bottom in (panel.box for panel in figure.panels):
        outside[top:bottom, left:right] = False
    assert (pixels[outside] == 255).all()

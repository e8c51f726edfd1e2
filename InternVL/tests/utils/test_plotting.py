"""Tests of the plotting helpers."""

import numpy as np
from PIL import Image

from internvl_chat.utils.plotting import GRAY, PALETTE, new_figure, plain_text, save_png, series_style


def luminance(color: str) -> float:
    """Return the relative luminance of a color, from 0 to 1."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2


def test_colors_are_visible_on_white():
    assert all(1.05 / (luminance(color) + 0.05) > 2 for color in (*PALETTE, GRAY))


def test_series_differ():
    styles = [tuple(series_style(number).values()) for number in range(24)]
    assert len(set(styles)) == 24
    assert len({color for color, _ in styles[: len(PALETTE)]}) == len(PALETTE)


def test_plain_text():
    assert plain_text("a$b_$") == r"a\$b_\$"
    assert plain_text("x" * 41) == "x" * 39 + "…"
    assert plain_text("$" * 5, 3) == r"\$\$…"


def test_png_has_a_white_background(tmp_path):
    figure = new_figure(2, 1)
    figure.subplots().plot([1, 2])
    save_png(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (130, 260, 3)
    assert (pixels[0, 0] == 255).all()

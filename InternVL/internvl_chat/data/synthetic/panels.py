"""Render synthetic CT, MRI, X-ray, ultrasound, histology and chart panels with numpy and Pillow."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from internvl_chat.data.synthetic.figures import RADIOLOGY, Figure, Finding, Panel

Field = NDArray[np.floating]
_LESION_GRAY = {"CT": 235.0, "MRI": 252.0, "X-ray": 232.0, "ultrasound": 6.0}
_MRI_GRAYS = {"T1": (230.0, 182.0, 138.0, 34.0), "T2": (150.0, 128.0, 182.0, 248.0)}
_NOISE_SD = {"CT": 7.0, "MRI": 6.0, "X-ray": 3.5, "ultrasound": 0.0}


@dataclass(frozen=True)
class _View:
    """Coordinates of the pixel centers in a panel.

    (0, 0) is the center of the body, and 1 is about half the panel's short side.
    """

    x: Field
    y: Field

    def ellipse(self, cx: float, cy: float, rx: float, ry: float) -> Field:
        """Return each pixel's squared elliptic distance from (cx, cy): 1 on the ellipse, less inside."""
        return ((self.x - cx) / rx) ** 2 + ((self.y - cy) / ry) ** 2

    def soft(self, cx: float, cy: float, rx: float, ry: float, edge: float = 6.0) -> Field:
        """Return the mask of an ellipse, 1 inside and 0 outside; a larger `edge` makes its border sharper."""
        return np.clip((1.0 - self.ellipse(cx, cy, rx, ry)) * edge, 0.0, 1.0)


def draw_figure(figure: Figure, rng: Generator) -> Image.Image:
    """Draw a compound figure as an RGB image: lettered panels on white."""
    image = Image.new("RGB", figure.size, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(int(rng.integers(26, 37)))
    for panel in figure.panels:
        left, top = panel.box[:2]
        image.paste(draw_panel(panel, rng), (left, top))
        position = (left + 8, top + 4)
        color, outline = ("white", "black") if panel.kind in RADIOLOGY else ("black", "white")
        if figure.boxed_letters:
            x0, y0, x1, y1 = draw.textbbox(position, panel.label, font=font)
            draw.rectangle((x0 - 6, y0 - 6, x1 + 6, y1 + 6), fill=outline, outline=color)
        draw.text(position, panel.label, fill=color, font=font, stroke_width=2, stroke_fill=outline)
    return image


def draw_panel(panel: Panel, rng: Generator) -> Image.Image:
    """Draw a panel as an RGB image with random anatomy and noise."""
    if panel.kind in _GRAY_DRAWERS:
        image = _draw_radiology(panel, rng)
    else:
        image = {"histology": _draw_histology, "chart": _draw_chart}[panel.kind](panel, rng)
    if panel.finding is not None and panel.finding.name == "arrow":
        _draw_arrow(image, panel.finding, "black" if panel.kind == "histology" else "white")
    return image


def _draw_radiology(panel: Panel, rng: Generator) -> Image.Image:
    width, height = panel.size
    view = _random_view(width, height, rng)
    gray = _GRAY_DRAWERS[panel.kind](view, panel.variant, rng)
    noise = rng.standard_normal((height, width), dtype=np.float32) * _NOISE_SD[panel.kind]
    if panel.finding is not None and panel.has_lesion:
        radius = rng.uniform(0.09, 0.13)
        spot = view.soft(panel.finding.x, panel.finding.y, radius, radius, edge=3.0)
        gray = _blend(gray, spot, _LESION_GRAY[panel.kind])
    return Image.fromarray(np.clip(np.abs(gray + noise), 0, 255).astype(np.uint8)).convert("RGB")


def _plain_view(width: int, height: int) -> _View:
    half = min(width, height) / 2
    x = ((np.arange(width, dtype=np.float32) + 0.5) - width / 2) / half
    y = ((np.arange(height, dtype=np.float32) + 0.5) - height / 2) / half
    return _View(x[None, :], y[:, None])


def _random_view(width: int, height: int, rng: Generator) -> _View:
    """Return a view with random zoom, shift and rotation, which mimics variation between patients."""
    plain = _plain_view(width, height)
    margin = (max(width, height) / min(width, height)) ** 0.35
    zoom, angle = margin * rng.uniform(0.85, 1.1), math.radians(rng.uniform(-9, 9))
    x, y = plain.x / zoom - rng.uniform(-0.08, 0.08), plain.y / zoom - rng.uniform(-0.1, 0.1)
    return _View(x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle))


def _cloud(shape: tuple[int, ...], cells: int, rng: Generator) -> Field:
    """Return smooth noise of about unit variance from a random grid of `cells` x `cells` values."""
    height, width = shape
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def _blend(gray: Field, mask: Field, value: float | Field) -> Field:
    return gray + (value - gray) * mask


def _draw_ct(view: _View, variant: str, rng: Generator) -> Field:
    draw = _ct_head if variant == "head" else _ct_trunk
    return draw(view, variant, rng) * np.float32(rng.uniform(0.93, 1.05))


def _ct_head(view: _View, variant: str, rng: Generator) -> Field:
    rx, ry = rng.uniform(0.64, 0.72), rng.uniform(0.80, 0.88)
    gray = np.full(view.ellipse(0, 0, rx, ry).shape, 6.0, dtype=np.float32)
    gray = _blend(gray, view.soft(0, 0, rx, ry, 20), 90.0)
    gray = _blend(gray, view.soft(0, 0, rx * 0.95, ry * 0.95, 20), 245.0)
    brain = view.soft(0, 0, rx * 0.84, ry * 0.86, 20)
    gray = _blend(gray, brain, 104.0 + 5.0 * _cloud(gray.shape, 12, rng))
    gray = _blend(gray, brain * np.clip(1.5 - 90 * np.abs(view.x), 0, 1), 150.0)
    spread, length = rng.uniform(0.10, 0.15), rng.uniform(0.2, 0.3)
    for side in (-1, 1):
        slanted = _View(view.x - side * 0.25 * np.abs(view.y), view.y)
        gray = _blend(gray, slanted.soft(side * spread * 0.6, -0.02, 0.06, length), 48.0)
    return gray


def _ct_trunk(view: _View, variant: str, rng: Generator) -> Field:
    rx, ry = rng.uniform(0.92, 1.0), rng.uniform(0.66, 0.74)
    body = view.ellipse(0, 0, rx, ry)
    gray = np.full(body.shape, 5.0, dtype=np.float32)
    gray = _blend(gray, np.clip(1 - np.abs(view.y - 0.86 + 0.08 * view.x**2) * 60, 0, 1), 90.0)
    gray = _blend(gray, np.clip((1 - body) * 20, 0, 1), 62.0)
    gray = _blend(gray, np.clip((0.88 - body) * 20, 0, 1), 128.0)
    angle = np.arctan2(view.y / ry, view.x / rx)
    ribs = np.clip(np.sin(angle * 8 + rng.uniform(0, 6)) * 4, 0, 1)
    gray = _blend(gray, ribs * np.clip(1 - np.abs(body - 0.74) * 14, 0, 1) * 0.97, 248.0)
    if variant == "chest":
        for side in (-1, 1):
            lung = view.soft(side * 0.42 * rx, -0.03, 0.33 * rx, 0.62 * ry, 12)
            vessels = np.clip(_cloud(gray.shape, 40, rng) - 1.5, 0, 1) * 110
            gray = _blend(gray, lung, 24.0 + vessels)
        gray = _blend(gray, view.soft(0.1, 0.05, 0.24, 0.26), 148.0)
    else:
        inside = np.clip((0.62 - body) * 12, 0, 1)
        gray = _blend(gray, inside, 92.0 + 26.0 * _cloud(gray.shape, 9, rng))
        gray = _blend(gray, view.soft(-0.40 * rx, -0.08, 0.34 * rx, 0.48 * ry), 152.0)
        gray = _blend(gray, view.soft(0.52 * rx, 0.02, 0.15 * rx, 0.30 * ry), 148.0)
        for side in (-1, 1):
            gray = _blend(gray, view.soft(side * 0.30, 0.24, 0.10, 0.13), 172.0)
    gray = _blend(gray, view.soft(0.0, 0.60 * ry, 0.15, 0.14), 246.0)
    return _blend(gray, view.soft(0.09, 0.36 * ry, 0.06, 0.06), 185.0)


def _draw_mri(view: _View, variant: str, rng: Generator) -> Field:
    scalp, white, cortex, fluid = _MRI_GRAYS[variant]
    rx, ry = rng.uniform(0.82, 0.88), rng.uniform(0.92, 0.98)
    head = view.ellipse(0, 0, rx, ry)
    gray = np.full(head.shape, 4.0, dtype=np.float32)
    gray = _blend(gray, np.clip((1 - head) * 20, 0, 1), scalp)
    gray = _blend(gray, np.clip((0.90 - head) * 20, 0, 1), 20.0)
    brain = np.clip((0.80 - head) * 16, 0, 1)
    gray = _blend(gray, brain, cortex)
    folds = _cloud(gray.shape, 17, rng)
    gray = _blend(gray, np.clip((0.56 + 0.13 * folds - head) * 10, 0, 1), white)
    sulci = np.clip(1.3 - 9 * np.abs(folds), 0, 1) * np.clip((head - 0.42) * 6, 0, 1) * brain
    gray = _blend(gray, sulci * 0.8, fluid)
    gray = _blend(gray, brain * np.clip(1.4 - 80 * np.abs(view.x), 0, 1) * (np.abs(view.y) > 0.3), fluid)
    spread, length = rng.uniform(0.07, 0.10), rng.uniform(0.20, 0.30)
    for side in (-1, 1):
        slanted = _View(view.x - side * 0.35 * np.abs(view.y), view.y)
        gray = _blend(gray, slanted.soft(side * spread, 0.0, 0.06, length), fluid)
        gray = _blend(gray, view.soft(side * 0.26, 0.02, 0.08, 0.14, 2), cortex)
    return gray * (1.0 + 0.06 * _cloud(gray.shape, 3, rng))


def _draw_xray(view: _View, variant: str, rng: Generator) -> Field:
    distance = np.abs(view.x)
    gray = 158.0 - 16.0 * view.y + 4.0 * _cloud(np.broadcast_shapes(view.x.shape, view.y.shape), 4, rng)
    gray = _blend(gray, np.clip((distance - 0.92 - 0.12 * view.y) * 5, 0, 1), 74.0)
    height = rng.uniform(0.66, 0.74)
    for side in (-1, 1):
        lung = view.soft(side * 0.44, -0.06, 0.36, height, 2.5)
        gray = _blend(gray, lung, 66.0 + 10.0 * _cloud(gray.shape, 10, rng))
    phase = (view.y + 0.38 * distance**2 - 0.22 * distance) * rng.uniform(5.5, 6.5)
    ribs = np.clip((np.cos(phase * 1.24 * math.pi) - 0.45) * 3, 0, 1)
    gray = gray + 30.0 * ribs * np.clip((0.9 - distance) * 8, 0, 1) * (np.abs(view.y + 0.1) < 0.7)
    gray = _blend(gray, np.clip((0.17 - distance) * 8, 0, 1) * 0.9, 212.0)
    gray = _blend(gray, view.soft(0.16, 0.34, rng.uniform(0.36, 0.44), 0.28, 2), 216.0)
    dome = rng.uniform(0.46, 0.56) + 0.5 * (distance - 0.42) ** 2
    gray = _blend(gray, np.clip((view.y - dome) * 8, 0, 1) * np.clip((0.95 - distance) * 6, 0, 1), 206.0)
    collar = np.clip(1 - np.abs(view.y + 0.66 + 0.25 * distance) * 18, 0, 1)
    return gray + 42.0 * collar * np.clip((0.75 - distance) * 8, 0, 1)


def _draw_ultrasound(view: _View, variant: str, rng: Generator) -> Field:
    half_angle = rng.uniform(0.64, 0.74) if variant == "wide" else rng.uniform(0.48, 0.54)
    apex = -1.02 if variant == "wide" else -1.15
    radius, angle = np.hypot(view.x, view.y - apex), np.arctan2(view.x, view.y - apex)
    fan = np.clip((half_angle - np.abs(angle)) * 60, 0, 1)
    fan = fan * np.clip((radius - 0.28) * 40, 0, 1) * np.clip((1.86 - radius) * 40, 0, 1)
    height, width = radius.shape
    tissue = np.clip(0.75 + 0.35 * _cloud(radius.shape, 6, rng), 0.15, 2.0) * np.exp(-0.45 * radius)
    for _ in range(int(rng.integers(2, 5))):
        depth, tilt = rng.uniform(0.45, 1.5), rng.uniform(-0.15, 0.15)
        wall = np.exp(-(((radius - depth - tilt * angle) / 0.018) ** 2))
        tissue = tissue + 0.9 * math.exp(-0.5 * depth) * wall
    grain = rng.standard_normal((2, height // 2, width // 3), dtype=np.float32)
    speckle = Image.fromarray(np.hypot(grain[0], grain[1])).resize((width, height), Image.Resampling.BILINEAR)
    return np.clip(105.0 * tissue * np.asarray(speckle), 0, 255) * fan


_GRAY_DRAWERS: dict[str, Callable[[_View, str, Generator], Field]] = {
    "CT": _draw_ct,
    "MRI": _draw_mri,
    "X-ray": _draw_xray,
    "ultrasound": _draw_ultrasound,
}


def _draw_histology(panel: Panel, rng: Generator) -> Image.Image:
    width, height = panel.size
    pink, deep = np.array([236, 186, 214], np.float32), np.array([206, 122, 176], np.float32)
    mix = np.clip(0.5 + 0.3 * _cloud((height, width), 9, rng) + 0.2 * _cloud((height, width), 48, rng), 0, 1)
    image = Image.fromarray((pink + (deep - pink) * mix[..., None]).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    scale = rng.uniform(0.8, 1.3)
    room = (230 if panel.variant == "dense" else 1500) * scale**2
    _draw_nuclei(draw, rng.uniform(0, panel.size, size=(int(width * height / room), 2)), scale, rng)
    if panel.variant == "gland":
        for _ in range(int(width * height / 26000)):
            _draw_gland(draw, panel.size, scale, rng)
    return image.filter(ImageFilter.GaussianBlur(0.8))


def _draw_nuclei(draw: ImageDraw.ImageDraw, centers: NDArray, scale: float, rng: Generator) -> None:
    """Draw a purple nucleus at each of the `centers`, (N, 2) in pixels."""
    radii = rng.uniform(2.6, 5.2, size=centers.shape) * scale
    tints = rng.integers(-18, 19, size=len(centers))
    for (x, y), (rx, ry), tint in zip(centers.tolist(), radii.tolist(), tints.tolist(), strict=True):
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=(96 + tint, 62 + tint, 142 + tint))


def _draw_gland(draw: ImageDraw.ImageDraw, size: tuple[int, int], scale: float, rng: Generator) -> None:
    """Draw a gland: a pale lumen, its wall, and a ring of nuclei."""
    x, y = rng.uniform(0.1, 0.9, size=2) * size
    rx, ry = rng.uniform(26, 48, size=2) * scale
    for grow, color in ((15 * scale, (196, 128, 190)), (0.0, (247, 240, 246))):
        draw.ellipse((x - rx - grow, y - ry - grow, x + rx + grow, y + ry + grow), fill=color)
    angle = np.linspace(0, 2 * math.pi, int((rx + ry) / 3 / scale), endpoint=False)
    ring = np.stack([(rx + 9 * scale) * np.cos(angle) + x, (ry + 9 * scale) * np.sin(angle) + y], axis=1)
    _draw_nuclei(draw, ring + rng.normal(0, 1.2 * scale, size=ring.shape), scale, rng)


_CHART_COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189))


def _draw_chart(panel: Panel, rng: Generator) -> Image.Image:
    width, height = panel.size
    image = Image.new("RGB", panel.size, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(max(11, height // 28))
    left, top, right, bottom = int(width * 0.14), int(height * 0.14), int(width * 0.95), int(height * 0.86)
    for tick in range(6):
        y = bottom - (bottom - top) * tick // 5
        draw.line((left, y, right, y), fill=(225, 225, 225))
        draw.text((left - 6, y), str(20 * tick), fill="black", font=font, anchor="rm")
    draw.line((left, top, left, bottom, right, bottom), fill="black", width=2)
    points = int(rng.integers(4, 8))
    xs = (left + (right - left) / points * (np.arange(points) + 0.5)).tolist()
    for index, x in enumerate(xs):
        draw.text((x, bottom + 6), str(index + 1), fill="black", font=font, anchor="ma")
    colors = [_CHART_COLORS[index] for index in rng.permutation(len(_CHART_COLORS))]
    if panel.variant == "bar":
        ys = bottom - (bottom - top) * rng.uniform(0.15, 0.95, size=points)
        half_bar = 0.32 * (right - left) / points
        for index, (x, y) in enumerate(zip(xs, ys.tolist(), strict=True)):
            draw.rectangle((x - half_bar, y, x + half_bar, bottom), fill=colors[index % 2], outline="black")
            draw.line((x, y - 14, x, y), fill="black", width=2)
        return image
    for color in colors[: int(rng.integers(2, 4))]:
        levels = np.cumsum(rng.normal(0.04, 0.13, size=points)) + rng.uniform(0.2, 0.7)
        ys = bottom - (bottom - top) * np.clip(levels, 0.04, 0.97)
        line = list(zip(xs, ys.tolist(), strict=True))
        draw.line(line, fill=color, width=4)
        for x, y in line:
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=color)
    return image


def _draw_arrow(image: Image.Image, finding: Finding, color: str) -> None:
    """Draw an arrow with its tip at the finding and its tail away from the vertical center line."""
    width, height = image.size
    half = min(width, height) / 2
    tip = np.array([width / 2 + finding.x * half, height / 2 + finding.y * half])
    back = np.array([math.copysign(0.86, finding.x), 0.5])
    across = np.array([-back[1], back[0]])
    length = 0.30 * half
    shape = [(0, 0), (0.42, 0.24), (0.42, 0.09), (1, 0.09), (1, -0.09), (0.42, -0.09), (0.42, -0.24)]
    outline = [tuple((tip + length * (along * back + aside * across)).tolist()) for along, aside in shape]
    ImageDraw.Draw(image).polygon(outline, fill=color, outline="white" if color == "black" else "black")

"""Built-in examples of the demo: synthetic figures with questions, drawn when first shown."""

import io
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from internvl_chat.data.synthetic.figures import MIN_FIGURES, Figure, plan_figures
from internvl_chat.data.synthetic.panels import draw_figure

_SEED = 3


@dataclass(frozen=True)
class Example:
    """A question about a figure, some of its panels, or both.

    Attributes:
        panels: indices of the panels that are shown as separate images.
        whole: whether the whole figure is shown, before the panels.
    """

    title: str
    question: str
    figure: Figure
    panels: tuple[int, ...] = ()
    whole: bool = True

    @property
    def num_images(self) -> int:
        """Number of images."""
        return self.whole + len(self.panels)


_FIGURES = plan_figures(MIN_FIGURES, 1, np.random.default_rng(_SEED))
EXAMPLES = (
    Example("A compound figure", "What do the panels of this figure show?", _FIGURES[3]),
    Example(
        "Several panels",
        "Which of Fig-0, Fig-1 and Fig-2 show the same imaging modality?",
        _FIGURES[5],
        panels=(1, 2, 4),
        whole=False,
    ),
    Example(
        "A figure and two of its panels",
        "Where in the compound image Fig-0 is Fig-1 relative to Fig-2?",
        _FIGURES[0],
        panels=(4, 1),
    ),
)


@cache
def example_image(number: int, index: int) -> bytes:
    """Return an image of an example as JPEG.

    Raises:
        IndexError: there is no such image.
    """
    example, figure = EXAMPLES[number], _drawn(number)
    crops = [figure.crop(example.figure.panels[panel].box) for panel in example.panels]
    with io.BytesIO() as buffer:
        [*[figure] * example.whole, *crops][index].save(buffer, "JPEG", quality=90)
        return buffer.getvalue()


@cache
def _drawn(number: int) -> Image.Image:
    return draw_figure(EXAMPLES[number].figure, np.random.default_rng((_SEED, number)))

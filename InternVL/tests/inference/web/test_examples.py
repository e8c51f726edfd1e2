"""The built-in examples: drawn deterministically, with the images that their questions name."""

import io

import pytest
from PIL import Image

from internvl_chat.inference.web.examples import EXAMPLES, example_image


def opened(number: int, index: int) -> Image.Image:
    return Image.open(io.BytesIO(example_image(number, index)))


def test_images():
    for number, example in enumerate(EXAMPLES):
        sizes = [opened(number, index).size for index in range(example.num_images)]
        panels = [example.figure.panels[index].size for index in example.panels]
        assert sizes == [example.figure.size] * example.whole + panels
        for name in ("Fig-0", "Fig-1", "Fig-2"):
            assert name not in example.question or int(name[-1]) < example.num_images
        with pytest.raises(IndexError):
            example_image(number, example.num_images)


def test_the_questions_have_answers():
    kinds = [[example.figure.panels[index].kind for index in example.panels] for example in EXAMPLES]
    assert len({panel.kind for panel in EXAMPLES[0].figure.panels}) == 5
    assert sorted(kinds[1]) == ["CT", "MRI", "MRI"]
    first, second = (EXAMPLES[2].figure.panels[index].box for index in EXAMPLES[2].panels)
    assert first[1] >= second[3]  # below

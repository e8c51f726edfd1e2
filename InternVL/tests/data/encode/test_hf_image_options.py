"""Image options in transformers' processor files: limits, statistics, size, and unsupported settings."""

import json

import pytest
from transformers import GotOcr2ImageProcessor

from internvl_chat.data.encode.hf_image_options import read_image_options
from internvl_chat.data.encode.hf_processor import image_processor_settings
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.utils.errors import ModelError

OURS = image_processor_settings(Preprocessing(tile_size=56, min_dynamic_patch=2, max_dynamic_patch=5))


def write(folder, *, nested=False, processor=None, **changes):
    """Write the files of an export with changed settings; None removes a setting."""
    settings = {name: value for name, value in {**OURS, **changes}.items() if value is not None}
    processor = processor or {}
    if nested:
        processor |= {"image_processor": settings}
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize("nested", [False, True])
def test_both_layouts(tmp_path, nested):
    write(tmp_path, nested=nested, processor={"image_seq_length": 4})
    name = "processor_config.json" if nested else "preprocessor_config.json"
    expected = {"min_dynamic_patch": 2, "max_dynamic_patch": 5, "tile_size": 56, "normalize_type": "imagenet"}
    assert read_image_options(tmp_path) == (tmp_path / name, {**expected, "tokens_per_tile": 4})


def test_files_that_transformers_saves(tmp_path):
    GotOcr2ImageProcessor(max_patches=3, size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    _, options = read_image_options(tmp_path)
    assert (options["min_dynamic_patch"], options["max_dynamic_patch"], options["tile_size"]) == (1, 3, 28)
    assert options["normalize_type"] == "clip"  # the default of the class


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_patches": 1, "min_patches": 1}, {"min_dynamic_patch": 1, "max_dynamic_patch": 1}),
        ({"max_patches": None, "min_patches": None}, {"min_dynamic_patch": 1, "max_dynamic_patch": 12}),
        ({"image_processor_type": "GotOcr2ImageProcessorFast"}, {"max_dynamic_patch": 5}),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, {"normalize_type": "siglip"}),
        ({"image_mean": 0.5, "image_std": 0.5}, {"normalize_type": "siglip"}),
        ({"size": 28}, {"tile_size": 28}),
        ({"use_thumbnail": False}, {"use_thumbnail": False}),
        ({"crop_to_patches": False}, {"max_dynamic_patch": 5}),  # transformers' processor overrides it
    ],
)
def test_settings(tmp_path, changes, expected):
    _, options = read_image_options(write(tmp_path, **changes))
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 2}, "resample is 2; only 3 is supported"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"do_resize": False}, "do_resize is False"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0; only 1/255"),
        ({"size": {"height": 56, "width": 28}}, "tiles must be square"),
        ({"size": {"shortest_edge": 56}}, "tiles must be square"),
        ({"image_mean": [0.1, 0.2, 0.3]}, "only those of imagenet, clip, siglip are supported"),
        ({"image_mean": "x"}, "only those of imagenet, clip, siglip are supported"),
        ({"max_patches": "6"}, "max_patches is '6'; it must be an integer"),
        ({"resample": 0, "max_patches": 2.5}, "2 problems"),
    ],
)
def test_unsupported_settings_are_rejected(tmp_path, changes, message):
    with pytest.raises(ModelError, match=r"preprocessor_config\.json: ") as caught:
        read_image_options(write(tmp_path, **changes))
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", "3"])
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_malformed_files(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=name):
        read_image_options(tmp_path)


def test_folders_without_such_settings(tmp_path):
    assert read_image_options(tmp_path) is None
    reference = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 448, "image_mean": [0.485] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(reference))
    assert read_image_options(tmp_path) is None

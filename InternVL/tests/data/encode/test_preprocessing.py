"""Preprocessing options: saving, loading, deriving from the model, and validation."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.utils.errors import ModelError

OTHER = {
    "template": "internvl2_5",
    "system_text": '说 "a"\n',
    "tile_size": 56,
    "tokens_per_tile": 4,
    "min_dynamic_patch": 2,
    "max_dynamic_patch": 6,
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "pad2square": True,
    "normalize_type": "siglip",
    "max_seq_length": 99,
    "image_background": "white",
    "exif_transpose": True,
    "escape_control_tokens": True,
}


def model_config(**changes) -> SimpleNamespace:
    """Return the relevant fields of a model's configuration."""
    values = {
        "template": "internvl2_5",
        "image_size": 56,
        "tokens_per_tile": 4,
        "min_dynamic_patch": 2,
        "max_dynamic_patch": 6,
        "dynamic_image_size": True,
        "use_thumbnail": False,
        "pad2square": True,
    }
    return SimpleNamespace(**{**values, **changes})


def write(folder, content) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "preprocessing.json").write_text(text, encoding="utf-8")


def test_save_and_load(tmp_path):
    assert {field.name for field in dataclasses.fields(Preprocessing)} == set(OTHER)
    options = Preprocessing(**OTHER)
    options.save(tmp_path)
    assert Preprocessing.from_folder(tmp_path, model_config()) == options


def test_file_is_json_with_unescaped_text(tmp_path):
    Preprocessing(**OTHER).save(tmp_path)
    text = (tmp_path / "preprocessing.json").read_text(encoding="utf-8")
    assert json.loads(text) == OTHER
    assert "说" in text


def test_defaults_are_those_of_the_reference():
    options = Preprocessing()
    assert (options.tile_size, options.tokens_per_tile, options.max_seq_length) == (448, 256, 8192)
    assert (options.dynamic_image_size, options.use_thumbnail, options.pad2square) == (True, True, False)
    assert (options.template, options.normalize_type) == ("internvl2_5", "imagenet")


def test_missing_options_have_default_values(tmp_path):
    write(tmp_path, {"tile_size": 56, "tokens_per_tile": 4})
    assert Preprocessing.from_folder(tmp_path, model_config()) == Preprocessing(
        tile_size=56, tokens_per_tile=4
    )


def test_derived_from_the_model_without_a_file(tmp_path):
    derived = Preprocessing.from_folder(tmp_path, model_config())
    assert derived == Preprocessing.from_model_config(model_config())
    assert (derived.tile_size, derived.tokens_per_tile) == (56, 4)
    assert (derived.min_dynamic_patch, derived.max_dynamic_patch) == (2, 6)
    assert (derived.dynamic_image_size, derived.use_thumbnail, derived.pad2square) == (True, False, True)
    assert derived.system_text.startswith("你是书生·万象")


@pytest.mark.parametrize("template", [None, ""])
def test_default_template(template):
    assert Preprocessing.from_model_config(model_config(template=template)).template == "internvl2_5"


def test_unknown_template():
    with pytest.raises(
        ModelError, match=r"unknown conversation template 'vicuna'; choose one of internvl2_5"
    ):
        Preprocessing.from_model_config(model_config(template="vicuna"))


def test_unknown_normalize_type():
    with pytest.raises(
        ModelError, match=r"unknown normalize_type 'inception'; choose one of imagenet, clip, siglip"
    ):
        Preprocessing(normalize_type="inception")


@pytest.mark.parametrize(("fewest", "most"), [(0, 6), (7, 6), (-1, 1), (1, 0)])
def test_invalid_tile_limits(fewest, most):
    with pytest.raises(ModelError, match=rf"min_dynamic_patch {fewest} must be .* max_dynamic_patch {most}"):
        Preprocessing(min_dynamic_patch=fewest, max_dynamic_patch=most)


@pytest.mark.parametrize("content", ["{", "", "[1, 2]", '{"tile": 448}', "3", '{"max_dynamic_patch": "6"}'])
def test_malformed_file(tmp_path, content):
    write(tmp_path, content)
    with pytest.raises(ModelError, match=r"preprocessing\.json: malformed: "):
        Preprocessing.from_folder(tmp_path, model_config())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dynamic_image_size", "false"), ("exif_transpose", "False"), ("use_thumbnail", 1),
        ("pad2square", None),
        ("max_dynamic_patch", 4.0), ("max_dynamic_patch", True), ("max_seq_length", "99"),
        ("system_text", None),
    ],
)  # fmt: skip
def test_values_of_another_type(tmp_path, option, value):
    write(tmp_path, {**OTHER, option: value})
    with pytest.raises(
        ModelError, match=rf"preprocessing\.json: malformed: {option} must be .*, found {value!r}"
    ):
        Preprocessing.from_folder(tmp_path, model_config())


def test_file_of_another_model(tmp_path):
    write(tmp_path, {**OTHER, "tokens_per_tile": 256})
    with pytest.raises(
        ModelError, match=r"preprocessing\.json: tokens_per_tile is 256, but 4 in the model's configuration"
    ):
        Preprocessing.from_folder(tmp_path, model_config())


def write_processor(folder, **changes) -> None:
    settings = {"image_processor_type": "GotOcr2ImageProcessor", "max_patches": 1, "size": 56,
                "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | changes))
    (folder / "processor_config.json").write_text('{"image_seq_length": 4}')


def test_processor_files_of_transformers_are_the_fallback(tmp_path):
    write_processor(tmp_path)
    options = Preprocessing.from_folder(tmp_path, model_config())
    assert (options.min_dynamic_patch, options.max_dynamic_patch, options.normalize_type) == (1, 1, "siglip")
    assert options.template == "internvl2_5" and not options.use_thumbnail  # from the model
    assert Preprocessing.from_folder(tmp_path, model_config(), max_dynamic_patch=3).max_dynamic_patch == 3
    write(tmp_path, OTHER)
    assert Preprocessing.from_folder(tmp_path, model_config()).max_dynamic_patch == OTHER["max_dynamic_patch"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 28}, "tile_size is 28, but 56 in the model's configuration"),
        ({"min_patches": 3}, "min_dynamic_patch 3 must be from 1 to max_dynamic_patch 1"),
        ({"max_patches": 1000}, "max_dynamic_patch 1000 must be at most 100"),
    ],
)
def test_processor_files_of_another_model(tmp_path, changes, message):
    write_processor(tmp_path, **changes)
    with pytest.raises(ModelError, match=rf"preprocessor_config\.json: {message}"):
        Preprocessing.from_folder(tmp_path, model_config())


class TestTileLimit:
    def test_other_options_are_unchanged(self):
        options = Preprocessing(**OTHER)
        assert options.with_tile_limit(3) == dataclasses.replace(options, max_dynamic_patch=3)

    def test_below_the_minimum(self):
        limited = Preprocessing(max_dynamic_patch=6, min_dynamic_patch=4).with_tile_limit(2)
        assert (limited.min_dynamic_patch, limited.max_dynamic_patch) == (2, 2)

    @pytest.mark.parametrize("limit", [None, 4])
    def test_unchanged(self, limit):
        options = Preprocessing(max_dynamic_patch=4)
        assert options.with_tile_limit(limit) == options

    @pytest.mark.parametrize("saved", [True, False])
    def test_replaces_the_limit_of_the_checkpoint(self, tmp_path, saved):
        options = Preprocessing.from_model_config(model_config())
        if saved:
            options.save(tmp_path)
        limited = Preprocessing.from_folder(tmp_path, model_config(), max_dynamic_patch=1)
        assert limited == dataclasses.replace(options, min_dynamic_patch=1, max_dynamic_patch=1)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Preprocessing().tile_size = 1


def test_options_of_the_command_line():
    options = Preprocessing()
    assert options.with_options(image_background=None, exif_transpose=None) == options
    changed = options.with_options(image_background="white", exif_transpose=True, max_seq_length=None)
    assert changed == dataclasses.replace(options, image_background="white", exif_transpose=True)
    assert changed.image_options == ("white", True)


def test_unknown_background():
    with pytest.raises(ModelError, match="unknown image_background 'pink'; choose one of none, white, black"):
        Preprocessing(image_background="pink")

"""The settings that travel with a checkpoint: saved, read back, derived, refused where they do not fit."""

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
}


def model_config(**changes) -> SimpleNamespace:
    """What is read of a model's configuration."""
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


def test_saved_and_read_back(tmp_path):
    assert {field.name for field in dataclasses.fields(Preprocessing)} == set(OTHER)
    saved = Preprocessing(**OTHER)
    saved.save(tmp_path)
    assert Preprocessing.from_folder(tmp_path, model_config()) == saved


def test_the_file_is_plain_json_with_readable_text(tmp_path):
    Preprocessing(**OTHER).save(tmp_path)
    text = (tmp_path / "preprocessing.json").read_text(encoding="utf-8")
    assert json.loads(text) == OTHER
    assert "说" in text


def test_the_defaults_are_the_references():
    made = Preprocessing()
    assert (made.tile_size, made.tokens_per_tile, made.max_seq_length) == (448, 256, 8192)
    assert (made.dynamic_image_size, made.use_thumbnail, made.pad2square) == (True, True, False)
    assert (made.template, made.normalize_type) == ("internvl2_5", "imagenet")


def test_settings_that_are_left_out_are_the_defaults(tmp_path):
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
def test_a_model_without_a_template_gets_the_default(template):
    assert Preprocessing.from_model_config(model_config(template=template)).template == "internvl2_5"


def test_unknown_template():
    with pytest.raises(ModelError, match=r"'vicuna' is unknown; known are internvl2_5"):
        Preprocessing.from_model_config(model_config(template="vicuna"))


def test_unknown_statistics():
    with pytest.raises(ModelError, match=r"'inception' is unknown; known are imagenet, clip, siglip"):
        Preprocessing(normalize_type="inception")


@pytest.mark.parametrize(("fewest", "most"), [(0, 6), (7, 6), (-1, 1), (1, 0)])
def test_impossible_tile_limits(fewest, most):
    with pytest.raises(ModelError, match=rf"min_dynamic_patch {fewest} must be .* max_dynamic_patch {most}"):
        Preprocessing(min_dynamic_patch=fewest, max_dynamic_patch=most)


@pytest.mark.parametrize("content", ["{", "", "[1, 2]", '{"tile": 448}', "3", '{"max_dynamic_patch": "6"}'])
def test_malformed_file_is_named(tmp_path, content):
    write(tmp_path, content)
    with pytest.raises(ModelError, match=r"preprocessing\.json: malformed: "):
        Preprocessing.from_folder(tmp_path, model_config())


def test_file_of_another_model(tmp_path):
    write(tmp_path, {**OTHER, "tokens_per_tile": 256})
    with pytest.raises(ModelError, match=r"preprocessing\.json: 256 tokens a tile, but the model makes 4"):
        Preprocessing.from_folder(tmp_path, model_config())


def test_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Preprocessing().tile_size = 1

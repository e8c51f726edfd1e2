"""Setup: preprocessing before and after loading the weights, and files copied from the base model."""

import argparse
import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
from helpers import flags
from safetensors.torch import save_file

from internvl_chat.commands.common import add_data_root
from internvl_chat.convert.export import export_hf
from internvl_chat.convert.merge import merge
from internvl_chat.data.encode.preprocessing import PREPROCESSING_FILE, Preprocessing
from internvl_chat.model.io.weights import open_weights
from internvl_chat.train.arguments import parse_arguments
from internvl_chat.train.checkpoint.fingerprint import fingerprint
from internvl_chat.train.checks import check_configuration
from internvl_chat.train.internvl_chat_finetune import main as train
from internvl_chat.train.setup import load_encoder, load_for_training, load_records
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import ModelError, TrainingError
from internvl_chat.utils.paths import REPOSITORY, data_root

LORA = {"use_llm_lora": 2, "freeze_llm": True, "freeze_mlp": True}


@pytest.fixture
def plan_of(tiny_model, sample_data, tmp_path):
    def plan_of(**values):
        values = {"model_name_or_path": tiny_model, "meta_path": sample_data / "train.json",
                  "output_dir": tmp_path / "new", **values}  # fmt: skip
        return check_configuration(parse_arguments(flags(**values)))

    return plan_of


def agree(plan) -> bool:
    encoder = load_encoder(plan)
    _, tokenizer, preprocessing = load_for_training(plan)
    limit = plan.config.data.max_dynamic_patch
    own = encoder.preprocessing.with_tile_limit(preprocessing.max_dynamic_patch)
    return (
        own == preprocessing
        and encoder.preprocessing.max_dynamic_patch == limit
        and encoder.tokenizer.get_vocab() == tokenizer.get_vocab()
    )


@pytest.mark.parametrize("values", [
    {}, {"force_image_size": 112}, {"max_dynamic_patch": 1}, {"max_dynamic_patch": 9, "min_dynamic_patch": 2},
    {"dynamic_image_size": False, "pad2square": True}, {"normalize_type": "clip", "max_seq_length": 99}, LORA,
    {"image_background": "white", "exif_transpose": True, "escape_control_tokens": True},
], ids=str)  # fmt: skip
def test_preprocessing_of_a_model(plan_of, values):
    assert agree(plan_of(**values))


def test_changed_tile_size_is_logged(plan_of, tiny_model, tmp_path, caplog):
    """Also for a base model without a preprocessing file, like the published models."""
    plain = shutil.copytree(
        tiny_model, tmp_path / "plain", ignore=shutil.ignore_patterns("preprocessing.json")
    )
    for folder in (tiny_model, plain):
        caplog.clear()
        load_for_training(plan_of(model_name_or_path=folder, force_image_size=112))
        [message] = [entry.message for entry in caplog.records if "--force_image_size" in entry.message]
        assert "56-pixel tiles of 4 tokens; this run uses 112-pixel tiles of 16 tokens" in message
    caplog.clear()
    load_for_training(plan_of(model_name_or_path=plain))
    assert not caplog.records


def test_changes_to_stored_preprocessing_are_logged(plan_of, tiny_model, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    export_hf(tiny_model, tmp_path / "hf")
    (tmp_path / "hf/preprocessing.json").unlink()
    shutil.rmtree(tmp_path / "hf/original")
    load_for_training(
        plan_of(model_name_or_path=tmp_path / "hf", normalize_type="siglip", max_dynamic_patch=3)
    )
    file = tmp_path / "hf/preprocessor_config.json"
    assert (
        f"normalize_type is 'siglip', but the checkpoint has 'imagenet' in {file} (set by --normalize_type)"
        in caplog.text
    )
    assert f"max_dynamic_patch is 3, but the checkpoint has 12 in {file}" in caplog.text


def test_differences_from_the_checkpoint_are_warnings(plan_of, tiny_model, tmp_path, caplog):
    """Flags that are not given have their defaults, not the values of the checkpoint."""
    first = shutil.copytree(tiny_model, tmp_path / "first")
    stored = Preprocessing.read(first / PREPROCESSING_FILE)
    stored = dataclasses.replace(
        stored, min_dynamic_patch=2, max_dynamic_patch=3, image_background="white", exif_transpose=True,
        escape_control_tokens=True, max_seq_length=99,
    )  # fmt: skip
    stored.save(first)
    changes = {"dynamic_image_size": False, "use_thumbnail": False, "pad2square": True}
    load_for_training(plan_of(model_name_or_path=first, **changes))
    warned = {e.message.split()[0]: e for e in caplog.records if e.levelno == logging.WARNING}
    options = {"min_dynamic_patch", "image_background", "exif_transpose", "escape_control_tokens"}
    assert set(warned) == {*changes, *options}
    assert "is 'none', but the checkpoint has 'white' in" in warned["image_background"].message
    caplog.clear()
    (first / PREPROCESSING_FILE).unlink()
    load_for_training(plan_of(model_name_or_path=first, **changes))
    assert {entry.message.split()[0] for entry in caplog.records} == set(changes)


@pytest.mark.parametrize(
    ("splits", "text"), [(True, "at most 6 tiles each"), (False, "one tile per image")], ids=str
)
def test_tile_limit_in_the_data_log(plan_of, caplog, splits, text):
    caplog.set_level(logging.INFO)
    plan = plan_of(dynamic_image_size=splits)
    load_records(plan.config, plan.specs, load_encoder(plan))
    assert text in caplog.text


def test_extra_files_of_the_base_are_kept(tiny_model, sample_data, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    extra = {"LICENSE": "Apache", "processor_config.json": "{}", "thresholds.csv": "1,2", "NOTICE.txt": "by"}
    for name, text in extra.items():
        (base / name).write_text(text)
    values = {"model_name_or_path": base, "meta_path": sample_data / "train.json", **LORA}
    assert train(flags(**values, output_dir=tmp_path / "run", max_steps=1, save_steps=1)) == 0
    merge(tmp_path / "run", tmp_path / "merged")
    export_hf(tmp_path / "merged", tmp_path / "hf")
    for name, text in extra.items():
        for folder in ("run", "run/checkpoint-1", "merged", "hf/original"):
            assert (tmp_path / folder / name).read_text() == text, (folder, name)
        if name != "processor_config.json":  # the export has its own
            assert (tmp_path / "hf" / name).read_text() == text
    merge(tmp_path / "hf", tmp_path / "back")
    assert {name: (tmp_path / "back" / name).read_text() for name in extra} == extra
    again = flags(**values, output_dir=tmp_path / "run", max_steps=1, save_steps=1, overwrite_output_dir=True)
    assert train(again) == 0


def test_preprocessing_of_an_assembled_model(plan_of, tiny_model, tmp_path):
    vision, llm = tmp_path / "vision", tmp_path / "llm"
    config = json.loads((tiny_model / "config.json").read_text())
    weights = {name: read() for name, read in open_weights(tiny_model / "model.safetensors").items()}
    for folder, part, key in (
        (vision, "vision_model.", "vision_config"),
        (llm, "language_model.", "llm_config"),
    ):
        shutil.copytree(tiny_model, folder)
        (folder / "config.json").write_text(json.dumps(config[key]))
        own = {n.removeprefix(part): w for n, w in weights.items() if n.startswith(part)}
        save_file(own, folder / "model.safetensors")
    assert agree(plan_of(model_name_or_path=None, vision_path=vision, llm_path=llm))


def test_preprocessing_of_adapters_and_of_a_resumed_run(plan_of, tiny_model, sample_data, tmp_path):
    values = {"model_name_or_path": tiny_model, "meta_path": sample_data / "train.json",
              "output_dir": tmp_path / "run", **LORA}  # fmt: skip
    assert train(flags(**values, max_steps=2, save_strategy="steps", save_steps=1)) == 0
    assert agree(plan_of(model_name_or_path=tmp_path / "run", **LORA))
    (tmp_path / "run/train_results.json").unlink()
    plan = plan_of(output_dir=tmp_path / "run", max_steps=2, **LORA)
    assert plan.output.resume
    assert agree(plan)


def test_reading_options_are_part_of_the_run(plan_of):
    values = {"image_background": "white", "exif_transpose": True, "escape_control_tokens": True}
    plan = plan_of(**values)
    preprocessing = load_encoder(plan).preprocessing
    assert {name: getattr(preprocessing, name) for name in values} == values
    assert values.items() <= fingerprint(plan.config).items()


def test_annotation_file_instead_of_a_meta_file(plan_of, sample_data):
    file = next((sample_data / "train").glob("*.jsonl"))
    [spec] = plan_of(meta_path=file, image_root=sample_data / "images").specs
    assert (spec.annotation, spec.root) == (file, sample_data / "images")
    with pytest.raises(ModelError, match="an annotation file, not a meta file; add --image_root"):
        plan_of(meta_path=file)


def test_nodes_with_different_annotation_files(plan_of, monkeypatch):
    """On the first rank of each node, the files are compared with those of rank 0."""
    plan = plan_of()
    encoder = load_encoder(plan)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    load_records(plan.config, plan.specs, encoder)
    check = distributed.run_on_rank_0

    def check_elsewhere(function):
        lengths, excluded, (first, *others), *images = check(function)
        return lengths, excluded, ["0" * len(first), *others], *images

    monkeypatch.setattr(distributed, "run_on_rank_0", check_elsewhere)
    message = f"{plan.specs[0].annotation}: differs from the file on the node of rank 0"
    with pytest.raises(TrainingError, match=re.escape(message)):
        load_records(plan.config, plan.specs, encoder)


def test_flags_without_effect_are_warned_about(plan_of, caplog):
    plan_of()
    assert not [entry for entry in caplog.records if entry.levelno == logging.WARNING]
    plan_of(train_sampling_strategy="group_by_length", max_seq_length=32769, lr_scheduler_type="constant",
            warmup_steps=2)  # fmt: skip
    assert [entry.message.split()[0] for entry in caplog.records] == [
        "--warmup_steps", "--train_sampling_strategy", "--max_seq_length",
    ]  # fmt: skip
    assert "supports 32768 positions" in caplog.text


def test_data_root_of_the_environment(plan_of, sample_data, tmp_path, monkeypatch):
    """It is the default of training, of the commands and of the API, as in the launchers."""
    entry = {"root": "images", "annotation": "records.jsonl"}
    for folder in ("other", "meta"):
        (tmp_path / folder / "images").mkdir(parents=True)
        shutil.copy(next((sample_data / "train").glob("*.jsonl")), tmp_path / folder / "records.jsonl")
    meta = tmp_path / "meta/meta.json"
    meta.write_text(json.dumps({"a": entry}))
    for value, folder in ((str(tmp_path / "other"), "other"), ("", "meta")):
        monkeypatch.setenv("DATA_ROOT", value)
        [spec] = plan_of(meta_path=meta).specs
        assert spec.annotation == tmp_path / folder / "records.jsonl"
        parser = argparse.ArgumentParser()
        add_data_root(parser)
        assert parser.parse_args([]).data_root == data_root() == (Path(value) if value else REPOSITORY)

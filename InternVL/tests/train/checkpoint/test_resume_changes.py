"""Differences between a run and the checkpoint it resumes from are rejected or allowed."""

import json

import pytest
from helpers import flags

from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.train.arguments import parse_arguments
from internvl_chat.train.checkpoint import resume_changes
from internvl_chat.train.checkpoint.fingerprint import (
    EVAL_IMAGES,
    EVAL_TILE_LIMITS,
    FINGERPRINT,
    IMAGES,
    DataState,
    fingerprint,
    fingerprint_run,
)
from internvl_chat.train.checkpoint.resume_changes import check_images, check_resume
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.files import write_json

DATA = {
    "a": {"size": 8, "digest": "a" * 64},
    "b": {"size": 8, "digest": "b" * 64, "max_dynamic_patch": 1},
}


def describe(data=DATA, eval_digest=None, eval_limit=None, **values):
    """Return the fingerprint of a run."""
    common = {"model_name_or_path": "m", "meta_path": "d", "output_dir": "o", "max_steps": 8,
              "gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}  # fmt: skip
    config = parse_arguments(flags(**common | values))
    hidden = ("size", "digest")
    specs = [
        DatasetSpec(name, "r", "a", **{key: v for key, v in entry.items() if key not in hidden})
        for name, entry in data.items()
    ]
    sizes, digests = ([entry[key] for entry in data.values()] for key in hidden)
    state = DataState(specs, sizes, digests, images=["i" * 64] * len(specs))
    eval_spec = DatasetSpec("e", "r", "a", max_dynamic_patch=eval_limit)
    eval_data = DataState([eval_spec], [2], [eval_digest], images=["i" * 64]) if eval_digest else None
    return fingerprint_run(config, state, eval_data)


@pytest.fixture
def checkpoint(tmp_path):
    def write(stored, step=4, optimizer=True):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        state = {"global_step": step, **({"optimizer": {}} if optimizer else {})}
        write_json(folder / "trainer_state.json", state)
        write_json(folder / FINGERPRINT, stored)
        return folder

    return write


def compare(checkpoint, current, allow=False):
    return check_resume(checkpoint, current, allow_changes=allow, rate=lambda: 0.25)


def changed(name, **values):
    return {**DATA, name: {**DATA[name], **values}}


def test_same_run(checkpoint):
    assert compare(checkpoint(describe()), describe()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "seed is 7, but the checkpoint has 42"),
        ({"gradient_accumulation_steps": 2}, "global batch size (records per step) is 2, but"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy is 'sequential'"),
        ({"use_data_resampling": True}, "use_data_resampling is True"),
        ({"data": dict(reversed(DATA.items()))}, "datasets is ['b', 'a'], but the checkpoint has ['a', 'b']"),
        ({"data": {"a": DATA["a"]}}, "datasets is ['a'], but the checkpoint has ['a', 'b']"),
        ({"data": DATA | {"c": DATA["a"]}}, "datasets is ['a', 'b', 'c'], but"),
        ({"data": {"a": DATA["a"], "z": DATA["b"]}}, "datasets is ['a', 'z'], but"),
        ({"data": changed("a", size=16, repeat_time=2)}, "repeat_time per dataset is {'a': 2}, but"),
        ({"data": changed("a", size=9)}, "records per dataset is [9, 8], but"),
        (
            {"data": changed("b", digest="c" * 64)},
            "file of b is 'cccccccccccc...', but the checkpoint has 'bbbbbbbbbbbb...'",
        ),
        ({"freeze_mlp": True}, "freeze_mlp is True"),
        ({"use_llm_lora": 4, "freeze_llm": True}, "use_llm_lora is 4, but the checkpoint has 0"),
        ({"unfreeze_vit_layers": -1}, "unfreeze_vit_layers is -1"),
        ({"optim": "adafactor"}, "optim is 'adafactor'"),
        ({"optim_args": "momentum=0.9"}, "optim_args is 'momentum=0.9', but the checkpoint has None"),
        ({"bf16": True}, "bf16 is True"),
        ({"force_image_size": 112}, "force_image_size is 112, but the checkpoint has 56"),
        ({"max_steps": 3}, "this run ends after step 3"),
    ],
)
def test_rejected_even_with_the_flag(checkpoint, change, message):
    folder = checkpoint(describe())
    for allow in (False, True):
        with pytest.raises(UsageError) as error:
            compare(folder, describe(**change), allow)
        assert message in str(error.value)
    assert f"cannot resume {folder}" in str(error.value)
    assert "allow_resume_changes" not in str(error.value)


RATE = "the learning rate follows the new schedule from step 5 on: 0.25"
READ = "records are read with the new value from step 5 on"
APPLIES = "takes effect from step 5 on"


@pytest.mark.parametrize(
    ("change", "shown", "effect"),
    [
        ({"max_steps": 20}, "total steps 8 -> 20", RATE),
        ({"max_steps": -1, "num_train_epochs": 3}, "total steps 8 -> 12", RATE),
        ({"warmup_steps": 4}, "warmup_steps 0.0 -> 4.0", RATE),
        ({"warmup_ratio": 0.5}, "warmup_steps 0.0 -> 0.5", RATE),
        ({"learning_rate": 0.5}, "learning_rate 0.001 -> 0.5", RATE),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type 'linear' -> 'cosine'", RATE),
        ({"lr_scheduler_kwargs": '{"power": 2}'}, "lr_scheduler_kwargs {} -> {'power': 2}", RATE),
        (
            {"data": changed("b", max_dynamic_patch=None)},
            "max_dynamic_patch per dataset {'b': 1} -> {'b': 6}", READ,
        ),
        ({"max_dynamic_patch": 4}, "max_dynamic_patch per dataset {'a': 6} -> {'a': 4}", READ),
        ({"data": changed("a", data_augment=True)}, "data_augment per dataset {'a': False} ->", READ),
        ({"max_seq_length": 99}, "max_seq_length 8192 -> 99", READ),
        ({"use_thumbnail": False}, "use_thumbnail True -> False", READ),
        ({"weight_decay": 0.1}, "weight_decay 0.0 -> 0.1", APPLIES),
        ({"adam_beta2": 0.95}, "adam_beta2 0.999 -> 0.95", APPLIES),
        ({"drop_path_rate": 0.1}, "drop_path_rate 0.0 -> 0.1", APPLIES),
        ({"loss_reduction": "token"}, "loss_reduction 'sample' -> 'token'", APPLIES),
    ],
)  # fmt: skip
def test_allowed_with_the_flag(checkpoint, change, shown, effect):
    folder = checkpoint(describe())
    with pytest.raises(UsageError, match="--allow_resume_changes True") as error:
        compare(folder, describe(**change))
    assert len(error.value.problems) == 1
    [line] = compare(folder, describe(**change), allow=True)
    assert line.startswith(shown) and line.endswith(effect)


@pytest.mark.parametrize("change", [
    {"num_train_epochs": 9}, {"data": changed("a", repeat_time=1.0)}, {"attn": "sdpa"}, {"logging_steps": 3},
    {"save_steps": 3},
    {"max_packed_tokens": 999}, {"dataloader_num_workers": 3}, {"parallel": "ddp"}, {"packing": False},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}, {"on_bad_record": "skip"},
    {"model_name_or_path": "elsewhere"}, {"data_root": "elsewhere"}, {"output_dir": "p"},
])  # fmt: skip
def test_harmless_changes(checkpoint, change):
    assert compare(checkpoint(describe()), describe(**change)) == []


def test_all_differences_at_once(checkpoint):
    change = {"seed": 1, "learning_rate": 1, "data": changed("a", data_augment=True), "max_steps": 9}
    folder = checkpoint(describe(), optimizer=False)
    with pytest.raises(UsageError) as error:
        compare(folder, describe(**change))
    assert len(error.value.problems) == 5
    assert "has no optimizer state (--save_only_model)" in str(error.value)
    with pytest.raises(UsageError) as error:
        compare(folder, describe(**change), allow=True)
    assert len(error.value.problems) == 1 and "seed" in str(error.value)


def test_checkpoint_without_optimizer_state(checkpoint):
    folder = checkpoint(describe(), optimizer=False)
    with pytest.raises(UsageError, match="as --model_name_or_path, or continue at step 5"):
        compare(folder, describe())
    [line] = compare(folder, describe(), allow=True)
    assert "moments start at zero in step 5" in line and line.endswith("follows the schedule: 0.25")


def test_validation_must_not_change_while_the_best_checkpoint_is_tracked(checkpoint):
    values = {"eval_strategy": "steps", "metric_for_best_model": "loss"}
    folder = checkpoint(describe(**values, eval_digest="e" * 64))
    assert compare(folder, describe(**values, eval_digest="e" * 64)) == []
    with pytest.raises(UsageError, match="measured differently"):
        compare(folder, describe(**values, eval_digest="f" * 64), allow=True)
    [line] = compare(folder, describe(), allow=True)
    assert line.startswith("choice of the best checkpoint")


def test_validation_images_and_tiles_must_not_change(checkpoint):
    own_limits = {name: {**entry, "max_dynamic_patch": 1} for name, entry in DATA.items()}
    values = {"eval_strategy": "steps", "metric_for_best_model": "loss", "eval_digest": "e" * 64,
              "data": own_limits}  # fmt: skip
    folder = checkpoint(describe(**values, eval_limit=4))
    assert compare(folder, describe(**values, eval_limit=4)) == []
    assert compare(folder, describe(**values, max_dynamic_patch=4)) == []  # the same limit, from the flag
    for change in ({"eval_limit": 1}, {"max_dynamic_patch": 1}):
        with pytest.raises(UsageError, match=r"per validation dataset is .* 1}, but.*measured differently"):
            compare(folder, describe(**values, **change), allow=True)
    images, same, other = {"a": "i" * 64}, {"e": "i" * 64}, {"e": "0" * 64}
    assert check_images(folder, images, same, allow_changes=False) == []
    with pytest.raises(UsageError, match=r"image files per validation dataset is .*measured differently"):
        check_images(folder, images, other, allow_changes=True)
    assert compare(folder, describe(own_limits, max_dynamic_patch=1), allow=True)  # no longer tracks the best


def test_validation_data_that_an_earlier_version_did_not_store(checkpoint):
    values = {"eval_strategy": "steps", "metric_for_best_model": "loss", "eval_digest": "e" * 64}
    stored = describe(**values)
    del stored[EVAL_TILE_LIMITS], stored[EVAL_IMAGES]
    [line] = compare(checkpoint(stored), describe(**values))
    assert f"did not store {EVAL_TILE_LIMITS}, {EVAL_IMAGES};" in line
    [line] = compare(checkpoint(describe(), step=5), describe(**values), allow=True)
    assert line.startswith("choice of the best checkpoint")


def test_checkpoint_of_an_earlier_version(checkpoint):
    """It lacks the total steps and most options from the meta file; all other settings are compared."""
    stored = describe()
    for name in [name for name in stored if "per dataset" in name] + [
        "total steps",
        "datasets",
        "drop_path_rate",
    ]:
        del stored[name]
    del stored["choice of the best checkpoint"]
    folder = checkpoint(stored)
    [line] = compare(folder, describe(max_steps=20))
    assert "was written by an earlier version, which did not store" in line
    for name in ("total steps", "drop_path_rate", "data_augment per dataset", IMAGES):
        assert name in line
    with pytest.raises(UsageError) as error:
        compare(folder, describe({"b": DATA["b"], "a": DATA["a"]}, max_dynamic_patch=3))
    assert "datasets is ['b', 'a'], but the checkpoint has ['a', 'b']" in str(error.value)
    assert "max_dynamic_patch is 3, but the checkpoint has 6" in str(error.value)


def test_other_image_files(checkpoint):
    folder = checkpoint(describe())
    same, other = {"a": "i" * 64, "b": "i" * 64}, {"a": "i" * 64, "b": "0" * 64}
    assert check_images(folder, same, allow_changes=False) == []
    with pytest.raises(UsageError, match=r"image files per dataset is \{'b': '000000000000...'\}"):
        check_images(folder, other, allow_changes=False)
    [line] = check_images(folder, other, allow_changes=True)
    assert line.endswith(READ)
    (folder / FINGERPRINT).write_text(json.dumps({}))
    assert check_images(folder, other, allow_changes=False) == []


@pytest.mark.parametrize("deepspeed", [None, '{"zero_optimization": {"stage": 1}}'])
def test_world_size_is_fixed_only_with_deepspeed(checkpoint, deepspeed, monkeypatch):
    two = describe(deepspeed=deepspeed)
    folder = checkpoint(two)
    monkeypatch.setenv("WORLD_SIZE", "2")
    four = describe(deepspeed=deepspeed, gradient_accumulation_steps=2)
    if deepspeed is None:
        assert compare(folder, four) == []
        return
    with pytest.raises(UsageError, match=r"use as many as before.* is 2, but the checkpoint has 1"):
        compare(folder, four)


def test_every_compared_setting_is_classified():
    known = resume_changes._REJECTED.keys() | resume_changes._ALLOWED.keys() | {"excluded records"}
    config = parse_arguments(
        flags(model_name_or_path="m", meta_path="d", output_dir="o", eval_strategy="steps",
              metric_for_best_model="loss", deepspeed='{"zero_optimization": {"stage": 1}}')
    )  # fmt: skip
    values = {"eval_strategy": "steps", "metric_for_best_model": "loss", "eval_digest": "e" * 64}
    names = fingerprint(config).keys() | describe(**values).keys()
    assert {name for name in names if not name.startswith("SHA-256 of")} <= known

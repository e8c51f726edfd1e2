"""The fingerprint of a run: every setting is compared or listed as irrelevant."""

from dataclasses import fields, replace

import numpy as np
import pytest
from helpers import flags

from internvl_chat.data.index.image_manifest import ImageManifest
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.train.arguments import parse_arguments
from internvl_chat.train.checkpoint import fingerprint as module
from internvl_chat.train.checkpoint.fingerprint import (
    NOT_COMPARED,
    DataState,
    fingerprint,
    fingerprint_run,
)
from internvl_chat.train.config import RunConfig
from internvl_chat.train.flags import DataArguments, ModelArguments, RunArguments

GROUPS = {"model": ModelArguments, "data": DataArguments, "run": RunConfig}


@pytest.fixture
def config():
    def config(**values):
        return parse_arguments(flags(model_name_or_path="m", meta_path="d", output_dir="o", **values))

    return config


@pytest.mark.parametrize("group", GROUPS)
def test_every_setting_is_compared_or_listed(config, group):
    """A new flag must be compared or listed in NOT_COMPARED."""
    names = {field.name for field in fields(GROUPS[group])}
    assert set(NOT_COMPARED[group]) <= names
    compared = fingerprint(config(eval_strategy="steps", metric_for_best_model="loss")).keys()
    missing = names - compared - set(NOT_COMPARED[group]) - set(module._RESOLVED)
    assert not missing


def test_run_flags_without_a_field_of_the_same_name():
    """Each of these flags is resolved into a different field."""
    given = {field.name for field in fields(RunArguments)} - {field.name for field in fields(RunConfig)}
    assert given == {
        "per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size",
        "group_by_length", "warmup_ratio", "do_train", "torch_compile", "use_cpu", "fsdp", "ddp_backend",
        "local_rank", "evaluation_strategy", "self_test",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"max_steps": 7}, {"total steps": 7}),
        # 11 + 2 * 4 records and 8 records per step: 3 steps per epoch.
        ({"num_train_epochs": 2}, {"total steps": 6}),
        ({"max_dynamic_patch": 5}, {"max_dynamic_patch per dataset": {"a": 5, "b": 3}}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"deepspeed": '{"zero_optimization": {"stage": 2}}'}, {"ZeRO stage": 2}),
    ],
    ids=str,
)
def test_values_derived_from_flags_and_data(config, tmp_path, values, expected):
    specs = []
    for name, records, options in (("a", 11, {}), ("b", 4, {"repeat_time": 2, "max_dynamic_patch": 3})):
        (tmp_path / name).write_text('{"id": 1}\n' * records)
        specs.append(DatasetSpec(name, tmp_path, tmp_path / name, **options))
    found = fingerprint_run(config(**values), DataState.of_files(specs, []), None)
    assert expected.items() <= found.items()
    assert found["records of each set"] == [11, 8]
    fewer = DataState.of_files(specs, [("b", 2), ("b", 9), ("c", 1)])
    assert fewer.sizes == [11, 6]  # index 9 is beyond the file


def test_validation_flags_are_compared_only_if_the_best_checkpoint_is_tracked(config):
    values = {"eval_strategy": "steps", "eval_steps": 5}
    assert "eval_steps" not in fingerprint(config(**values))
    assert fingerprint(config(**values, early_stopping_patience=2))["eval_steps"] == 5


def test_layout_is_not_compared(config):
    one = config()
    other = replace(one, run=replace(one.run, world_size=4, rank=1, records_per_rank=2, parallel="fsdp"))
    assert fingerprint(one) == fingerprint(other)


def test_digest_of_image_files():
    """The digest ignores folders, dates, order, and the images of excluded records."""
    states = np.array([[10, 1], [20, 2], [30, 3]])
    first = ImageManifest(["a", "b", "c"], states, np.array([[0, 0], [1, 1], [2, 2]], np.int32))
    later = ImageManifest(["b", "a", "x"], states[[1, 0, 2]] + [0, 5], np.array([[1, 0], [0, 1], [2, 2]]))
    assert first.digest({2}) == later.digest({2})
    assert first.digest({}) != later.digest({})
    larger = ImageManifest(first.names, states + [1, 0], first.uses)
    assert larger.digest({2}) != first.digest({2})

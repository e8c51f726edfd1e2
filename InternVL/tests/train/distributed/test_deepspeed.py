"""The DeepSpeed configuration must agree with the flags."""

import json
from pathlib import Path

import pytest
import torch
from helpers import flags
from torch.utils import cpp_extension

from internvl_chat.train.arguments import parse_arguments
from internvl_chat.train.distributed import deepspeed as module
from internvl_chat.train.distributed.deepspeed import deepspeed_problems, resolve_deepspeed, warn_about_locks
from internvl_chat.utils.errors import UsageError

ZERO_2 = {"zero_optimization": {"stage": 2}}
BATCH = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "train_batch_size": 8,
    "gradient_clipping": 1.0,
}


def run_with(**config):
    return parse_arguments(
        flags(
            output_dir="out", meta_path="meta.json", model_name_or_path="model",
            per_device_train_batch_size=2, gradient_accumulation_steps=4, deepspeed=json.dumps(config),
        )
    ).run  # fmt: skip


def resolve(**config):
    return resolve_deepspeed(run_with(**config), hidden_size=8)


def problems(**config) -> list[str]:
    with pytest.raises(UsageError) as caught:
        resolve(**config)
    return caught.value.problems


@pytest.mark.parametrize("given", [{}, dict.fromkeys(BATCH, "auto"), BATCH], ids=["none", "auto", "same"])
def test_deepspeed_sees_one_batch_per_rank(given):
    found = resolve(**ZERO_2, **given)
    assert {name: found[name] for name in BATCH} == {
        "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1, "train_batch_size": 8,
        "gradient_clipping": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", BATCH)
def test_contradictions_with_the_flags_are_rejected(name):
    assert problems(**ZERO_2, **{**BATCH, name: 16}) == [
        f'--deepspeed: "{name}" is 16, but the flags set {BATCH[name]!r}; use "auto"'
    ]


def test_offloading_weights_needs_stage_3():
    offload = {"offload_param": {"device": "cpu"}}
    assert problems(zero_optimization={"stage": 2, **offload}) == [
        '--deepspeed: "zero_optimization.offload_param" requires stage 3'
    ]
    assert resolve(zero_optimization={"stage": 3, **offload})["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("config", "stage"),
    [
        ({}, 0),
        ({"zero_optimization": {"stage": 0}}, 0),
        ({"zero_optimization": False}, 0),
        ({"zero_optimization": {"stage": 4}}, 4),
    ],
)
def test_unsupported_zero_stages_are_rejected(config, stage):
    (problem,) = problems(**config)
    assert problem == (
        f'--deepspeed: "zero_optimization.stage" is {stage}, but must be 1, 2 or 3; to train '
        "without ZeRO, use --parallel ddp instead of --deepspeed"
    )


ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}


def test_adam_in_a_configuration_needs_no_compiler():
    """torch's Adam replaces DeepSpeed's FusedAdam, which is compiled on first use."""
    assert resolve(**ZERO_2, optimizer=ADAMW)["optimizer"]["params"] == {
        "torch_adam": True, "lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0,
    }  # fmt: skip
    assert resolve(**ZERO_2, optimizer={"type": "Adam"})["optimizer"]["params"] == {"torch_adam": True}
    given = {"type": "AdamW", "params": {"torch_adam": False}}
    assert resolve(**ZERO_2, optimizer=given)["optimizer"] == given
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert resolve(**offload, optimizer={"type": "AdamW"})["optimizer"] == {"type": "AdamW"}
    assert resolve(**ZERO_2, optimizer={"type": "Lamb"})["optimizer"] == {"type": "Lamb"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ZERO_2, None),
        (ZERO_2 | {"optimizer": ADAMW, "wall_clock_breakdown": True}, None),
        (ZERO_2 | {"train_batch_size": 32}, '"train_batch_size" is 32, but the flags set 8; use "auto"'),
        ({"zero_optimization": {"stage": 2, "stge": 1}}, '"stge": Extra inputs are not permitted'),
        (
            {"zero_optimization": {"stage": 2, "overlap_comm": "maybe"}},
            '"overlap_comm": Input should be a valid',
        ),
        (ZERO_2 | {"optimizer": {"type": "Adamax2"}}, "\"optimizer.type\" is 'Adamax2', but must be one of "),
        (ZERO_2 | {"optimizer": "adam"}, '"optimizer.type" is None, but must be one of '),
        (ZERO_2 | {"scheduler": {"type": "Cosine"}}, "\"scheduler.type\" is 'Cosine', but must be one of "),
        (
            ZERO_2 | {"optimizer": {"type": "AdamW", "params": {"foo": 1}}},
            '"optimizer.params": AdamW.__init__() got an unexpected keyword argument',
        ),
        (
            ZERO_2 | {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 2]}}},
            '"optimizer.params": Invalid beta parameter',
        ),
    ],
)
def test_problems_of_a_configuration(config, expected):
    pytest.importorskip("deepspeed")
    found = list(deepspeed_problems(run_with(**config)))
    assert len(found) == (expected is not None)
    assert not found or found[0].startswith(f"--deepspeed: {expected}")


@pytest.mark.parametrize("variable", [True, False], ids=["TORCH_EXTENSIONS_DIR", "default"])
def test_lock_file_of_a_killed_compilation_is_logged(tmp_path, monkeypatch, caplog, variable):
    """Both folders are those in which torch compiles."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    monkeypatch.setattr(cpp_extension, "FileBaton", object, raising=False)
    if variable:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder, other = (Path(cpp_extension._get_build_directory(n, False)) for n in ("cpu_adam", "other"))
    warn_about_locks()
    (other / "lock").touch()
    warn_about_locks()
    assert not caplog.records
    (folder / "lock").touch()
    warn_about_locks()
    [message] = [record.message for record in caplog.records]
    assert message.startswith(f"{folder / 'lock'}: another process is compiling DeepSpeed's extensions")
    monkeypatch.delattr(cpp_extension, "FileBaton")  # as in versions that lock the open file
    warn_about_locks()
    assert len(caplog.records) == 1


def test_locks_are_checked_before_the_engine_starts(monkeypatch):
    called = []
    monkeypatch.setattr(module, "warn_about_locks", lambda: called.append("check"))

    def initialize(**options):
        called.append("initialize")
        return None, None, None, None

    monkeypatch.setattr("deepspeed.initialize", initialize)
    config = {"optimizer": {}, "scheduler": {}, **ZERO_2}
    module.DeepSpeedStrategy(torch.nn.Linear(1, 1), None, None, config)
    assert called == ["check", "initialize"]

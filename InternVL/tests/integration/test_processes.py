"""A run on two processes is the run on one with the same global batch."""

import pytest
import torch
from helpers import SOURCE_ROOT, flags, run_training

from internvl_chat.model.weights import open_weights

SIX_STEPS = {"num_train_epochs": 1, "save_strategy": "no", "max_grad_norm": 0.5}


def losses(metrics, tiny_model, sample_data, folder, processes, **values):
    argv = flags(
        model_name_or_path=tiny_model,
        meta_path=sample_data / "train.json",
        output_dir=folder,
        **{**SIX_STEPS, **values},
    )
    result = run_training(*argv, processes=processes)
    assert result.returncode == 0, result.stderr[-3000:]
    return metrics(folder)


def assert_same_weights(one, two):
    """Compare what two runs saved; Adam makes a large step of a tiny difference, so on the average."""
    name = (
        "adapter_model.safetensors" if (one / "adapter_model.safetensors").exists() else "model.safetensors"
    )
    first, second = (open_weights(folder / name) for folder in (one, two))
    assert first.keys() == second.keys()
    for key, read in first.items():
        a, b = read(), second[key]()
        assert a.dtype == b.dtype
        assert (a - b).abs().mean() < 2e-5, key


# 24 records in steps of 10: the last step has 4, and with 2 a pack the cut is uneven.
ONE = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}
TWO = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 5}


@pytest.mark.parametrize(
    ("reduction", "recipe"),
    [
        ("sample", {}),
        pytest.param("token", {}, marks=pytest.mark.slow),
        pytest.param("square", {}, marks=pytest.mark.slow),
        pytest.param(
            "sample", {"use_llm_lora": 4, "freeze_llm": True, "lora_dropout": 0}, marks=pytest.mark.slow
        ),
        pytest.param("sample", {"max_packed_tokens": 700}, marks=pytest.mark.slow),
        pytest.param("sample", {"packing": False}, marks=pytest.mark.slow),
        pytest.param("sample", {"freeze_backbone": False, "grad_checkpoint": False}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(tiny_model, sample_data, tmp_path, metrics, reduction, recipe):
    common = (metrics, tiny_model, sample_data)
    values = {"loss_reduction": reduction, **recipe}
    one = losses(*common, tmp_path / "one", 1, **values, **ONE)
    two = losses(*common, tmp_path / "two", 2, **values, **TWO)
    assert [r["records"] for r in one] == [r["records"] for r in two] == [10, 10, 4]
    for key in ("tokens", "supervised_tokens"):
        assert [r[key] for r in one] == [r[key] for r in two]
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in two] == pytest.approx([r[key] for r in one], abs=2e-5)
    ledgers = [(tmp_path / name / "ledger.jsonl").read_text() for name in ("one", "two")]
    assert ledgers[0] == ledgers[1]
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def spread(how: str | None) -> dict:
    """Return the flag that spreads a run's state: a ZeRO stage, or FSDP2."""
    if how is None:
        return {}
    if how == "fsdp":
        return {"fsdp": "full_shard"}
    return {"deepspeed": SOURCE_ROOT / f"internvl_chat/shell/deepspeed/{how}.json"}


SPREAD = ["zero1", "zero2", "zero3", "fsdp"]


@pytest.mark.slow
@pytest.mark.parametrize("how", SPREAD)
@pytest.mark.parametrize("packing", [{}, {"max_packed_tokens": 700}, {"packing": False}])
@pytest.mark.parametrize("recipe", [{}, {"use_llm_lora": 4, "freeze_llm": True, "lora_dropout": 0}])
def test_spread_over_two_processes_equals_one(
    tiny_model, sample_data, tmp_path, metrics, how, packing, recipe
):
    common = (metrics, tiny_model, sample_data)
    one = losses(*common, tmp_path / "one", 1, **recipe, packing=False, **ONE)
    two = losses(*common, tmp_path / "two", 2, **spread(how), **packing, **recipe, **TWO)
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], abs=2e-5)
    assert_same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("how", [None, "zero2", "zero3", "fsdp"])
def test_resume_on_two_processes(tiny_model, sample_data, tmp_path, metrics, how):
    values = {**TWO, **spread(how), "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    common = (metrics, tiny_model, sample_data)
    whole = losses(*common, tmp_path / "one", 2, **values)
    checkpoint = tmp_path / "one/checkpoint-2"
    rest = losses(*common, tmp_path / "two", 2, **values, resume_from_checkpoint=checkpoint)
    assert [r["loss"] for r in rest] == [r["loss"] for r in whole][2:]
    for key, read in open_weights(tmp_path / "one/model.safetensors").items():
        assert torch.equal(read(), open_weights(tmp_path / "two/model.safetensors")[key]()), key


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(None, "fsdp"), ("fsdp", None)])
def test_resume_spread_otherwise(tiny_model, sample_data, tmp_path, metrics, before, after):
    """What each parameter's moments are does not depend on how they were spread."""
    values = {**TWO, "save_strategy": "steps", "save_steps": 1, "max_steps": 3, "learning_rate": 1e-3}
    common = (metrics, tiny_model, sample_data)
    whole = losses(*common, tmp_path / "one", 2, **values, **spread(before))
    checkpoint = tmp_path / "one/checkpoint-2"
    rest = losses(*common, tmp_path / "two", 2, **values, **spread(after), resume_from_checkpoint=checkpoint)
    assert [r["loss"] for r in rest] == pytest.approx([r["loss"] for r in whole][2:], abs=2e-5)
    assert_same_weights(tmp_path / "one", tmp_path / "two")

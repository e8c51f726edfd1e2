"""All models listed as supported in docs/models.md can be trained, tested with small random models.

Logits and gradients are compared with transformers in parity/test_transformers.py, exports in test_export.py.
"""

import pytest
import torch
from helpers import changed_weights, flags
from integration.test_export import save_with_tokenizer
from integration.test_processes import LAYOUTS, TOLERANCE
from model.conftest import edit, small_published_model
from published_models import ARCHITECTURES
from ranks import run_training
from safetensors.torch import load_file, save_file

from internvl_chat.convert.export import export_hf
from internvl_chat.convert.parity import check_same
from internvl_chat.train.internvl_chat_finetune import main as train

LORA = {"use_llm_lora": 2, "freeze_llm": True, "freeze_mlp": True}
EXPERTS = "InternVL3.5-30B-A3B"


@pytest.fixture
def folder(request, tiny_model, tmp_path):
    """Folder of a small model with the options of a published model."""
    save_with_tokenizer(small_published_model(request.param), tiny_model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(folder, sample_data, tmp_path, metrics):
    """Return a function that trains the model and returns the loss of each step."""

    def start(output="out", ranks=1, **values) -> list[float]:
        settings = {"model_name_or_path": folder, "meta_path": sample_data / "train.json", "max_steps": 2,
                    "output_dir": tmp_path / output, "logging_steps": 1, **values}  # fmt: skip
        argv = flags(**settings)
        assert (train(argv) if ranks == 1 else run_training(*argv, ranks=ranks).returncode) == 0
        return [row["loss"] for row in metrics(tmp_path / output)]

    return start


@pytest.mark.parametrize("recipe", [LORA, {}], ids=["lora", "full"])
@pytest.mark.parametrize("folder", ARCHITECTURES, indirect=True)
def test_training(folder, run, recipe, tmp_path) -> None:
    losses = run(**recipe, save_strategy="no", per_device_train_batch_size=2)
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    if recipe:
        adapters = load_file(tmp_path / "out/adapter_model.safetensors")
        assert all(weight.any() for name, weight in adapters.items() if "lora_B" in name)
    else:
        names = load_file(folder / "model.safetensors").keys()
        frozen = {name for name in names if name.startswith("vision_model.")}
        changed = set(changed_weights(folder, tmp_path / "out"))
        assert changed.isdisjoint(frozen)
        # Experts to which no token was routed do not change.
        assert all(".mlp.experts." in name for name in names - frozen - changed)
        has_experts = any(".mlp.experts." in name for name in names)
        assert any(".mlp.experts." in name for name in changed) == has_experts


@pytest.mark.parametrize("folder", [EXPERTS], indirect=True)
def test_resume_with_experts_is_exact(run, tmp_path) -> None:
    few = {"save_steps": 1, "per_device_train_batch_size": 2}
    whole = run("whole", **few)
    rest = run("rest", **few, resume_from_checkpoint=tmp_path / "whole/checkpoint-1")
    assert rest == whole[1:]
    assert not changed_weights(tmp_path / "whole", tmp_path / "rest")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "zero3"])
@pytest.mark.parametrize("folder", [EXPERTS], indirect=True)
def test_experts_sharded_over_two_ranks(run, layout, tmp_path) -> None:
    one = run("one", per_device_train_batch_size=4)
    two = run("two", ranks=2, per_device_train_batch_size=2, **LAYOUTS[layout])
    assert two == pytest.approx(one, abs=TOLERANCE)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    # On average, because Adam can amplify tiny differences.
    assert all((weight - second[name]).abs().mean() < 2e-5 for name, weight in first.items())


@pytest.mark.parametrize("folder", [EXPERTS], indirect=True)
def test_experts_with_adapters_are_exported(folder, run, tmp_path) -> None:
    """Only the attention has adapters."""
    run(**LORA, learning_rate=0.1, per_device_train_batch_size=2)
    adapters = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {name.split(".")[-4] for name in adapters} == {"self_attn"}
    export_hf(tmp_path / "out", tmp_path / "hf")
    check_same(tmp_path / "out", tmp_path / "hf", device=torch.device("cpu"))
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    name = "layers.0.self_attn.o_proj.weight"
    assert not torch.equal(before[f"language_model.model.{name}"], after[f"model.language_model.{name}"])


@pytest.mark.parametrize("folder", ["InternVL3-8B"], indirect=True)
def test_gpt_oss_is_rejected(folder, sample_data, tmp_path, capsys) -> None:
    experts = {"model_type": "gpt_oss", "num_local_experts": 32}
    edit(folder / "config.json", lambda config: config["llm_config"].update(experts))
    arguments = {"model_name_or_path": folder, "meta_path": sample_data / "train.json"}
    assert train(flags(**arguments, output_dir=tmp_path / "out")) == 1
    assert "only Qwen3 is supported" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["InternVL3.5-8B"], indirect=True)
def test_flash_models_are_rejected(folder, sample_data, tmp_path, capsys) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "gating.gate.0.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    arguments = {"model_name_or_path": folder, "meta_path": sample_data / "train.json"}
    assert train(flags(**arguments, output_dir=tmp_path / "out")) == 1
    assert "without Flash in its name" in capsys.readouterr().err

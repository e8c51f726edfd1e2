"""Adapters are saved and loaded exactly, and only with their own base model."""

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_within_rounding, needs_bitsandbytes, terms_of
from model.conftest import (
    CONTEXT,
    VOCABULARY,
    edit,
    edit_weights,
    load,
    make_record,
    run_alone,
    save_trained_adapter,
)
from safetensors.torch import load_file

from internvl_chat.convert.merge import merge
from internvl_chat.model.io.adapter import (
    ADAPTER_WEIGHTS,
    BASE_FILE,
    BaseModel,
    find_base,
    read_base,
    save_adapter,
)
from internvl_chat.model.io.checkpoint import load_model, resize_vocabulary
from internvl_chat.model.io.folders import (
    is_adapter,
    read_config,
)
from internvl_chat.model.io.weights import weights_digest
from internvl_chat.model.lora.injection import add_lora, lora_dropout
from internvl_chat.model.lora.quantization import is_quantized_weight
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.freeze import set_trainable
from internvl_chat.utils.errors import ModelError

RECORD = make_record((2, 1))


def logits(model: InternVLChatModel) -> torch.Tensor:
    return run_alone(model, RECORD)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"mlp": True},
        {"mlp": True, "head": True},
        {"vision_rank": 3},
        {"llm_rank": 4, "vision_rank": 2, "mlp": True},
    ],
)
def test_adapter_round_trip_is_exact(folder: Path, tmp_path: Path, parts: dict) -> None:
    model = save_trained_adapter(folder, tmp_path / "adapter", **parts)
    assert is_adapter(tmp_path / "adapter") and not is_adapter(folder)
    assert (logits(model) - logits(load(folder))).abs().max() > 0.05
    loaded = load(tmp_path / "adapter")
    own, theirs = model.state_dict(), loaded.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert torch.equal(logits(loaded), logits(model))
    ranks = (loaded.config.use_llm_lora, loaded.config.use_backbone_lora)
    assert ranks == (model.config.use_llm_lora, model.config.use_backbone_lora)


def test_fully_trained_modules_are_stored(folder: Path, tmp_path: Path) -> None:
    model = save_trained_adapter(folder, tmp_path / "adapter", mlp=True, head=True)
    stored = load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    whole = {name for name in stored if ".lora_" not in name}
    assert whole == {
        "base_model.model.language_model.lm_head.weight",
        *(f"base_model.model.mlp1.{name}" for name in model.mlp1.state_dict()),
    }
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["language_model.lm_head", "mlp1"]
    assert config["base_model_name_or_path"] == str(folder)


def test_second_adapter_keeps_replaced_modules(folder: Path, tmp_path: Path) -> None:
    model = save_trained_adapter(folder, tmp_path / "first", mlp=True)
    again = load(tmp_path / "first")
    set_trainable(again, freeze_llm=True, freeze_mlp=True, freeze_backbone=True)
    save_adapter(again, tmp_path / "second", read_base(tmp_path / "first"))
    assert torch.equal(logits(load(tmp_path / "second")), logits(model))


def test_adapters_stay_float32_on_a_bfloat16_base(folder: Path, tmp_path: Path) -> None:
    model = save_trained_adapter(folder, tmp_path / "adapter", mlp=True)
    loaded = load(tmp_path / "adapter", dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        expected = model.state_dict()[name]
        dtype = torch.float32 if ".lora_" in name else torch.bfloat16
        assert parameter.dtype == dtype
        assert torch.equal(parameter, expected.to(dtype)), name


def test_the_dropout_of_loaded_adapters(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    assert lora_dropout(load(tmp_path / "adapter", lora_dropout=0.3)) == 0.3
    assert lora_dropout(load(tmp_path / "adapter")) == 0.05


def test_the_base_may_have_moved(folder: Path, tmp_path: Path) -> None:
    model = save_trained_adapter(folder, tmp_path / "adapter")
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"adapter's base model is missing.*--base") as caught:
        load(tmp_path / "adapter")
    assert str(folder) in str(caught.value)
    loaded = load(tmp_path / "adapter", base=tmp_path / "elsewhere")
    assert torch.equal(logits(loaded), logits(model))
    found, base = find_base(tmp_path / "adapter", tmp_path / "elsewhere")
    assert (found, base.path) == (tmp_path / "elsewhere", str(tmp_path / "elsewhere"))
    assert base.sha256 == read_base(tmp_path / "adapter").sha256


def test_wrong_base_reports_both_hashes(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    before = weights_digest(folder)
    edit_weights(folder, lambda w: w["mlp1.1.bias"].__setitem__(0, 1.0))
    after = weights_digest(folder)
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "adapter")
    message = str(caught.value)
    assert before[:12] in message and after[:12] in message
    assert str(folder) in message and str(tmp_path / "adapter") in message


def test_adapter_as_base_is_rejected(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    with pytest.raises(ModelError, match="is an adapter itself"):
        load(tmp_path / "adapter", base=tmp_path / "adapter")


@pytest.mark.parametrize(
    "content", [None, "", "[]", '{"path": "x"}', '{"path": "x", "sha256": "0", "more": 1}']
)
def test_missing_base_record(folder: Path, tmp_path: Path, content: str | None) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    file = tmp_path / "adapter" / BASE_FILE
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(ModelError, match="cannot read the adapter's base model"):
        load(tmp_path / "adapter")


def test_missing_adapter_weights(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    lost = ["base_model.model.language_model.model.layers.0.mlp.up_proj.lora_B.weight"]
    edit_weights(tmp_path / "adapter", lambda w: [w.pop(name) for name in lost], ADAPTER_WEIGHTS)
    with pytest.raises(ModelError, match="1 adapter weights are missing"):
        load(tmp_path / "adapter")
    (tmp_path / "adapter" / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(ModelError, match=ADAPTER_WEIGHTS):
        load(tmp_path / "adapter")


@needs_bitsandbytes
def test_4_bit_base(folder: Path, tmp_path: Path) -> None:
    """Adapters are loaded on the weights that they were trained on, even if the base has moved."""
    save_trained_adapter(folder, tmp_path / "adapter", load_in_4bit=True)
    assert read_base(tmp_path / "adapter").quantization == "nf4"
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert find_base(tmp_path / "adapter", moved)[1].quantization == "nf4"
    loaded = load(tmp_path / "adapter", base=moved)
    quantized = {name for name, p in loaded.named_parameters() if hasattr(p, "quant_state")}
    assert {name.replace("base_layer.", "") for name in quantized} == {
        name for name in load(moved).state_dict() if is_quantized_weight(name)
    }


def test_unquantized_base_has_no_quantization_entry(folder: Path, tmp_path: Path) -> None:
    """Earlier versions would reject it as an unknown entry."""
    save_trained_adapter(folder, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/base_model.json").read_text()).keys() == {"path", "sha256"}


def test_unknown_quantization(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    edit(tmp_path / "adapter/base_model.json", lambda base: base.update(quantization="int3"))
    with pytest.raises(ModelError, match="unknown quantization 'int3'; only 'nf4' is supported"):
        load(tmp_path / "adapter")


def test_adapter_options_override_the_base(folder: Path, tmp_path: Path) -> None:
    """Training sets options in the configuration after loading the base; they affect the model's output."""
    model = load(folder)
    model.config.select_layer, model.config.ps_version = -2, "v1"
    model.config.force_image_size, model.config.max_dynamic_patch = 56, 3
    add_lora(model, llm_rank=4)
    set_trainable(model, freeze_mlp=True, freeze_backbone=True)
    save_adapter(model, tmp_path / "adapter", BaseModel(str(folder), weights_digest(folder)))
    loaded = load(tmp_path / "adapter")
    assert (loaded.config.select_layer, loaded.config.ps_version) == (-2, "v1")
    assert loaded.config.max_dynamic_patch == 3
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_adapter_configuration_has_its_ranks(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter", llm_rank=4, vision_rank=2)
    config = read_config(tmp_path / "adapter")
    assert (config.use_llm_lora, config.use_backbone_lora) == (4, 2)
    assert config.tokens_per_tile == 4


def test_adapters_keep_a_resized_vocabulary(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder, image_context_id=CONTEXT)
    resize_vocabulary(model, VOCABULARY + 3, 3)
    add_lora(model, llm_rank=2)
    set_trainable(model, freeze_mlp=True, freeze_backbone=True)
    save_adapter(model, tmp_path / "adapter", BaseModel(str(folder), weights_digest(folder)))
    expected = logits(model)
    again = load_model(tmp_path / "adapter", image_context_id=CONTEXT)
    assert again.language_model.get_input_embeddings().weight.shape[0] == VOCABULARY + 3
    assert torch.equal(logits(again), expected)
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert read_config(tmp_path / "merged").llm_config["vocab_size"] == VOCABULARY + 3
    merged = load_model(tmp_path / "merged", image_context_id=CONTEXT)
    assert_within_rounding(logits(merged), expected, terms_of(model))


@pytest.mark.parametrize(
    "change",
    [{"lora_alpha": 3}, {"target_modules": "all-linear"}, {"init_lora_weights": "olora"}],
)
def test_other_adapter_types_are_rejected(folder: Path, tmp_path: Path, change: dict) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    edit(tmp_path / "adapter/adapter_config.json", lambda config: config.update(change))
    with pytest.raises(ModelError, match="expected LoRA or DoRA"):
        load_model(tmp_path / "adapter", image_context_id=CONTEXT)


@pytest.mark.parametrize("text", ["{", "[]", '{"peft_type": "nothing"}'])
def test_malformed_adapter_configuration(folder: Path, tmp_path: Path, text: str) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    (tmp_path / "adapter/adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match="not a LoRA configuration"):
        load_model(tmp_path / "adapter", image_context_id=CONTEXT)

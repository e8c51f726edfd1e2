"""Merging preserves the outputs of the model, its options and its auxiliary files."""

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_within_rounding, needs_bitsandbytes, terms_of
from model.conftest import (
    CONTEXT,
    assert_plain,
    contents,
    edit,
    load,
    make_model,
    make_record,
    run_alone,
    save_trained_adapter,
    save_wrapped,
)
from safetensors.torch import load_file, save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

from internvl_chat.convert.merge import merge
from internvl_chat.convert.output import STAMP, Conversion
from internvl_chat.model.io.adapter import BaseModel, save_adapter
from internvl_chat.model.io.hf_format import to_hf_config, to_hf_weights
from internvl_chat.model.io.weights import read_weights, weights_digest, write_weights
from internvl_chat.model.lora import quantization
from internvl_chat.model.lora.injection import add_lora
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.freeze import set_trainable
from internvl_chat.utils.errors import ModelError, UsageError

RECORD = make_record((2, 1))
LLM_LAYERS, VISION_LAYERS = 2 * 7, 2 * 4


def logits(model: InternVLChatModel) -> torch.Tensor:
    return run_alone(model, RECORD)


def assert_same_logits(found: InternVLChatModel, expected: InternVLChatModel) -> None:
    """Compare logits up to rounding: merged and unmerged adapters sum products in different orders."""
    assert_within_rounding(logits(found), logits(expected), terms_of(expected))


@pytest.mark.parametrize(
    ("parts", "layers"),
    [
        ({"llm_rank": 4}, LLM_LAYERS),
        ({"vision_rank": 3}, VISION_LAYERS),
        ({"llm_rank": 4, "vision_rank": 2}, LLM_LAYERS + VISION_LAYERS),
        ({"mlp": True}, LLM_LAYERS),
        ({"mlp": True, "head": True}, LLM_LAYERS),
    ],
)
def test_our_adapters(folder: Path, tmp_path: Path, parts: dict, layers: int) -> None:
    model = save_trained_adapter(folder, tmp_path / "adapter", **parts)
    before = contents(folder), contents(tmp_path / "adapter")
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    assert result == Conversion(tmp_path / "merged", layers)
    assert_plain(tmp_path / "merged")
    assert_same_logits(load(tmp_path / "merged"), model)
    assert (logits(model) - logits(load(folder))).abs().max() > 0.05
    assert (contents(folder), contents(tmp_path / "adapter")) == before


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"vision_rank": 2, "use_dora": True, "use_rslora": True},
    ],
)
def test_lora_variants(folder: Path, tmp_path: Path, options: dict) -> None:
    model = save_trained_adapter(folder, tmp_path / "adapter", llm_rank=3, **options)
    assert torch.equal(logits(load(tmp_path / "adapter")), logits(model))
    layers = LLM_LAYERS + (VISION_LAYERS if "vision_rank" in options else 0)
    assert merge(tmp_path / "adapter", tmp_path / "merged").merged_layers == layers
    assert_plain(tmp_path / "merged")
    assert_same_logits(load(tmp_path / "merged"), model)


@needs_bitsandbytes
@pytest.mark.parametrize("options", [{"llm_rank": 4}, {"llm_rank": 4, "use_dora": True}, {"vision_rank": 2}])
def test_adapters_on_4_bit_weights(folder: Path, tmp_path: Path, options: dict) -> None:
    """The result is the model that was trained, not the adapters merged into the original weights."""
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    model = save_trained_adapter(folder, adapter, load_in_4bit=True, **options)
    assert torch.equal(logits(load(adapter)), logits(model))
    assert merge(adapter, merged).merged_layers == (LLM_LAYERS if "llm_rank" in options else VISION_LAYERS)
    assert_plain(merged)
    expected = logits(model)
    # bitsandbytes and torch sum the products of a layer in different orders.
    assert_within_rounding(logits(load(merged)), expected, 2 * terms_of(load(merged)))
    edit(adapter / "base_model.json", lambda base: base.pop("quantization"))
    merge(adapter, tmp_path / "other")
    assert (logits(load(tmp_path / "other")) - expected).abs().max() > 0.05


def test_4_bit_adapters_need_bitsandbytes(folder: Path, tmp_path: Path, monkeypatch) -> None:
    save_trained_adapter(folder, tmp_path / "adapter", llm_rank=4)
    edit(tmp_path / "adapter/base_model.json", lambda base: base.update(quantization="nf4"))
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="bitsandbytes is not installed"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_missing_dora_norms_are_reported(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter", llm_rank=4)
    edit(tmp_path / "adapter/adapter_config.json", lambda config: config.update(use_dora=True))
    with pytest.raises(ModelError, match="the DoRA norms of 14 adapted layers are missing"):
        merge(tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("part", ["adapter", "base", "sum"])
def test_non_finite_weights_are_reported(folder: Path, tmp_path: Path, part: str) -> None:
    model = save_trained_adapter(folder, tmp_path / "adapter", llm_rank=4)
    layer = "language_model.model.layers.0.mlp.up_proj"
    file, key = tmp_path / "adapter/adapter_model.safetensors", f"base_model.model.{layer}.lora_B.weight"
    expected = {
        "adapter": f"{layer}.lora_B.default.weight",
        "base": f"{layer}.weight",
        "sum": f"{layer}.weight",
    }
    if part == "base":
        file, key = folder / "model.safetensors", f"{layer}.weight"
    weights = load_file(file)
    weights[key][0, 0] = torch.nan if part != "sum" else 1e38
    if part == "sum":
        weights[key.replace("lora_B", "lora_A")][0] = 100.0
    save_file(weights, file)
    if part == "base":
        save_adapter(model, tmp_path / "adapter", BaseModel(str(folder), weights_digest(folder)))
    with pytest.raises(ModelError, match="not finite") as caught:
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert expected[part] in str(caught.value)
    assert str(folder if part == "base" else tmp_path / "adapter") in str(caught.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("ranks", "layers"),
    [
        ({"llm_rank": 4}, LLM_LAYERS),
        ({"vision_rank": 3}, VISION_LAYERS),
        ({"llm_rank": 4, "vision_rank": 2}, LLM_LAYERS + VISION_LAYERS),
    ],
)
def test_a_wrapped_checkpoint_of_the_reference(tmp_path: Path, ranks: dict, layers: int) -> None:
    source = tmp_path / "wrapped"
    model = save_wrapped(source, **ranks)
    before = contents(source)
    assert merge(source, tmp_path / "merged").merged_layers == layers
    assert_plain(tmp_path / "merged")
    assert_same_logits(load(tmp_path / "merged"), model)
    assert contents(source) == before


def test_adapters_over_a_wrapped_base(tmp_path: Path) -> None:
    base = tmp_path / "wrapped"
    save_wrapped(base)
    model = load(base)
    set_trainable(model, freeze_backbone=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
    save_adapter(model, tmp_path / "adapter", BaseModel(str(base), weights_digest(base)))
    assert merge(tmp_path / "adapter", tmp_path / "merged").merged_layers == LLM_LAYERS
    assert_plain(tmp_path / "merged")
    assert_same_logits(load(tmp_path / "merged"), model.eval())


def test_adapters_over_a_base_in_transformers_format(tmp_path: Path) -> None:
    base, model = tmp_path / "hf", make_model()
    other = InternVLForConditionalGeneration(InternVLConfig(**to_hf_config(model.config, CONTEXT)))
    own = {name: lambda t=tensor: t for name, tensor in model.state_dict().items()}
    other.load_state_dict({name: read() for name, read in to_hf_weights(own).items()})
    other.save_pretrained(str(base))
    trained = save_trained_adapter(base, tmp_path / "adapter", mlp=True, llm_rank=4, vision_rank=2)
    assert merge(tmp_path / "adapter", tmp_path / "merged").merged_layers == LLM_LAYERS + VISION_LAYERS
    assert_plain(tmp_path / "merged")
    assert_same_logits(load(tmp_path / "merged"), trained)


def test_merged_weight_by_hand(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    layer = "language_model.model.layers.1.self_attn.k_proj"
    base, merged = load_file(folder / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{layer}.lora_{letter}.weight"].double() for letter in "AB")
    expected = base[f"{layer}.weight"].double() + 2 * b @ a
    assert_within_rounding(merged[f"{layer}.weight"], expected, terms=1 + len(a))
    assert torch.equal(merged[f"{layer}.bias"], base[f"{layer}.bias"])
    assert torch.equal(merged["language_model.lm_head.weight"], base["language_model.lm_head.weight"])


def test_a_bfloat16_base_stays_bfloat16_and_is_rounded_once(folder: Path, tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors")
    save_trained_adapter(folder, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    layer = "language_model.model.layers.0.mlp.down_proj"
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{layer}.lora_{letter}.weight"] for letter in "AB")
    expected = (half[f"{layer}.weight"].float() + 2 * b @ a).bfloat16()
    assert torch.equal(merged[f"{layer}.weight"], expected)


@pytest.mark.parametrize("kind", ["adapter", "wrapped", "plain"])
def test_merge_is_idempotent(folder: Path, tmp_path: Path, kind: str) -> None:
    sources = {"adapter": tmp_path / "adapter", "wrapped": tmp_path / "wrapped", "plain": folder}
    if kind == "adapter":
        save_trained_adapter(folder, tmp_path / "adapter")
    elif kind == "wrapped":
        save_wrapped(tmp_path / "wrapped")
    target = tmp_path / "merged"
    merge(sources[kind], target)
    before = contents(target)
    times = {file.name: file.stat().st_mtime_ns for file in target.iterdir()}
    assert merge(sources[kind], target) == Conversion(target, already_done=True)
    assert contents(target) == before
    assert {file.name: file.stat().st_mtime_ns for file in target.iterdir()} == times


def test_model_without_adapters(folder: Path, tmp_path: Path) -> None:
    assert merge(folder, tmp_path / "copy") == Conversion(tmp_path / "copy")
    assert torch.equal(logits(load(tmp_path / "copy")), logits(load(folder)))
    before = contents(folder)
    assert merge(folder, folder) == Conversion(folder, already_done=True)
    assert contents(folder) == before


def test_merged_model_can_get_new_adapters(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "first")
    merge(tmp_path / "first", tmp_path / "once")
    model = save_trained_adapter(tmp_path / "once", tmp_path / "second", seed=7)
    merge(tmp_path / "second", tmp_path / "twice")
    assert_same_logits(load(tmp_path / "twice"), model)


def test_base_may_move_but_not_change(folder: Path, tmp_path: Path) -> None:
    model = save_trained_adapter(folder, tmp_path / "adapter")
    folder.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="base model is missing"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "moved")
    assert_same_logits(load(tmp_path / "merged"), model)

    weights = load_file(tmp_path / "moved/model.safetensors")
    weights["mlp1.1.bias"][0] += 1
    save_file(weights, tmp_path / "moved/model.safetensors")
    with pytest.raises(ModelError, match="not the base"):
        merge(tmp_path / "adapter", tmp_path / "again", base=tmp_path / "moved")
    assert not (tmp_path / "again").exists()


def test_auxiliary_files_of_the_adapter_replace_those_of_the_base(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    for target, names in {
        folder: ("vocab.json", "preprocessing.json", "modeling_internvl_chat.py"),
        tmp_path / "adapter": ("preprocessing.json", "tokenizer.json"),
    }.items():
        for name in names:
            (target / name).write_text(f"{target.name}: {name}")
    merge(tmp_path / "adapter", tmp_path / "merged")
    found = {
        name: text.decode()
        for name, text in contents(tmp_path / "merged").items()
        if name not in ("model.safetensors", "config.json", STAMP)
    }
    assert found == {
        "vocab.json": "model: vocab.json",
        "modeling_internvl_chat.py": "model: modeling_internvl_chat.py",
        "preprocessing.json": "adapter: preprocessing.json",
        "tokenizer.json": "adapter: tokenizer.json",
    }


def test_adapter_options_are_preserved(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.config.select_layer, model.config.max_dynamic_patch = -2, 3
    add_lora(model, llm_rank=4)
    set_trainable(model, freeze_mlp=True, freeze_backbone=True)
    save_adapter(model, tmp_path / "adapter", BaseModel(str(folder), weights_digest(folder)))
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert (merged.config.select_layer, merged.config.max_dynamic_patch) == (-2, 3)
    assert_same_logits(merged, model.eval())


def test_adapters_of_missing_layers_are_rejected(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    weights |= {name.replace("layers.1.", "layers.9."): tensor.clone() for name, tensor in weights.items()}
    save_file(weights, file)
    with pytest.raises(ModelError, match="lacks 7 of the adapted layers"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_unknown_configuration_keys_are_preserved(folder: Path, tmp_path: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["auto_map"] = {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}
    (folder / "config.json").write_text(json.dumps(raw))
    save_trained_adapter(folder, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text()) == raw


def test_a_sharded_base_gives_a_sharded_result(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "sharded"
    base.mkdir()
    write_weights(read_weights(folder), base, max_shard_bytes=60_000)
    (base / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert len(list(base.glob("*.safetensors"))) > 3
    model = save_trained_adapter(base, tmp_path / "adapter", mlp=True)
    merge(tmp_path / "adapter", tmp_path / "merged", max_shard_bytes=60_000)
    shards = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(shards) > 3 and max(file.stat().st_size for file in shards) < 100_000
    assert_same_logits(load(tmp_path / "merged"), model)


def test_unchanged_configuration_is_copied_exactly(folder: Path, tmp_path: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("min_dynamic_patch")
    text = json.dumps(raw, indent=7)
    (folder / "config.json").write_text(text)
    merge(folder, tmp_path / "copy")
    assert (tmp_path / "copy/config.json").read_text() == text


@pytest.mark.parametrize("form", ["empty", "nested", "relative", "text"])
def test_forms_of_the_target(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_trained_adapter(folder, tmp_path / "adapter")
    if form == "empty":
        (tmp_path / "empty").mkdir()
    target = {
        "empty": tmp_path / "empty",
        "nested": tmp_path / "new/folders/merged",
        "relative": Path("merged"),
        "text": str(tmp_path / "merged"),
    }[form]
    result = merge(str(tmp_path / "adapter"), target)
    assert_same_logits(load(result.folder), model)

"""Checkpoints in all formats are saved and loaded exactly; invalid ones are reported."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from helpers import assert_within_rounding, terms_of
from model.conftest import (
    CONTEXT,
    SHAPE,
    VOCABULARY,
    edit,
    edit_weights,
    load,
    make_model,
    make_record,
    run_alone,
    save_wrapped,
)
from safetensors.torch import load_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

from internvl_chat.model.io.adapter import (
    BaseModel,
    save_adapter,
)
from internvl_chat.model.io.checkpoint import resize_vocabulary, save_model
from internvl_chat.model.io.folders import (
    is_adapter,
)
from internvl_chat.model.io.hf_format import to_hf_config, to_hf_weights
from internvl_chat.model.io.weights import read_weights, weights_digest
from internvl_chat.model.lora.injection import add_lora, lora_layers
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.freeze import set_trainable
from internvl_chat.utils.errors import ModelError

RECORD = make_record((2, 1))


def logits(model: InternVLChatModel) -> torch.Tensor:
    return run_alone(model, RECORD)


# Full models


def test_save_and_load_is_exact(folder: Path) -> None:
    model, loaded = make_model(), load(folder)
    own, theirs = model.state_dict(), loaded.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.to_dict() == model.config.to_dict()
    assert all(p.requires_grad for p in loaded.parameters())


def test_file_has_the_reference_names(folder: Path) -> None:
    names = load_file(folder / "model.safetensors").keys()
    assert {
        "vision_model.embeddings.class_embedding",
        "vision_model.encoder.layers.1.attn.qkv.weight",
        "vision_model.encoder.layers.0.ls1",
        "mlp1.0.weight",
        "mlp1.3.bias",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.self_attn.q_proj.bias",
        "language_model.lm_head.weight",
    } <= names
    assert {name.partition(".")[0] for name in names} == {"vision_model", "mlp1", "language_model"}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["InternVLChatModel"] and config["model_type"] == "internvl_chat"


def test_unknown_configuration_keys_are_preserved(folder: Path, tmp_path: Path) -> None:
    def change(raw: dict) -> None:
        raw["auto_map"] = {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}
        raw["llm_config"]["moe_config"] = None
        raw["vision_config"]["num_experts"] = 8

    edit(folder / "config.json", change)
    save_model(load(folder), tmp_path / "again")
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert after == before and "auto_map" in after


def test_load_in_bfloat16(folder: Path) -> None:
    loaded = load(folder, dtype=torch.bfloat16)
    expected = make_model().state_dict()
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, expected[name].bfloat16()), name
    rotary, exact = loaded.language_model.model.rotary_emb.inv_freq, 1e6 ** -(torch.arange(0, 16, 2) / 16)
    assert rotary.dtype == torch.float32
    torch.testing.assert_close(rotary, exact, atol=1e-7, rtol=1e-6)
    assert torch.get_default_dtype() == torch.float32
    assert run_alone(loaded, RECORD).dtype == torch.bfloat16


def test_bfloat16_files_are_read_into_float32_exactly(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({name: tensor.bfloat16() for name, tensor in w.items()}))
    expected = {name: tensor.bfloat16().float() for name, tensor in make_model().state_dict().items()}
    loaded = load(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_attention_and_stochastic_depth_options(folder: Path) -> None:
    model = load(folder, attn="varlen", drop_path_rate=0.3)
    assert model.attn == "varlen"
    assert model.language_model.config._attn_implementation == "varlen"
    assert model.vision_model.encoder.layers[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert load(folder).config.vision_config.drop_path_rate == 0.0


def test_save_a_given_state_dict(folder: Path, tmp_path: Path) -> None:
    other = make_model(seed=5)
    save_model(make_model(), tmp_path / "given", state_dict=other.state_dict())
    assert torch.equal(logits(load(tmp_path / "given")), logits(other))


def test_save_model_rejects_adapters(tmp_path: Path) -> None:
    model = make_model()
    add_lora(model, llm_rank=2)
    with pytest.raises(ModelError, match="save_adapter"):
        save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_tied_head_is_written_once_and_stays_tied(tmp_path: Path) -> None:
    model = make_model(llm={"tie_word_embeddings": True})
    save_model(model, tmp_path / "tied")
    embeddings = "language_model.model.embed_tokens.weight"
    assert [n for n in read_weights(tmp_path / "tied") if n == embeddings or "lm_head" in n] == [embeddings]
    loaded = load(tmp_path / "tied")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.language_model.lm_head.weight is loaded.language_model.model.embed_tokens.weight


def test_tied_head_stored_twice_stays_tied(tmp_path: Path) -> None:
    model = make_model(llm={"tie_word_embeddings": True})
    save_model(model, tmp_path / "tied")
    copy = {"language_model.lm_head.weight": model.language_model.lm_head.weight.detach().clone()}
    edit_weights(tmp_path / "tied", lambda w: w.update(copy))
    loaded = load(tmp_path / "tied")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.language_model.lm_head.weight is loaded.language_model.model.embed_tokens.weight


def test_all_mismatches_are_reported_together(folder: Path) -> None:
    def change(weights: dict) -> None:
        del weights["mlp1.1.bias"]
        del weights["language_model.model.norm.weight"]
        weights["mlp1.7.weight"] = torch.zeros(1)
        weights["mlp1.0.weight"] = torch.zeros(3)

    edit_weights(folder, change)
    with pytest.raises(ModelError) as caught:
        load(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "2 missing weight(s), e.g. language_model.model.norm.weight, mlp1.1.bias" in message
    assert "1 unexpected weight(s), e.g. mlp1.7.weight" in message
    assert "1 mismatched weight(s), e.g. mlp1.0.weight (3,) instead of (128,)" in message


def test_resize_vocabulary() -> None:
    model = make_model()
    old_head = model.language_model.lm_head.weight.detach().clone()
    old_words = model.language_model.get_input_embeddings().weight.detach().clone()
    resize_vocabulary(model, VOCABULARY + 3, 3)
    head, words = model.language_model.lm_head.weight, model.language_model.get_input_embeddings().weight
    assert head.shape == words.shape == (VOCABULARY + 3, SHAPE.width)
    assert torch.equal(head[:VOCABULARY], old_head) and torch.equal(words[:VOCABULARY], old_words)
    expected = old_head.double().mean(dim=0).expand(3, -1)
    assert_within_rounding(head[VOCABULARY:], expected, VOCABULARY, magnitude=float(old_head.abs().max()))
    assert model.config.to_dict()["llm_config"]["vocab_size"] == VOCABULARY + 3


# transformers' format


def transformers_folder(model: InternVLChatModel, target: Path) -> None:
    other = InternVLForConditionalGeneration(InternVLConfig(**to_hf_config(model.config, CONTEXT)))
    own = {name: lambda t=tensor: t for name, tensor in model.state_dict().items()}
    other.load_state_dict({name: read() for name, read in to_hf_weights(own).items()})
    other.save_pretrained(str(target))


@pytest.mark.parametrize("tied", [False, True])
def test_load_transformers_format(tmp_path: Path, tied: bool) -> None:
    model = make_model(llm={"tie_word_embeddings": tied})
    transformers_folder(model, tmp_path / "hf")
    loaded = load(tmp_path / "hf")
    assert_within_rounding(logits(loaded), logits(model), terms_of(model))
    save_model(loaded, tmp_path / "own")
    assert torch.equal(logits(load(tmp_path / "own")), logits(loaded))
    llm = json.loads((tmp_path / "own/config.json").read_text())["llm_config"]
    assert llm["tie_word_embeddings"] is tied


@pytest.mark.parametrize("text_flag", [False, None])
def test_distinct_head_stays_untied(tmp_path: Path, text_flag: bool | None) -> None:
    """transformers 4 wrote the flag next to the text options or not at all; the weights decide."""
    model = make_model()
    transformers_folder(model, tmp_path / "hf")

    def change(raw: dict) -> None:
        for part in (raw, raw["text_config"]):
            part.pop("tie_word_embeddings", None)
        if text_flag is not None:
            raw["text_config"]["tie_word_embeddings"] = text_flag

    edit(tmp_path / "hf/config.json", change)
    loaded = load(tmp_path / "hf")
    assert_within_rounding(logits(loaded), logits(model), terms_of(model))
    assert loaded.config.llm_config["tie_word_embeddings"] is False
    save_model(loaded, tmp_path / "own")
    assert torch.equal(logits(load(tmp_path / "own")), logits(loaded))


# Adapters


# The reference's LoRA-wrapped checkpoints


@pytest.mark.parametrize("ranks", [{"llm_rank": 4}, {"vision_rank": 3}, {"llm_rank": 4, "vision_rank": 2}])
def test_a_wrapped_checkpoint_of_the_reference(tmp_path: Path, ranks: dict[str, int]) -> None:
    model = save_wrapped(tmp_path / "wrapped", **ranks)
    loaded = load(tmp_path / "wrapped")
    assert lora_layers(loaded).keys() == lora_layers(model).keys()
    assert torch.equal(logits(loaded), logits(model))
    assert not is_adapter(tmp_path / "wrapped")


def test_wrapped_checkpoint_resumes_as_an_adapter(tmp_path: Path) -> None:
    base = tmp_path / "wrapped"
    save_wrapped(base)
    trained = load(base)
    set_trainable(trained, freeze_mlp=True, freeze_backbone=True)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
    save_adapter(trained, tmp_path / "adapter", BaseModel(str(base), weights_digest(base)))
    assert torch.equal(logits(load(tmp_path / "adapter")), logits(trained))


# Weight files


def test_files_of_old_pytorch_are_read(folder: Path, tmp_path: Path) -> None:
    weights = {name: read() for name, read in read_weights(folder).items()}
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = read_weights(tmp_path)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name](), tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("llm_rank", [0, 4])
def test_saved_files_are_hashed_while_written(folder: Path, tmp_path: Path, llm_rank: int) -> None:
    model, target = load(folder), tmp_path / "target"
    if llm_rank:
        add_lora(model, llm_rank=llm_rank)
        entries = save_adapter(model, target, BaseModel(str(folder), weights_digest(folder)))
    else:
        entries = save_model(model, target)
    [file] = target.glob("*.safetensors")
    content = file.read_bytes()
    assert entries == {file.name: (len(content), hashlib.sha256(content).hexdigest())}

"""Model folders: written and read back bit by bit, every kind of them, and what is wrong with a bad one."""

import hashlib
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import assert_within_rounding, terms_of
from model.conftest import (
    CONTEXT,
    SHAPE,
    VOCABULARY,
    load,
    make_model,
    make_record,
    run_alone,
    save_trained_adapter,
    save_wrapped,
)
from safetensors.torch import load_file, save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

from internvl_chat.model.adapter import (
    ADAPTER_WEIGHTS,
    BASE_FILE,
    BaseModel,
    find_base,
    read_base,
    save_adapter,
)
from internvl_chat.model.checkpoint import load_model, resize_vocabulary, save_model
from internvl_chat.model.folders import copy_companions, is_adapter, model_folder, read_config
from internvl_chat.model.hf_format import to_hf_config, to_hf_weights
from internvl_chat.model.lora import add_lora, lora_dropout, lora_layers
from internvl_chat.model.merge import merge
from internvl_chat.model.modeling import InternVLChatModel
from internvl_chat.model.weights import read_weights, weights_digest
from internvl_chat.train.freeze import set_trainable
from internvl_chat.utils.errors import ModelError

RECORD = make_record((2, 1))


def logits(model: InternVLChatModel) -> torch.Tensor:
    return run_alone(model, RECORD)


def edit(file: Path, change) -> None:
    """Rewrite a JSON file by a function of its content."""
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def edit_weights(folder: Path, change, name: str = "model.safetensors") -> None:
    content = load_file(folder / name)
    change(content)
    save_file(content, folder / name, metadata={"format": "pt"})


# Whole models


def test_a_model_comes_back_bit_by_bit(folder: Path) -> None:
    model, loaded = make_model(), load(folder)
    own, theirs = model.state_dict(), loaded.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.to_dict() == model.config.to_dict()
    assert all(p.requires_grad for p in loaded.parameters())


def test_the_file_has_the_reference_s_names(folder: Path) -> None:
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


def test_unknown_keys_of_the_configuration_survive(folder: Path, tmp_path: Path) -> None:
    def change(raw: dict) -> None:
        raw["auto_map"] = {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}
        raw["llm_config"]["moe_config"] = None
        raw["vision_config"]["num_experts"] = 8

    edit(folder / "config.json", change)
    save_model(load(folder), tmp_path / "again")
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert after == before and "auto_map" in after


def test_straight_to_bfloat16(folder: Path) -> None:
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


def test_the_given_attention_and_stochastic_depth_are_used(folder: Path) -> None:
    model = load(folder, attn="varlen", drop_path_rate=0.3)
    assert model.attn == "varlen"
    assert model.language_model.config._attn_implementation == "varlen"
    assert model.vision_model.encoder.layers[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert load(folder).config.vision_config.drop_path_rate == 0.0


def test_a_state_dict_can_be_given_in_place_of_the_model_s_own(folder: Path, tmp_path: Path) -> None:
    other = make_model(seed=5)
    save_model(make_model(), tmp_path / "given", state_dict=other.state_dict())
    assert torch.equal(logits(load(tmp_path / "given")), logits(other))


@pytest.mark.parametrize("llm_rank", [0, 4])
def test_what_is_saved_is_hashed_on_the_way(folder: Path, tmp_path: Path, llm_rank: int) -> None:
    model, target = load(folder), tmp_path / "target"
    if llm_rank:
        add_lora(model, llm_rank=llm_rank)
        entries = save_adapter(model, target, BaseModel(str(folder), weights_digest(folder)))
    else:
        entries = save_model(model, target)
    [file] = target.glob("*.safetensors")
    content = file.read_bytes()
    assert entries == {file.name: (len(content), hashlib.sha256(content).hexdigest())}


def test_a_model_with_adapters_is_not_saved_as_a_whole_one(tmp_path: Path) -> None:
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


def test_a_tied_head_that_was_written_twice_stays_tied(tmp_path: Path) -> None:
    model = make_model(llm={"tie_word_embeddings": True})
    save_model(model, tmp_path / "tied")
    copy = {"language_model.lm_head.weight": model.language_model.lm_head.weight.detach().clone()}
    edit_weights(tmp_path / "tied", lambda w: w.update(copy))
    loaded = load(tmp_path / "tied")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.language_model.lm_head.weight is loaded.language_model.model.embed_tokens.weight


def test_everything_that_does_not_fit_is_named_at_once(folder: Path) -> None:
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
    assert "1 misshapen weight(s), e.g. mlp1.0.weight (3,) for (128,)" in message


@pytest.mark.parametrize("name", ["no/such/folder", "./missing", "missing", "/nowhere"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        model_folder(name)


def test_a_hub_model_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="organisation/model: neither a local folder nor available"):
        load_model("organisation/model", image_context_id=CONTEXT)


def test_a_hub_model_is_fetched_without_anything_that_could_be_run(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    asked = {}

    def fetch(name: str, **options) -> str:
        asked.update(name=name, **options)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert model_folder("organisation/model") == folder
    assert asked["name"] == "organisation/model"
    assert not {"*.bin", "*.pt", "*.pth", "*.pkl"} & set(asked["allow_patterns"])


def test_growing_the_vocabulary() -> None:
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
def test_a_folder_that_transformers_wrote(tmp_path: Path, tied: bool) -> None:
    model = make_model(llm={"tie_word_embeddings": tied})
    transformers_folder(model, tmp_path / "hf")
    loaded = load(tmp_path / "hf")
    assert_within_rounding(logits(loaded), logits(model), terms_of(model))
    save_model(loaded, tmp_path / "own")
    assert torch.equal(logits(load(tmp_path / "own")), logits(loaded))
    llm = json.loads((tmp_path / "own/config.json").read_text())["llm_config"]
    assert llm["tie_word_embeddings"] is tied


@pytest.mark.parametrize("text_flag", [False, None])
def test_a_head_of_its_own_stays_untied_where_the_top_of_the_file_is_silent(
    tmp_path: Path, text_flag: bool | None
) -> None:
    """transformers 4 wrote the flag beside the text options or not at all; two different matrices decide."""
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
def test_adapters_come_back_bit_by_bit(folder: Path, tmp_path: Path, parts: dict) -> None:
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


def test_modules_that_were_trained_whole_are_stored_whole(folder: Path, tmp_path: Path) -> None:
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


def test_without_more_training_a_second_adapter_keeps_what_the_first_replaced(
    folder: Path, tmp_path: Path
) -> None:
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
    with pytest.raises(ModelError, match=r"adapter's base is missing.*--base") as caught:
        load(tmp_path / "adapter")
    assert str(folder) in str(caught.value)
    loaded = load(tmp_path / "adapter", base=tmp_path / "elsewhere")
    assert torch.equal(logits(loaded), logits(model))
    found, base = find_base(tmp_path / "adapter", tmp_path / "elsewhere")
    assert (found, base.path) == (tmp_path / "elsewhere", str(tmp_path / "elsewhere"))
    assert base.sha256 == read_base(tmp_path / "adapter").sha256


def test_another_base_is_refused_with_both_hashes(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    before = weights_digest(folder)
    edit_weights(folder, lambda w: w["mlp1.1.bias"].__setitem__(0, 1.0))
    after = weights_digest(folder)
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "adapter")
    message = str(caught.value)
    assert before[:12] in message and after[:12] in message
    assert str(folder) in message and str(tmp_path / "adapter") in message


def test_an_adapter_is_no_base(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    with pytest.raises(ModelError, match="is an adapter itself"):
        load(tmp_path / "adapter", base=tmp_path / "adapter")


@pytest.mark.parametrize(
    "content", [None, "", "[]", '{"path": "x"}', '{"path": "x", "sha256": "0", "more": 1}']
)
def test_without_the_file_that_names_the_base(folder: Path, tmp_path: Path, content: str | None) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    file = tmp_path / "adapter" / BASE_FILE
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(ModelError, match="does not name the adapter's base"):
        load(tmp_path / "adapter")


def test_an_adapter_without_some_or_all_weights(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    lost = ["base_model.model.language_model.model.layers.0.mlp.up_proj.lora_B.weight"]
    edit_weights(tmp_path / "adapter", lambda w: [w.pop(name) for name in lost], ADAPTER_WEIGHTS)
    with pytest.raises(ModelError, match="1 adapter weights are missing"):
        load(tmp_path / "adapter")
    (tmp_path / "adapter" / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(ModelError, match=ADAPTER_WEIGHTS):
        load(tmp_path / "adapter")


def test_an_adapter_brings_the_options_that_it_was_trained_with(folder: Path, tmp_path: Path) -> None:
    """Training sets them in the configuration after loading the base, and they change what is computed."""
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


def test_the_configuration_of_an_adapter_folder_has_its_ranks(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter", llm_rank=4, vision_rank=2)
    config = read_config(tmp_path / "adapter")
    assert (config.use_llm_lora, config.use_backbone_lora) == (4, 2)
    assert config.tokens_per_tile == 4


# The reference's checkpoints with adapters inside


@pytest.mark.parametrize("ranks", [{"llm_rank": 4}, {"vision_rank": 3}, {"llm_rank": 4, "vision_rank": 2}])
def test_a_wrapped_checkpoint_of_the_reference(tmp_path: Path, ranks: dict[str, int]) -> None:
    model = save_wrapped(tmp_path / "wrapped", **ranks)
    loaded = load(tmp_path / "wrapped")
    assert lora_layers(loaded).keys() == lora_layers(model).keys()
    assert torch.equal(logits(loaded), logits(model))
    assert not is_adapter(tmp_path / "wrapped")


def test_a_wrapped_checkpoint_trains_on_as_an_adapter_of_itself(tmp_path: Path) -> None:
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


# Companions


def test_companions_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    kept = {
        "tokenizer_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
        "preprocessor_config.json",
        "preprocessing.json",
        "modeling_internvl_chat.py",
        "conversation.py",
    }
    left = {
        "config.json",
        "model.safetensors",
        "optimizer.pt",
        "trainer_state.json",
        "adapter_config.json",
        BASE_FILE,
    }
    for name in kept | left:
        (source / name).write_bytes(f"\xff {name}\r\n".encode("latin-1"))
    (target / "vocab.json").write_text("old")
    copy_companions(source, target)
    assert {file.name for file in target.iterdir()} == kept
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in kept)


def test_companions_of_a_folder_stay_in_place(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    copy_companions(tmp_path, tmp_path)
    copy_companions(link, tmp_path)
    assert (tmp_path / "vocab.json").read_text() == "{}"
    shutil.rmtree(tmp_path)
    link.unlink()


def test_adapters_keep_a_vocabulary_that_has_grown(folder: Path, tmp_path: Path) -> None:
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
    [{"use_rslora": True}, {"use_dora": True}, {"lora_alpha": 3}, {"target_modules": "all-linear"}],
)
def test_adapters_of_another_kind_are_refused(folder: Path, tmp_path: Path, change: dict) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    edit(tmp_path / "adapter/adapter_config.json", lambda config: config.update(change))
    with pytest.raises(ModelError, match="expected plain LoRA"):
        load_model(tmp_path / "adapter", image_context_id=CONTEXT)


@pytest.mark.parametrize("text", ["{", "[]", '{"peft_type": "nothing"}'])
def test_an_adapter_configuration_that_is_none(folder: Path, tmp_path: Path, text: str) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    (tmp_path / "adapter/adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match="not a LoRA configuration"):
        load_model(tmp_path / "adapter", image_context_id=CONTEXT)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"model_type": "internvl"}',
        '{"model_type": "internvl_chat", "llm_config": 1}',
    ],
)
def test_a_configuration_of_another_shape_is_a_model_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)


def test_files_of_old_pytorch_are_read(folder: Path, tmp_path: Path) -> None:
    weights = {name: read() for name, read in read_weights(folder).items()}
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = read_weights(tmp_path)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name](), tensor) for name, tensor in weights.items())

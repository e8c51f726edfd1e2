"""Configuration: preserved keys, validation, and the language model's section."""

import copy
import json
from pathlib import Path

import pytest
import torch
from model.conftest import make_config
from transformers import LlamaConfig, Qwen2Config

from internvl_chat.model.configuration import InternVisionConfig, InternVLChatConfig
from internvl_chat.model.io.checkpoint import empty_model
from internvl_chat.utils.errors import ModelError

# Keys of a published checkpoint, including unused ones.
PUBLISHED = {
    "_commit_hash": None,
    "architectures": ["InternVLChatModel"],
    "auto_map": {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    },
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "hidden_size": 3584,
    "llm_config": {
        "_attn_implementation_autoset": True,
        "_name_or_path": "./pretrained/Qwen2.5-32B-Instruct",
        "add_cross_attention": False,
        "architectures": ["Qwen2ForCausalLM"],
        "attn_implementation": "flash_attention_2",
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "max_length": 20,
        "max_position_embeddings": 32768,
        "max_window_layers": 70,
        "model_type": "qwen2",
        "moe_config": None,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "pruned_heads": {},
        "return_dict": True,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tf_legacy_loss": False,
        "tie_encoder_decoder": False,
        "tie_word_embeddings": False,
        "top_k": 50,
        "torch_dtype": "bfloat16",
        "torchscript": False,
        "transformers_version": "4.37.2",
        "use_bfloat16": True,
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": 151674,
    },
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "model_type": "internvl_chat",
    "output_attentions": False,
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "system_message": None,
    "template": "internvl2_5",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": None,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "use_thumbnail": True,
    "vision_config": {
        "_name_or_path": "OpenGVLab/InternViT-6B-448px-V1-5",
        "architectures": ["InternVisionModel"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_intern_vit.InternVisionConfig"},
        "capacity_factor": 1.2,
        "drop_path_rate": 0.1,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "image_size": 448,
        "initializer_factor": 0.1,
        "initializer_range": 1e-10,
        "intermediate_size": 4096,
        "laux_allreduce": "all_nodes",
        "layer_norm_eps": 1e-06,
        "model_type": "intern_vit_6b",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_experts": 8,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "qk_normalization": False,
        "qkv_bias": True,
        "norm_type": "layer_norm",
        "torch_dtype": "bfloat16",
        "use_flash_attn": True,
    },
}

# Single mistakes: section, key, value, and a part of the expected message.
MISTAKES = [
    ("vision_config", "num_attention_heads", 3, "1024 is not a multiple of num_attention_heads 3"),
    ("vision_config", "norm_type", "batch_norm", "'batch_norm'"),
    (None, "ps_version", "v3", "ps_version 'v3'"),
    (None, "select_layer", 25, "select_layer 25"),
    (None, "select_layer", -26, "select_layer -26"),
    (None, "force_image_size", 70, "image size 70"),
    (None, "force_image_size", 7, "image size 7"),
]


def published() -> dict:
    return copy.deepcopy(PUBLISHED)


def test_reading_and_writing_changes_nothing() -> None:
    assert InternVLChatConfig.from_dict(published()).to_dict() == published()


def test_changes_are_written_and_other_keys_preserved() -> None:
    config = InternVLChatConfig.from_dict(published())
    config.use_llm_lora, config.force_image_size, config.vision_config.drop_path_rate = 16, 224, 0.0
    config.llm_config["vocab_size"] = 9
    expected = published()
    expected |= {"use_llm_lora": 16, "force_image_size": 224}
    expected["vision_config"]["drop_path_rate"] = 0.0
    expected["llm_config"]["vocab_size"] = 9
    assert config.to_dict() == expected


def test_the_written_dictionary_is_a_copy() -> None:
    config = InternVLChatConfig.from_dict(published())
    written = config.to_dict()
    written["auto_map"]["AutoModel"] = "other"
    written["vision_config"]["auto_map"].clear()
    written["llm_config"]["id2label"].clear()
    assert config.to_dict() == published()


def test_changing_the_dictionary_that_was_read_changes_nothing() -> None:
    raw = published()
    config = InternVLChatConfig.from_dict(raw)
    raw["llm_config"]["vocab_size"] = 1
    raw["auto_map"].clear()
    assert config.to_dict() == published()


def test_from_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published()), encoding="utf-8")
    assert InternVLChatConfig.from_folder(tmp_path).to_dict() == published()


def test_sizes_of_internvl3() -> None:
    config = InternVLChatConfig.from_dict(published())
    assert (config.hidden_size, config.image_size, config.vision_config.grid) == (3584, 448, 32)
    assert config.tokens_per_tile == 256


@pytest.mark.parametrize(
    ("image_size", "ratio", "tokens"),
    [(448, 0.5, 256), (448, 0.25, 64), (448, 1.0, 1024), (224, 0.5, 64), (56, 0.5, 4)],
)
def test_tokens_per_tile(image_size: int, ratio: float, tokens: int) -> None:
    raw = published() | {"force_image_size": image_size, "downsample_ratio": ratio}
    assert InternVLChatConfig.from_dict(raw).tokens_per_tile == tokens


def test_image_size_of_the_tower() -> None:
    raw = published() | {"force_image_size": None}
    raw["vision_config"]["image_size"] = 336
    config = InternVLChatConfig.from_dict(raw)
    assert (config.image_size, config.tokens_per_tile) == (336, 144)


def test_defaults_match_the_reference() -> None:
    config = InternVLChatConfig.from_dict(
        {"model_type": "internvl_chat", "vision_config": {}, "llm_config": {"hidden_size": 8}}
    )
    assert (config.downsample_ratio, config.ps_version, config.select_layer) == (0.5, "v1", -1)
    assert (config.min_dynamic_patch, config.max_dynamic_patch) == (1, 6)
    assert (config.dynamic_image_size, config.use_thumbnail, config.pad2square) == (False, False, False)
    assert (config.use_backbone_lora, config.use_llm_lora, config.template) == (0, 0, None)
    vision = config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (3200, 48, 25)
    assert (vision.intermediate_size, vision.image_size, vision.patch_size) == (12800, 224, 14)
    assert (vision.norm_type, vision.qk_normalization, vision.qkv_bias) == ("rms_norm", True, False)
    assert (vision.layer_norm_eps, vision.initializer_factor, vision.drop_path_rate) == (1e-6, 0.1, 0.0)
    assert vision == InternVisionConfig()


@pytest.mark.parametrize(("part", "key", "value", "message"), MISTAKES)
def test_each_mistake_is_reported(part: str | None, key: str, value: object, message: str) -> None:
    raw = published()
    (raw if part is None else raw[part])[key] = value
    with pytest.raises(ModelError, match="the/file") as caught:
        InternVLChatConfig.from_dict(raw, source="the/file")
    assert message in str(caught.value)
    assert ";" not in str(caught.value)


def test_all_mistakes_are_reported_at_once() -> None:
    raw = published() | {"ps_version": "v3", "select_layer": 25, "force_image_size": 70}
    raw["vision_config"] |= {"num_attention_heads": 3, "norm_type": "batch_norm"}
    with pytest.raises(ModelError) as caught:
        InternVLChatConfig.from_dict(raw)
    for word in ("num_attention_heads 3", "batch_norm", "v3", "select_layer 25", "image size 70"):
        assert word in str(caught.value)


@pytest.mark.parametrize("model_type", ["internvl", "qwen2", None])
def test_other_model_types_are_rejected(model_type: str | None) -> None:
    with pytest.raises(ModelError, match=f"model_type is {model_type!r}, expected 'internvl_chat'"):
        InternVLChatConfig.from_dict(published() | {"model_type": model_type})


def test_missing_parts_are_reported() -> None:
    with pytest.raises(ModelError, match="no vision_config and no llm_config"):
        InternVLChatConfig.from_dict({"model_type": "internvl_chat"})
    raw = published()
    del raw["llm_config"]
    with pytest.raises(ModelError, match="no llm_config"):
        InternVLChatConfig.from_dict(raw)


def test_folder_without_a_valid_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        InternVLChatConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{'model_type': 1}", encoding="utf-8")
    with pytest.raises(ModelError, match="not valid JSON"):
        InternVLChatConfig.from_folder(tmp_path)


def test_qwen2_configuration() -> None:
    llm = InternVLChatConfig.from_dict(published()).build_llm_config()
    assert type(llm) is Qwen2Config
    assert (llm.hidden_size, llm.intermediate_size, llm.num_hidden_layers) == (3584, 18944, 28)
    assert (llm.num_attention_heads, llm.num_key_value_heads, llm.vocab_size) == (28, 4, 151674)
    assert (llm.rms_norm_eps, llm.tie_word_embeddings, llm.max_position_embeddings) == (1e-6, False, 32768)
    assert llm.rope_parameters["rope_theta"] == 1000000.0
    assert llm.rope_parameters["rope_type"] == "dynamic"
    assert llm._attn_implementation != "flash_attention_2"
    assert llm.dtype is None


def test_llama_works() -> None:
    changed = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config = make_config(llm=changed)
    assert type(config.build_llm_config()) is LlamaConfig
    model = empty_model(config, 0, torch.float32, "sdpa")
    assert type(model.language_model).__name__ == "LlamaForCausalLM"


def test_remote_code_language_model_is_rejected() -> None:
    raw = published()
    raw["llm_config"] |= {
        "model_type": "internlm2",
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
    }
    config = InternVLChatConfig.from_dict(raw)  # can be read, for commands that need no model
    with pytest.raises(
        ModelError, match=r"'InternLM2ForCausalLM'.*'internlm2'.*code from checkpoints is never run"
    ):
        config.build_llm_config()


@pytest.mark.parametrize(
    ("model_type", "key"), [("gpt_oss", "num_local_experts"), ("deepseek_v3", "n_routed_experts")]
)
def test_mixture_of_experts_other_than_qwen3_is_rejected(model_type: str, key: str) -> None:
    raw = published()
    raw["llm_config"] |= {"model_type": model_type, key: 32}
    with pytest.raises(ModelError, match=f"'{model_type}'.*only Qwen3 is supported"):
        InternVLChatConfig.from_dict(raw).build_llm_config()

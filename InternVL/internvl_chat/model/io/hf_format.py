"""Between the reference's checkpoint format and transformers' own InternVL.

Both hold the same tensors under other names; only the vision tower's fused qkv is split in three.
"""

import re
from typing import Any

import torch

from internvl_chat.model.configuration import InternVisionConfig, InternVLChatConfig
from internvl_chat.model.io.weights import Weights
from internvl_chat.utils.errors import ModelError

HF_MODEL_TYPE = "internvl"

# (reference, transformers) of everything but the fused qkv.
_RENAMES = (
    ("vision_model.embeddings.class_embedding", "model.vision_tower.embeddings.cls_token"),
    ("vision_model.embeddings.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
    (
        "vision_model.embeddings.patch_embedding.",
        "model.vision_tower.embeddings.patch_embeddings.projection.",
    ),
    ("vision_model.encoder.layers.", "model.vision_tower.encoder.layer."),
    ("mlp1.0.", "model.multi_modal_projector.layer_norm."),
    ("mlp1.1.", "model.multi_modal_projector.linear_1."),
    ("mlp1.3.", "model.multi_modal_projector.linear_2."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
)
_LAYER_RENAMES = (
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.q_norm.", ".attention.q_norm."),
    (".attn.k_norm.", ".attention.k_norm."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
)
_FUSED = re.compile(r"(vision_model\.encoder\.layers\.\d+)\.attn\.qkv\.(weight|bias)")
_SPLIT = re.compile(r"(model\.vision_tower\.encoder\.layer\.\d+)\.attention\.([qkv])_proj\.(weight|bias)")


def to_hf_weights(weights: Weights) -> Weights:
    """Return the reference's weights under transformers' names."""
    out: Weights = {}
    for name, read in weights.items():
        fused = _FUSED.fullmatch(name)
        if not fused:
            out[_rename(name, to_hf=True)] = read
            continue
        layer = _rename(fused[1] + ".", to_hf=True)
        for position, letter in enumerate("qkv"):
            out[f"{layer}attention.{letter}_proj.{fused[2]}"] = lambda r=read, p=position: r().chunk(3)[p]
    return out


def from_hf_weights(weights: Weights) -> Weights:
    """Return transformers' weights under the reference's names, from either of its two namings on disk."""
    weights = {_current_hf_name(name): read for name, read in weights.items()}
    out: Weights = {}
    for name, read in weights.items():
        split = _SPLIT.fullmatch(name)
        if not split:
            out[_rename(name, to_hf=False)] = read
        elif split[2] == "q":
            parts = [weights[f"{split[1]}.attention.{letter}_proj.{split[3]}"] for letter in "qkv"]
            layer = _rename(split[1] + ".", to_hf=False)
            out[f"{layer}attn.qkv.{split[3]}"] = lambda p=parts: torch.cat([part() for part in p])
    return out


def _current_hf_name(name: str) -> str:
    """Return the in-memory name of a parameter that may be stored under transformers' first naming."""
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return f"model.{name}" if name.startswith(("vision_tower.", "multi_modal_projector.")) else name


def _rename(name: str, *, to_hf: bool) -> str:
    """Translate one name; the pairs of names are looked up from left to right or from right to left."""
    side = 0 if to_hf else 1
    for pair in _RENAMES:
        if name.startswith(pair[side]):
            name = pair[1 - side] + name.removeprefix(pair[side])
            break
    else:
        raise ModelError(f"the weight {name!r} is not one of an InternVL model")
    if "vision_tower" in name or "vision_model" in name:
        for pair in _LAYER_RENAMES:
            name = re.sub(rf"(?<=\d){re.escape(pair[side])}", pair[1 - side], name)
    return name


def to_hf_config(config: InternVLChatConfig, image_context_id: int) -> dict[str, Any]:
    """Return transformers' `config.json` for a configuration of the reference's format.

    Raises:
        ModelError: transformers' InternVL has no such option.
    """
    vision = config.vision_config
    if config.ps_version != "v2":
        raise ModelError("transformers' InternVL knows pixel shuffle v2 only")
    return {
        "model_type": HF_MODEL_TYPE,
        "architectures": ["InternVLForConditionalGeneration"],
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "intermediate_size": vision.intermediate_size,
            "image_size": [vision.image_size] * 2,
            "patch_size": [vision.patch_size] * 2,
            "num_channels": vision.num_channels,
            "attention_bias": vision.qkv_bias,
            "use_qk_norm": vision.qk_normalization,
            "norm_type": vision.norm_type,
            "layer_norm_eps": vision.layer_norm_eps,
            "hidden_act": vision.hidden_act,
            "attention_dropout": vision.attention_dropout,
            "projection_dropout": vision.dropout,
            "layer_scale_init_value": vision.initializer_factor,
            "initializer_range": vision.initializer_range,
            "use_mean_pooling": True,
        },
        "text_config": config.build_llm_config().to_dict(),
        "image_token_id": image_context_id,
        "image_seq_length": config.tokens_per_tile,
        "downsample_ratio": config.downsample_ratio,
        "vision_feature_layer": config.select_layer,
        "projector_hidden_act": "gelu",
        # Its default, True, ties the head to the embeddings whatever the text configuration says.
        "tie_word_embeddings": bool(config.llm_config.get("tie_word_embeddings", False)),
    }


def from_hf_config(raw: dict[str, Any], *, source: str) -> InternVLChatConfig:
    """Return the reference's configuration for transformers' `config.json`."""
    vision = raw["vision_config"]
    side, patch = (
        _square(vision.get(key, default)) for key, default in (("image_size", 448), ("patch_size", 14))
    )
    tower = InternVisionConfig(
        hidden_size=vision.get("hidden_size", 1024),
        num_hidden_layers=vision.get("num_hidden_layers", 24),
        num_attention_heads=vision.get("num_attention_heads", 16),
        intermediate_size=vision.get("intermediate_size", 4096),
        image_size=side,
        patch_size=patch,
        qkv_bias=vision.get("attention_bias", False),
        qk_normalization=vision.get("use_qk_norm", False),
        norm_type=vision.get("norm_type", "layer_norm"),
        layer_norm_eps=vision.get("layer_norm_eps", 1e-6),
        hidden_act=vision.get("hidden_act", "gelu"),
        num_channels=vision.get("num_channels", 3),
        attention_dropout=vision.get("attention_dropout", 0.0),
        dropout=vision.get("projection_dropout", 0.0),
        initializer_range=vision.get("initializer_range", 0.02),
        initializer_factor=vision.get("layer_scale_init_value", 0.1),
    )
    llm = {
        **raw["text_config"],
        "tie_word_embeddings": raw.get(
            "tie_word_embeddings", raw["text_config"].get("tie_word_embeddings", True)
        ),
    }
    reference = {
        "model_type": "internvl_chat",
        "vision_config": {**tower.__dict__, "model_type": "intern_vit_6b"},
        "llm_config": llm,
        "downsample_ratio": raw.get("downsample_ratio", 0.5),
        "select_layer": raw.get("vision_feature_layer", -1),
        "ps_version": "v2",
        "template": "internvl2_5",
        "force_image_size": side,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "max_dynamic_patch": 12,
    }
    return InternVLChatConfig.from_dict(reference, source=source)


def _square(size: int | list[int]) -> int:
    return size if isinstance(size, int) else size[0]

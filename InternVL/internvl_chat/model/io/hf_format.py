"""Convert weights and configuration between the reference's format and transformers' own InternVL.

Only the parameter names change, except that transformers splits the vision tower's fused qkv weights.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.weights import Weights
from internvl_chat.utils.errors import ModelError, format_problems

HF_MODEL_TYPE = "internvl"

# Parameter-name prefixes as (reference, transformers), for all weights except the fused qkv.
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
# Fields of the vision configuration: the reference's name, transformers' name and default.
_VISION_FIELDS = (
    ("hidden_size", "hidden_size", 1024),
    ("num_hidden_layers", "num_hidden_layers", 24),
    ("num_attention_heads", "num_attention_heads", 16),
    ("intermediate_size", "intermediate_size", 4096),
    ("num_channels", "num_channels", 3),
    ("qkv_bias", "attention_bias", False),
    ("qk_normalization", "use_qk_norm", False),
    ("norm_type", "norm_type", "layer_norm"),
    ("layer_norm_eps", "layer_norm_eps", 1e-6),
    ("hidden_act", "hidden_act", "gelu"),
    ("attention_dropout", "attention_dropout", 0.0),
    ("dropout", "projection_dropout", 0.0),
    ("initializer_factor", "layer_scale_init_value", 0.1),
    ("initializer_range", "initializer_range", 0.02),
)
# Options of the projector with a single supported value.
_FIXED = {"projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}
_FUSED = re.compile(r"(vision_model\.encoder\.layers\.\d+)\.attn\.qkv\.(weight|bias)")
_SPLIT = re.compile(r"(model\.vision_tower\.encoder\.layer\.\d+)\.attention\.([qkv])_proj\.(weight|bias)")


def to_hf_weights(weights: Weights) -> Weights:
    """Return the reference's weights in transformers' format."""
    out: Weights = {}
    for name, read in weights.items():
        fused = _FUSED.fullmatch(name)
        if not fused:
            out[_rename(name, to_hf=True)] = read
            continue
        layer = _rename(fused[1] + ".", to_hf=True)
        for position, letter in enumerate("qkv"):
            out[f"{layer}attention.{letter}_proj.{fused[2]}"] = partial(_third, read, position)
    return out


def from_hf_weights(weights: Weights) -> Weights:
    """Return transformers' weights (in either of its naming schemes) in the reference's format."""
    weights = {_current_hf_name(name): read for name, read in weights.items()}
    out: Weights = {}
    for name, read in weights.items():
        split = _SPLIT.fullmatch(name)
        if not split:
            out[_rename(name, to_hf=False)] = read
        elif split[2] == "q":
            parts = [weights[f"{split[1]}.attention.{letter}_proj.{split[3]}"] for letter in "qkv"]
            layer = _rename(split[1] + ".", to_hf=False)
            out[f"{layer}attn.qkv.{split[3]}"] = partial(_concatenate, parts)
    return out


def _current_hf_name(name: str) -> str:
    """Map a parameter name from transformers' first InternVL release to its current name."""
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return f"model.{name}" if name.startswith(("vision_tower.", "multi_modal_projector.")) else name


def _rename(name: str, *, to_hf: bool) -> str:
    """Translate a parameter name to transformers' naming scheme or back to the reference's."""
    side = 0 if to_hf else 1
    for pair in _RENAMES:
        if name.startswith(pair[side]):
            name = pair[1 - side] + name.removeprefix(pair[side])
            break
    else:
        raise ModelError(f"the weight {name!r} does not belong to an InternVL model")
    if "vision_tower" in name or "vision_model" in name:
        for pair in _LAYER_RENAMES:
            name = re.sub(rf"(?<=\d){re.escape(pair[side])}", pair[1 - side], name)
    return name


def to_hf_config(config: InternVLChatConfig, image_context_id: int) -> dict[str, Any]:
    """Return the content of transformers' `config.json` for a configuration in the reference's format.

    Raises:
        ModelError: transformers does not support the model.
    """
    vision = config.vision_config
    if config.ps_version != "v2":
        raise ModelError(f"ps_version is {config.ps_version!r}, but transformers' InternVL supports v2 only")
    return {
        "model_type": HF_MODEL_TYPE,
        "architectures": ["InternVLForConditionalGeneration"],
        "vision_config": {
            "model_type": "internvl_vision",
            **{hf_name: getattr(vision, name) for name, hf_name, _ in _VISION_FIELDS},
            "image_size": [vision.image_size] * 2,
            "patch_size": [vision.patch_size] * 2,
            "use_mean_pooling": True,
        },
        "text_config": config.build_llm_config().to_dict(),
        "image_token_id": image_context_id,
        "image_seq_length": config.tokens_per_tile,
        "downsample_ratio": config.downsample_ratio,
        "vision_feature_layer": config.select_layer,
        "projector_hidden_act": "gelu",
        # The default (True) would tie the head regardless of the text configuration.
        "tie_word_embeddings": bool(config.llm_config.get("tie_word_embeddings", False)),
    }


def from_hf_config(raw: dict[str, Any], *, source: str) -> InternVLChatConfig:
    """Convert the content of transformers' `config.json` to a configuration in the reference's format.

    Raises:
        ModelError: an option has an unsupported value; the message lists all of these.
    """
    problems = [
        f"{name} is {raw[name]!r}; only {value!r} is supported"
        for name, value in _FIXED.items()
        if raw.get(name, value) != value
    ]
    if problems:
        raise ModelError(f"{source}: {format_problems(problems)}")
    text, vision = raw["text_config"], raw["vision_config"]
    side, patch = (
        _square(vision.get(k, default)) for k, default in (("image_size", 448), ("patch_size", 14))
    )
    tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    reference = {
        "model_type": "internvl_chat",
        "vision_config": {
            "model_type": "intern_vit_6b",
            **{name: vision.get(hf_name, default) for name, hf_name, default in _VISION_FIELDS},
            "image_size": side,
            "patch_size": patch,
            "drop_path_rate": 0.0,
        },
        "llm_config": {**text, "tie_word_embeddings": tied},
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


def _third(read: Callable[[], torch.Tensor], position: int) -> torch.Tensor:
    """Return the query (0), key (1) or value (2) part of a fused weight."""
    return read().chunk(3)[position]


def _concatenate(parts: Sequence[Callable[[], torch.Tensor]]) -> torch.Tensor:
    return torch.cat([read() for read in parts])

"""A small InternVL3 with random weights, so that everything can be tried without a download."""

import json
from pathlib import Path

import torch

from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.checkpoint import save_model
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.model.tiny_shape import TinyShape


def tiny_config(shape: TinyShape, vocab_size: int) -> InternVLChatConfig:
    """Return the configuration of a small InternVL3 of that shape, in the reference's format."""
    raw = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "force_image_size": shape.image_size,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "hidden_size": shape.width,
        "vision_config": {
            "model_type": "intern_vit_6b",
            "architectures": ["InternVisionModel"],
            "hidden_size": shape.vision_width,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_heads,
            "intermediate_size": 4 * shape.vision_width,
            "image_size": shape.image_size,
            "patch_size": 14,
            "norm_type": "layer_norm",
            "qkv_bias": True,
            "qk_normalization": False,
            "initializer_factor": 0.1,
            "use_flash_attn": False,
        },
        "llm_config": {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": vocab_size,
            "hidden_size": shape.width,
            "intermediate_size": 4 * shape.width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "use_cache": True,
            "torch_dtype": "float32",
        },
    }
    return InternVLChatConfig.from_dict(raw)


def build_tiny_model(
    shape: TinyShape, *, vocab_size: int, image_context_id: int, seed: int = 0
) -> InternVLChatModel:
    """Return a model of that shape with random weights, drawn from `seed`.

    Positions are drawn small, so that a vision tower that is never trained lets the image through.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        model = InternVLChatModel(tiny_config(shape, vocab_size), image_context_id)
        model.vision_model.embeddings.position_embedding.mul_(0.02)
    return model


def save_tiny_model(model: InternVLChatModel, folder: Path, eos_token_id: int, pad_token_id: int) -> None:
    """Write the model with the generation settings that end an answer."""
    save_model(model, folder)
    generation = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")

"""A small InternVL3 with random weights for the quickstart, tests and benchmarks.

Imports are local to the functions so that `m3llm --help` can use `TinyShape` without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_chat.utils.files import write_json

if TYPE_CHECKING:
    from internvl_chat.model.configuration import InternVLChatConfig
    from internvl_chat.model.modeling_internvl_chat import InternVLChatModel


@dataclass(frozen=True)
class TinyShape:
    """Sizes of a small model; the defaults train in minutes on two CPU cores.

    Attributes:
        image_size: side length of a tile in pixels; a multiple of 28.
    """

    image_size: int = 112
    vision_width: int = 96
    vision_layers: int = 2
    vision_heads: int = 4
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2

    def problems(self) -> list[str]:
        """Return a message for each invalid or inconsistent size."""
        problems = []
        if self.width % self.heads or (self.width // self.heads) % 2:
            problems.append(f"--width {self.width} must be an even multiple of --heads {self.heads}")
        if self.heads % self.kv_heads:
            problems.append(f"--heads {self.heads} must be a multiple of --kv_heads {self.kv_heads}")
        if self.vision_width % self.vision_heads:
            problems.append(
                f"--vision_width {self.vision_width} must be a multiple of --vision_heads {self.vision_heads}"
            )
        if self.image_size % 28:
            problems.append(f"--image_size {self.image_size} must be a multiple of 28")
        return problems


def tiny_config(shape: TinyShape, vocab_size: int) -> InternVLChatConfig:
    """Return the configuration of an InternVL3 model with these sizes."""
    from internvl_chat.model.configuration import InternVLChatConfig

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
    """Return a model with these sizes and random weights.

    The position embeddings are scaled down, because they would otherwise dominate the features of a frozen
    vision tower.
    """
    import torch

    from internvl_chat.model.modeling_internvl_chat import InternVLChatModel

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        model = InternVLChatModel(tiny_config(shape, vocab_size), image_context_id)
        model.vision_model.embeddings.position_embedding.mul_(0.02)
    return model


def save_tiny_model(model: InternVLChatModel, folder: Path, eos_token_id: int, pad_token_id: int) -> None:
    """Write the model and a generation configuration with the end-of-sequence and padding token ids."""
    from internvl_chat.model.io.checkpoint import save_model

    save_model(model, folder)
    generation = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    write_json(folder / "generation_config.json", generation)

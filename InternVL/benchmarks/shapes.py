"""Model shapes for the benchmarks, and models of these shapes with random weights."""

from dataclasses import dataclass

import torch

from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.checkpoint import empty_model
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.model.tiny import TinyShape, tiny_config
from internvl_chat.utils.hardware import cpu_bf16_instructions

INTERNVL3_VOCABULARY = 151_674
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """Dimensions of a model.

    Attributes:
        sizes: dimensions of the vision tower (whose MLP is four times as wide) and of the language model.
        mlp_width: MLP width of the language model.
        vocabulary: vocabulary size; the head is not tied to the embeddings.
    """

    sizes: TinyShape
    mlp_width: int
    vocabulary: int = INTERNVL3_VOCABULARY

    def config(self) -> InternVLChatConfig:
        """Return the model configuration."""
        config = tiny_config(self.sizes, self.vocabulary)
        config.llm_config["intermediate_size"] = self.mlp_width
        return config


SHAPES = {
    # For tests.
    "smoke": Shape(
        TinyShape(56, vision_width=32, vision_layers=2, vision_heads=2, width=64, layers=2, heads=4),
        mlp_width=176,
        vocabulary=2048,
    ),
    # For measurements on multiple ranks of a CPU.
    "small": Shape(
        TinyShape(448, vision_width=256, vision_layers=4, vision_heads=4, width=512, layers=8, heads=8),
        mlp_width=1408,
        vocabulary=16_384,
    ),
    # For measurements on a CPU.
    "mid": Shape(
        TinyShape(448, vision_width=256, vision_layers=4, vision_heads=4, width=512, layers=8, heads=8),
        mlp_width=1408,
    ),
    "internvl3-8b": Shape(
        TinyShape(
            448,
            vision_width=1024,
            vision_layers=24,
            vision_heads=16,
            width=3584,
            layers=28,
            heads=28,
            kv_heads=4,
        ),
        mlp_width=18_944,
    ),
}


def default_dtype(device: str) -> str:
    """Return `bfloat16`, or `float32` on a CPU without bf16 instructions, where a bf16 step takes minutes."""
    return "float32" if device == "cpu" and not cpu_bf16_instructions() else "bfloat16"


def weightless_model(shape: Shape) -> InternVLChatModel:
    """Return a model of the given shape on the meta device, which needs no memory for weights."""
    with torch.device("meta"):
        return empty_model(shape.config(), 0, torch.bfloat16, "sdpa")


def random_model(
    shape: Shape,
    image_context_id: int,
    *,
    attn: str,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> InternVLChatModel:
    """Return a model with random weights, which are the same in every call on the same type of device.

    Matrices are drawn from N(0, 0.02²). Biases are 0, norm weights are 1, and layer scales are as configured.
    """
    with torch.device(device):
        model = empty_model(shape.config(), image_context_id, dtype, attn)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(name, parameter, model.config, generator)
    return model


def fill(
    name: str, tensor: torch.Tensor, config: InternVLChatConfig, generator: torch.Generator
) -> torch.Tensor:
    """Initialize a parameter in place, depending on its name (see `random_model`), and return it."""
    if tensor.ndim > 1:
        return tensor.normal_(0.0, 0.02, generator=generator)
    scale = config.vision_config.initializer_factor
    return tensor.fill_(0.0 if name.endswith("bias") else scale if ".ls" in name else 1.0)

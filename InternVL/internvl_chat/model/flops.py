"""How many floating-point operations a training step needs, and what the hardware could do."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from internvl_chat.model.kernels.apply import has_supervised_head
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel

# Dense bf16 peak in FLOP/s by a part of the device's name (vendors' data sheets, without sparsity).
_PEAKS = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
)


def peak_flops(device: torch.device) -> float | None:
    """Return the device's dense bf16 peak in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS if part in name), None)


@dataclass(frozen=True)
class FlopCounter:
    """FLOPs of the model's parts, as multiples of what they process.

    Attributes:
        decoder: forward FLOPs a token in the language model's matrices that run for every token.
        attention: forward FLOPs a pair of a token and one it attends to.
        supervised: forward FLOPs a supervised token in the others: the head's and the last layer's MLP.
        tile: forward FLOPs a tile in the vision tower.
        projector: forward FLOPs a tile in `mlp1`.
        llm_passes: forward and backward passes that training needs: 1, 2 (frozen weights) or 3.
        vision_passes: likewise for the vision tower.
        projector_passes: likewise for `mlp1`.
    """

    decoder: float
    attention: float
    supervised: float
    tile: float
    projector: float
    llm_passes: int
    vision_passes: int
    projector_passes: int

    def step(self, lengths: list[int], supervised: int, tiles: int) -> float:
        """Return the FLOPs of training on records of these lengths; recomputation is not counted."""
        pairs = sum(n * (n + 1) / 2 for n in lengths)
        return self._count(sum(lengths), pairs, supervised, tiles)

    def records(self, tokens: np.ndarray, supervised: np.ndarray, tiles: np.ndarray) -> np.ndarray:
        """Return the FLOPs of training on each of many records; arrays of one entry a record."""
        tokens = tokens.astype(np.float64)
        return self._count(tokens, tokens * (tokens + 1) / 2, supervised, tiles)

    def _count(self, tokens: Any, pairs: Any, supervised: Any, tiles: Any) -> Any:
        llm = self.decoder * tokens + self.attention * pairs + self.supervised * supervised
        vision = self.vision_passes * self.tile + self.projector_passes * self.projector
        return self.llm_passes * llm + vision * tiles


def count_flops(model: InternVLChatModel) -> FlopCounter:
    """Count the FLOPs of a model whose trainable parameters have been chosen."""
    vision, config = model.config.vision_config, model.language_model.config
    last = model.config.select_layer
    blocks = last if last >= 0 else vision.num_hidden_layers + 1 + last
    head = config.vocab_size * config.hidden_size
    last_mlp = 0
    if has_supervised_head(model):
        mlp = model.language_model.get_decoder().layers[-1].mlp
        last_mlp = sum(p.numel() for n, p in mlp.named_parameters() if p.ndim == 2 and ".lora_" not in n)
    embeddings = model.language_model.get_input_embeddings().weight.numel()
    llm = sum(
        p.numel() for n, p in model.language_model.named_parameters() if p.ndim == 2 and ".lora_" not in n
    )
    tied = (
        model.language_model.get_output_embeddings().weight
        is model.language_model.get_input_embeddings().weight
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = vision.grid**2 + 1
    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    tower = 2 * tokens * block * blocks
    tower += 4 * tokens**2 * vision.hidden_size * blocks
    tower += 2 * (tokens - 1) * vision.hidden_size * vision.num_channels * vision.patch_size**2
    mlp = sum(p.numel() for p in model.mlp1.parameters() if p.ndim == 2)
    trains_llm = any(
        p.requires_grad and ".lora_" not in n for n, p in model.language_model.named_parameters()
    )
    trains_mlp = any(p.requires_grad for p in model.mlp1.parameters())
    trains_vision = not model.vision_is_frozen
    reaches_llm = trains_llm or trains_mlp or trains_vision or model.config.use_llm_lora > 0
    return FlopCounter(
        decoder=2.0 * (llm - embeddings - (0 if tied else head) - last_mlp),
        attention=4.0 * config.num_hidden_layers * config.num_attention_heads * head_dim,
        supervised=2.0 * (head + last_mlp),
        tile=float(tower),
        projector=2.0 * mlp * model.config.tokens_per_tile,
        llm_passes=3 if trains_llm else 2 if reaches_llm else 1,
        vision_passes=3 if trains_vision else 1,
        projector_passes=3 if trains_mlp else 2 if trains_vision else 1,
    )

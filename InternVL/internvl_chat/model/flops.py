"""FLOPs of a training step, and the peak FLOP/s of the hardware."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from internvl_chat.model.kernels.apply import has_supervised_head
from internvl_chat.model.lora.quantization import parameter_count
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils.gpus import find_gpu


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak FLOP/s of a device; None if unknown."""
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.tflops * 1e12


@dataclass(frozen=True)
class FlopCounter:
    """FLOPs of the forward pass by component, and the cost of training as a multiple of the forward pass.

    Attributes:
        decoder: FLOPs per token in the language-model weights that are applied to all tokens.
        attention: FLOPs per pair of a token and one of the tokens that it attends to.
        supervised: FLOPs per supervised token in the weights that are applied to these tokens only: the head
            and, with the optional kernels, the last MLP.
        tile: FLOPs per tile in the vision tower.
        projector: FLOPs per tile in `mlp1`.
        llm_passes: cost of the language model in a training step, as a multiple of its forward pass: 1 for
            forward only, 2 if gradients pass through it, 3 if it is trained.
        vision_passes: same as `llm_passes`, for the vision tower.
        projector_passes: same as `llm_passes`, for `mlp1`.
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
        """Return the FLOPs of a training step, without those of recomputing checkpointed activations.

        Args:
            lengths: number of tokens of each record.
            supervised: number of supervised tokens of all records.
            tiles: number of tiles of all records.
        """
        pairs = sum(n * (n + 1) / 2 for n in lengths)
        return self._count(sum(lengths), pairs, supervised, tiles)

    def records(self, tokens: np.ndarray, supervised: np.ndarray, tiles: np.ndarray) -> np.ndarray:
        """Return the training FLOPs of each record; all arrays have one entry per record."""
        tokens = tokens.astype(np.float64)
        return self._count(tokens, tokens * (tokens + 1) / 2, supervised, tiles)

    def _count(self, tokens: Any, pairs: Any, supervised: Any, tiles: Any) -> Any:
        llm = self.decoder * tokens + self.attention * pairs + self.supervised * supervised
        vision = self.vision_passes * self.tile + self.projector_passes * self.projector
        return self.llm_passes * llm + vision * tiles


def count_flops(model: InternVLChatModel) -> FlopCounter:
    """Return the FLOPs of a model; call this after `set_trainable`, which determines the number of passes."""
    vision, llm = model.config.vision_config, model.language_model
    embeddings, head = llm.get_input_embeddings().weight, llm.get_output_embeddings().weight
    config = llm.config
    experts = getattr(config, "num_experts_per_tok", 0) / (getattr(config, "num_experts", 0) or 1)
    last_mlp = _matrix_size(llm.get_decoder().layers[-1].mlp, experts) if has_supervised_head(model) else 0
    vocabulary = embeddings.numel() + (0 if head is embeddings else head.numel())
    decoder = _matrix_size(llm, experts) - vocabulary - last_mlp
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    tokens, blocks = vision.grid**2 + 1, model.vision_model.layers_before(model.config.select_layer)
    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    tile = 2 * tokens * block * blocks + 4 * tokens**2 * vision.hidden_size * blocks
    tile += 2 * (tokens - 1) * vision.hidden_size * vision.num_channels * vision.patch_size**2

    trains_llm = any(p.requires_grad and ".lora_" not in name for name, p in llm.named_parameters())
    trains_mlp = any(p.requires_grad for p in model.mlp1.parameters())
    trains_vision = not model.vision_is_frozen
    reaches_llm = trains_mlp or trains_vision or model.config.use_llm_lora > 0
    return FlopCounter(
        decoder=2.0 * decoder,
        attention=4.0 * config.num_hidden_layers * config.num_attention_heads * head_dim,
        supervised=2.0 * (head.numel() + last_mlp),
        tile=float(tile),
        projector=2.0 * _matrix_size(model.mlp1) * model.config.tokens_per_tile,
        llm_passes=3 if trains_llm else 2 if reaches_llm else 1,
        vision_passes=3 if trains_vision else 1,
        projector_passes=3 if trains_mlp else 2 if trains_vision else 1,
    )


def _matrix_size(module: nn.Module, active_experts: float = 0.0) -> float:
    """Return the number of weights in matrices that are applied to each token, without adapters.

    Args:
        active_experts: fraction of the experts that are applied to each token; stacked matrices are experts.
    """
    weights = [p for name, p in module.named_parameters() if ".lora_" not in name]
    dense = sum(parameter_count(p) for p in weights if p.ndim == 2)
    return dense + active_experts * sum(p.numel() for p in weights if p.ndim == 3)

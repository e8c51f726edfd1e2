"""A last decoder layer whose MLP runs at the positions that have labels only.

Other positions matter only as keys and values of the layer's attention.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


class LastLayer(GradientCheckpointingLayer):
    """A pre-norm decoder layer (norm, attention, norm, MLP) with the modules, and so the names, of another.

    Args:
        layer: a layer of a Llama, Mistral, Qwen2 or Qwen3 model.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm

    def forward(
        self, hidden_states: torch.Tensor, output_positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """(B, T, C) -> (B, T, C), or (1, T, C) -> (1, U, C) with `output_positions` (U,)."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        if output_positions is not None:
            hidden_states = hidden_states[:, output_positions]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

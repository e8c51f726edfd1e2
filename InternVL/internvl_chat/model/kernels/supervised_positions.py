"""A decoder that computes its last layer's MLP, norm and head only for the tokens that are asked for.

Of the last layer, other tokens need no more than what attention reads of them: keys and values.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from internvl_chat.model.kernels.rms_norm import use_lean_norms
from internvl_chat.model.kernels.supervised_head import SupervisedHead

# Model types whose layer is norm, attention, norm, MLP with plain residuals, and whose logits are the head's.
_PLAIN = ("llama", "mistral", "qwen2", "qwen3")


def make_lean(language_model: PreTrainedModel) -> None:
    """Let the decoder take `output_places` and the head targets, where the model's kind can; see `is_lean`.

    The decoder then returns the hidden states at these places only: (1, T, C) in, (1, U, C) out. To be called
    again where transformers has made a new head, as for a vocabulary that grows.
    """
    head = language_model.get_output_embeddings()
    if language_model.config.model_type not in _PLAIN or head.bias is not None:
        return
    if type(head) is nn.Linear:
        head.__class__ = SupervisedHead
    use_lean_norms(language_model)
    last = language_model.get_decoder().layers[-1]
    if not isinstance(last, LeanLayer):
        last.__class__ = _lean_layer(type(last))


def is_lean(language_model: PreTrainedModel) -> bool:
    """Say whether the decoder takes `output_places` and the head targets.

    A head with adapters of its own takes none.
    """
    last = language_model.get_decoder().layers[-1]
    return isinstance(last, LeanLayer) and isinstance(language_model.get_output_embeddings(), SupervisedHead)


class LeanLayer:
    """A decoder layer whose MLP runs at `output_places` only, if they are given; mixed into its class."""

    def forward(
        self, hidden_states: torch.Tensor, output_places: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """(1, T, C) -> (1, U, C), or (B, T, C) as it is."""
        if output_places is None:
            return super().forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        chosen = (hidden_states + attended)[:, output_places]
        return chosen + self.mlp(self.post_attention_layernorm(chosen))


@cache
def _lean_layer(layer_class: type[nn.Module]) -> type[nn.Module]:
    """Return a kind of decoder layer that can end at some of its tokens."""
    # transformers wraps the `forward` of each class of layers in its checkpointing, so that it needs its own.
    return type(f"Lean{layer_class.__name__}", (LeanLayer, layer_class), {"forward": LeanLayer.forward})

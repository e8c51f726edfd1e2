"""A decoder that computes its last layer's MLP, norm and head only for the tokens that are asked for.

Of the last layer, other tokens need no more than what attention reads of them: keys and values.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from internvl_chat.model.head import SupervisedHead
from internvl_chat.model.rms_norm import use_lean_norms

# Model types whose layer is norm, attention, norm, MLP with plain residuals, and whose logits are the head's.
_PLAIN = ("llama", "mistral", "qwen2", "qwen3")


def make_lean(language_model: PreTrainedModel) -> bool:
    """Let the decoder take `output_places` and the head targets; say whether the model's kind can.

    The decoder then returns the hidden states at these places only: (1, T, C) in, (1, U, C) out.
    """
    head = language_model.get_output_embeddings()
    if language_model.config.model_type not in _PLAIN or type(head) is not nn.Linear or head.bias is not None:
        return False
    head.__class__ = SupervisedHead
    use_lean_norms(language_model)
    last = language_model.get_decoder().layers[-1]
    last.__class__ = _lean_layer(type(last))
    return True


@cache
def _lean_layer(layer_class: type[nn.Module]) -> type[nn.Module]:
    """Return a kind of decoder layer that can end at some of its tokens."""

    class LeanLayer(layer_class):
        """A decoder layer whose MLP runs at `output_places` only, if they are given."""

        def forward(
            self, hidden_states: torch.Tensor, output_places: torch.Tensor | None = None, **kwargs: Any
        ) -> torch.Tensor:
            """(1, T, C) -> (1, U, C), or (B, T, C) as it is."""
            if output_places is None:
                return super().forward(hidden_states, **kwargs)
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            chosen = (hidden_states + attended)[:, output_places]
            return chosen + self.mlp(self.post_attention_layernorm(chosen))

    return LeanLayer

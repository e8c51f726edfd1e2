"""Attention with kept keys and values, each conversation by itself.

No conversation is padded to the length of another, so that it is computed beside others as it is alone.

Shapes: B rows, H query heads, K key/value heads, L tokens, D features a head.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from internvl_chat.model.attention import varlen_attention

_CACHED = "cached"


class RowCache:
    """Keys and values of one conversation in every layer, with room for a known number of tokens.

    Args:
        capacity: most tokens.

    Attributes:
        length: tokens that are kept; whoever runs the model counts them, when all layers have run.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._layers: dict[int, torch.Tensor] = {}

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the keys and values of new tokens, (K, L, D), and return those of all so far."""
        if layer not in self._layers:
            self._layers[layer] = key.new_empty(2, key.shape[0], self.capacity, key.shape[2])
        kept, end = self._layers[layer], self.length + key.shape[1]
        kept[0, :, self.length : end], kept[1, :, self.length : end] = key, value
        return kept[0, :, :end], kept[1, :, :end]


@contextlib.contextmanager
def cached_attention(language_model: PreTrainedModel) -> Iterator[None]:
    """Let a language model take `row_caches` in its forward pass."""
    config = language_model.config
    before = config._attn_implementation
    config._attn_implementation = _CACHED
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    row_caches: Sequence[RowCache | None],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks for it: for all tokens of one new conversation, or one more of each.

    Args:
        module: the attention layer.
        query: (1, H, L, D) or (B, H, 1, D).
        key: (1, K, L, D) or (B, K, 1, D).
        value: as `key`.
        attention_mask: none is made for this attention.
        row_caches: of each row; a row without one is empty, and nothing is computed for it.
        scaling: factor on the scores.
        sliding_window: tokens that a token sees, itself among them.
        options: of `varlen_attention`.

    Returns:
        (B, L, H, D).
    """
    kept = [
        None if cache is None else cache.extend(module.layer_idx, key[row], value[row])
        for row, cache in enumerate(row_caches)
    ]
    if query.shape[2] > 1:
        return varlen_attention(
            module, query, key, value, None, scaling=scaling, sliding_window=sliding_window, **options
        )
    out = torch.zeros_like(query)
    for row, pair in enumerate(kept):
        if pair is not None:
            keys, values = (x if sliding_window is None else x[:, -sliding_window:] for x in pair)
            # The query heads of a key head are queries of their own: that head need not be repeated.
            grouped = query[row].unflatten(0, (len(keys), -1)).squeeze(2)  # (K, H / K, D)
            found = F.scaled_dot_product_attention(
                grouped.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), scale=scaling
            )
            out[row] = found[0].flatten(0, 1).unsqueeze(1)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_CACHED, _attend)

"""Causal attention by products of matrices that fit a CPU's cache.

Shapes: H query heads, K key/value heads, L tokens, D features a head.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Queries at a time.
_BLOCK = 128


def blocked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    scaling: float | None = None,
) -> torch.Tensor:
    """Attend in blocks of queries, each against the keys of its segment up to the block's end only.

    Scores are in the inputs' dtype and their exponentials in float32, as in transformers' eager attention.
    The query heads of a key head are the rows of one matrix.

    Args:
        query: (1, H, L, D).
        key: (1, K, L, D).
        value: (1, K, L, D).
        lengths: of the segments; they add up to L.
        scaling: factor on the scores, 1 / sqrt(D) by default.

    Returns:
        (1, H, L, D), in memory of (1, L, H, D).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Blocked.apply(query[0], key[0], value[0], lengths, scale).unsqueeze(0)


class _Blocked(torch.autograd.Function):
    """Written with its gradient, because autograd would fill up the gradient of each block to the whole."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: Sequence[int],
        scale: float,
    ) -> torch.Tensor:
        """Attend within segments of these lengths, (H, L, D) and twice (K, L, D) -> (H, L, D)."""
        queries = (query * scale).unflatten(0, (len(key), -1))  # (K, H / K, L, D)
        hidden = torch.full((_BLOCK, _BLOCK), -torch.inf, dtype=query.dtype).triu_(1)
        # In memory, the heads of a token lie together, as the next layer wants them.
        out = query.new_empty(query.shape[1], *queries.shape[:2], query.shape[2]).permute(1, 2, 0, 3)
        weights = []
        for seen, block in _blocks(lengths):
            count = block.stop - block.start
            scores = queries[:, :, block].flatten(1, 2) @ key[:, seen].transpose(1, 2)
            scores.unflatten(1, (-1, count))[..., -count:].add_(hidden[:count, :count])
            weight = scores.softmax(-1)
            out[:, :, block] = (weight @ value[:, seen]).unflatten(1, (-1, count))
            if any(ctx.needs_input_grad):
                weights.append(weight)
        ctx.save_for_backward(queries, key, value, *weights)
        ctx.lengths, ctx.scale = lengths, scale
        return out.flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Go through the blocks from the last, whose keys are all of its segment."""
        queries, key, value, *weights = ctx.saved_tensors
        upstream = gradient.unflatten(0, queries.shape[:2])
        of_queries, of_key, of_value = (torch.empty_like(x) for x in (queries, key, value))
        written = key.shape[1]  # where what is written begins
        for (seen, block), weight in reversed(list(zip(_blocks(ctx.lengths), weights, strict=True))):
            above = upstream[:, :, block].flatten(1, 2)
            of_scores = torch._softmax_backward_data(above @ value[:, seen].mT, weight, -1, weight.dtype)
            of_queries[:, :, block] = (of_scores @ key[:, seen]).unflatten(1, queries[:, :, block].shape[1:3])
            for total, left, right in (
                (of_key, of_scores, queries[:, :, block].flatten(1, 2)),
                (of_value, weight, above),
            ):
                if seen.start < written:
                    total[:, seen] = left.mT @ right
                else:
                    total[:, seen] += left.mT @ right
            written = seen.start
        return of_queries.flatten(0, 1).mul_(ctx.scale), of_key, of_value, None, None


def _blocks(lengths: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of tokens with the tokens that they see: those of their segment up to their end."""
    begin = 0
    for length in lengths:
        for start in range(begin, begin + length, _BLOCK):
            stop = min(start + _BLOCK, begin + length)
            yield slice(begin, stop), slice(start, stop)
        begin += length

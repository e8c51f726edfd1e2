"""The training loss: next-token cross-entropy in which records, not tokens, are what is weighed.

A step's loss is sum(w_t * loss_t) / sum(w_t) over all supervised tokens t of the step, on every process.
`sample` weighs a token by 1 / n, n being the supervised tokens of its record, so that each record counts
the same; `square` by 1 / sqrt(n); `token` by 1 (InternVL 2.5, section 3.3).
"""

import torch
import torch.nn.functional as F

LOSS_REDUCTIONS = ("sample", "token", "square")

_EXPONENT = {"token": 0.0, "square": 0.5, "sample": 1.0}


def token_weight(num_supervised: int, reduction: str) -> float:
    """Return the weight of each supervised token of a record with that many of them.

    >>> token_weight(4, "sample"), token_weight(4, "square"), token_weight(4, "token")
    (0.25, 0.5, 1.0)
    """
    return num_supervised ** -_EXPONENT[reduction]


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each token in float32; (T, V) and (T,) -> (T,)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")

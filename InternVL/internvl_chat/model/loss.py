"""The training loss: next-token cross-entropy in which records, not tokens, are what is weighed.

A step's loss is sum(w_t * loss_t) / sum(w_t) over all supervised tokens t of the step, on every process.
`sample` weighs a token by 1 / n, n being the supervised tokens of its record, so that each record counts
the same; `square` by 1 / sqrt(n); `token` by 1 (InternVL 2.5, section 3.3).
"""

import torch

LOSS_REDUCTIONS = ("sample", "token", "square")

_EXPONENT = {"token": 0.0, "square": 0.5, "sample": 1.0}


def token_weight(num_supervised: int, reduction: str) -> float:
    """Return the weight of each supervised token of a record with that many of them.

    >>> token_weight(4, "sample"), token_weight(4, "square"), token_weight(4, "token")
    (0.25, 0.5, 1.0)
    """
    return num_supervised ** -_EXPONENT[reduction]


# Float32 logits in work at a time: what fits a CPU's caches, and few launches on a GPU.
_CHUNK_BYTES = {"cpu": 1 << 23, "cuda": 1 << 28}


def losses_in_place(logits: torch.Tensor, targets: torch.Tensor, *, gradient: bool) -> torch.Tensor:
    """Return the cross-entropy of each token and, if asked, leave its gradient where the logits were.

    Args:
        logits: (U, V) in any dtype; the arithmetic is float32.
        targets: (U,) int64.
        gradient: whether to replace the logits by the gradient of the losses' sum, softmax minus one-hot.

    Returns:
        (U,) float32.
    """
    rows = max(1, _CHUNK_BYTES.get(logits.device.type, 1 << 28) // (4 * logits.shape[1]))
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    # One buffer for all parts: memory that is new each time costs a CPU more than the arithmetic.
    buffer = logits.new_empty(min(rows, len(logits)), logits.shape[1], dtype=torch.float32)
    for start in range(0, len(logits), rows):
        part = logits[start : start + rows]
        places = targets[start : start + rows].unsqueeze(1)
        work = buffer[: len(part)].copy_(part)
        largest = work.amax(dim=1, keepdim=True)
        below = largest - work.gather(1, places)
        total = work.sub_(largest).exp_().sum(dim=1, keepdim=True)
        losses[start : start + rows] = total.log().add_(below).squeeze(1)
        if gradient:
            work.div_(total).scatter_add_(1, places, torch.full_like(below, -1.0))
            part.copy_(work)
    return losses

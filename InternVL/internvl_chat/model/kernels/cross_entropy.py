"""Cross-entropy in float32, chunk by chunk, that overwrites the logits with their gradient.

For logits z and target y, the loss is L = log(sum_v exp(z_v)) - z_y, and dL/dz = softmax(z) - onehot(y).

Shapes: U supervised tokens, V vocabulary.
"""

import torch

# Bytes of float32 logits per chunk: small enough for a CPU's cache, large enough for few kernel launches.
_CHUNK_BYTES = {"cpu": 1 << 23, "cuda": 1 << 28}


def cross_entropy_in_place(logits: torch.Tensor, targets: torch.Tensor, *, gradient: bool) -> torch.Tensor:
    """Return the loss of each token, (U,) float32.

    Args:
        logits: (U, V) in any floating-point dtype.
        targets: (U,) int64.
        gradient: whether to overwrite the logits with the gradient of the summed losses.
    """
    rows = max(1, _CHUNK_BYTES.get(logits.device.type, 1 << 28) // (4 * logits.shape[1]))
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    # On a CPU, allocating memory for each chunk would take longer than the arithmetic.
    buffer = logits.new_empty(min(rows, len(logits)), logits.shape[1], dtype=torch.float32)
    chunks = (x.split(rows) for x in (logits, targets.unsqueeze(1), losses))
    for chunk, labels, loss in zip(*chunks, strict=True):
        z = buffer[: len(chunk)].copy_(chunk)
        largest = z.amax(dim=1, keepdim=True)
        margin = largest - z.gather(1, labels)
        total = z.sub_(largest).exp_().sum(dim=1, keepdim=True)
        loss.copy_(total.log().add_(margin).squeeze(1))
        if gradient:
            z.div_(total).scatter_add_(1, labels, torch.full_like(margin, -1.0))
            chunk.copy_(z)
    return losses

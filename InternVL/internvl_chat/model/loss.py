"""Training loss: next-token cross-entropy with per-record weights (InternVL 2.5, section 3.3).

The loss of a step is the weighted mean over its supervised tokens i across all ranks,

    L = sum_i w_i * L_i / sum_i w_i,    w_i = 1 / n_i^x,

where n_i is the number of supervised tokens in the record of token i. With x = 1 (`sample`), all records have
the same total weight; with x = 0 (`token`), all tokens have the same weight; x = 0.5 (`square`) lies between
the two. `InternVLChatModel.forward` applies the weights w_i, and `TrainingLoop.train_step` divides by their
sum across all ranks.

Shapes: T tokens, U supervised tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

_EXPONENT = {"token": 0.0, "square": 0.5, "sample": 1.0}


def token_weight(num_supervised: int, reduction: str) -> float:
    """Return the loss weight of a token in a record with `num_supervised` supervised tokens.

    >>> token_weight(4, "sample"), token_weight(4, "square"), token_weight(4, "token")
    (0.25, 0.5, 1.0)
    """
    return num_supervised ** -_EXPONENT[reduction]


def next_token_losses(
    llm: PreTrainedModel, inputs: dict[str, Any], positions: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Return the cross-entropy of each supervised token, (U,) float32.

    Args:
        inputs: arguments of the language model for a packed row (1, T).
        positions: (U,) positions whose next token is supervised.
        targets: (U,) ids of these next tokens.
    """
    logits = llm(**inputs, logits_to_keep=positions).logits[0]
    return F.cross_entropy(logits.float(), targets, reduction="none")

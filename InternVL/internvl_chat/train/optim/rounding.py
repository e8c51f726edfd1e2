"""Rounding float32 to bf16 at random."""

import torch
from torch import Tensor


def stochastic_round_(values: Tensor, noise: Tensor) -> Tensor:
    """Round float32 `values` in place to one of the two nearest bf16 numbers, and return them.

    A number that lies at the share f of the way from one bf16 number to the next, away from zero, goes to the
    farther one with probability f. NaN stays NaN, infinities stay, and bf16 numbers stay as they are.

    Args:
        values: (N,) float32.
        noise: (N,) int32, uniform from 0 to 2**16 - 1.
    """
    # A NaN whose payload is all ones would overflow into another number: all become the standard NaN.
    values.nan_to_num_(nan=float("nan"), posinf=float("inf"), neginf=-float("inf"))
    values.view(torch.int32).add_(noise).bitwise_and_(-(2**16))
    return values

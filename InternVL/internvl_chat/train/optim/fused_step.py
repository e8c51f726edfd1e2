"""AdamW's step of a bf16 weight in one pass over memory, by torch.compile.

Operation by operation, as in `adamw.py`, a step moves 46 bytes of memory for each weight with a master and
88 for each weight that is rounded stochastically; in one pass it moves 34 and 28.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def step_factors(group: Mapping[str, Any], step: int) -> Tensor:
    """Return the scalars of step number `step` (from 1) of a parameter group: (6,) float32."""
    beta1, beta2 = group["betas"]
    decay = 1 - group["lr"] * group["weight_decay"]
    step_size, root_scale = group["lr"] / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    factors = [decay, 1 - beta1, 1 - beta2, step_size, root_scale, group["eps"]]
    return torch.tensor(factors, dtype=torch.float32)


@torch.compile(dynamic=True, fullgraph=True)
def fused_step(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor | None, factors: Tensor
) -> None:
    """Update a bf16 weight in float32: its master, rounded to nearest, or itself, rounded stochastically.

    Args:
        weight: (N,) bfloat16.
        grad: (N,).
        exp_avg, exp_avg_sq, master: (N,) float32; without a master the noise is of the default generator.
        factors: (6,), see `step_factors`.
    """
    decay, first, second, step_size, root_scale, eps = factors.unbind()
    grad = grad.float()
    exp_avg.add_((grad - exp_avg) * first)
    exp_avg_sq.add_((grad * grad - exp_avg_sq) * second)
    update = step_size * exp_avg / (exp_avg_sq.sqrt() * root_scale + eps)
    if master is None:
        noise = (torch.rand_like(exp_avg) * 2**16).to(torch.int32)
        weight.copy_(stochastic_round_(weight.float() * decay - update, noise))
    else:
        weight.copy_(master.copy_(master * decay - update))


def stochastic_round_(values: Tensor, noise: Tensor) -> Tensor:
    """Round float32 values in place to a neighbouring bf16 number, and return them.

    A value at fraction f of the way from one bf16 number to the next (away from zero) is rounded to the
    latter with probability f. NaN, infinities and bf16 numbers are unchanged.

    Args:
        values: (N,) float32.
        noise: (N,) int32, uniform in [0, 2**16).
    """
    # A NaN with a payload of all ones would overflow into another number: use the standard NaN.
    values.nan_to_num_(nan=float("nan"), posinf=float("inf"), neginf=-float("inf"))
    values.view(torch.int32).add_(noise).bitwise_and_(-(2**16))
    return values

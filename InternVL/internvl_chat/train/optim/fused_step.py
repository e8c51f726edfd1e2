"""AdamW step for bf16 weights in one pass over memory, compiled with torch.compile.

Memory traffic in bytes per weight, including gradient clipping:
- float32 master copies: 46 with the eager step in `adamw.py`, 34 with the compiled step
- stochastic rounding: 88 with the eager step, 28 with the compiled step
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def step_factors(group: Mapping[str, Any], step: int) -> Tensor:
    """Return the scalars that `fused_step` needs for a step (1-based) of a parameter group: (6,) float32."""
    beta1, beta2 = group["betas"]
    decay = 1 - group["lr"] * group["weight_decay"]
    step_size, root_scale = group["lr"] / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    factors = [decay, 1 - beta1, 1 - beta2, step_size, root_scale, group["eps"]]
    return torch.tensor(factors, dtype=torch.float32)


@torch.compile(dynamic=True, fullgraph=True)
def fused_step(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor | None, factors: Tensor
) -> None:
    """Apply one AdamW step in place to a bf16 weight, computing in float32.

    Args:
        weight: (N,) bfloat16.
        grad: (N,) gradient of any floating-point dtype.
        exp_avg: (N,) float32.
        exp_avg_sq: (N,) float32.
        master: (N,) float32 master copy of the weight; None for stochastic rounding with noise from
            torch's default generator.
        factors: (6,) float32, from `step_factors`.
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
    """Round float32 values stochastically to adjacent bf16 numbers; return the values, changed in place.

    A value at fraction f between two adjacent bf16 numbers is rounded away from zero with probability f. NaN,
    infinities and bf16 numbers do not change.

    Args:
        values: (N,) float32.
        noise: (N,) int32, uniform in [0, 2**16).
    """
    # Replace each NaN by the standard one: adding noise to a NaN whose bits are all ones would overflow.
    values.nan_to_num_(nan=float("nan"), posinf=float("inf"), neginf=-float("inf"))
    values.view(torch.int32).add_(noise).bitwise_and_(-(2**16))
    return values

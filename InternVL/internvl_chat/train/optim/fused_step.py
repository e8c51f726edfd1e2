"""AdamW's step of a bf16 weight in one pass over memory, by torch.compile.

Operation by operation, as in `train.optimizer`, a step moves 40 bytes of a weight with a master through
memory, and 82 of one that is rounded at random; in one pass they are 28 and 22.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from internvl_chat.train.optim.rounding import stochastic_round_


def step_factors(group: Mapping[str, Any], step: float) -> Tensor:
    """Return what the steps below take beside the tensors of a parameter: (6,) float32.

    Args:
        group: options of an optimizer's group: `lr`, `betas`, `eps` and `weight_decay`.
        step: the number of the parameter's step, from 1.
    """
    beta1, beta2 = group["betas"]
    shrink = 1 - group["lr"] * group["weight_decay"]
    size = group["lr"] / (1 - beta1**step)
    root = 1 / math.sqrt(1 - beta2**step)
    return torch.tensor([shrink, 1 - beta1, 1 - beta2, size, root, group["eps"]], dtype=torch.float32)


@torch.compile(dynamic=True, fullgraph=True)
def master_step(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor, factors: Tensor
) -> None:
    """Step a float32 master and round it to its bf16 weight.

    Args:
        weight: (N,) bfloat16.
        grad: (N,).
        exp_avg: (N,) float32, and so are `exp_avg_sq` and `master`.
        exp_avg_sq: the second moment.
        master: what is stepped.
        factors: of `step_factors`.
    """
    master.copy_(_stepped(master, grad, exp_avg, exp_avg_sq, factors))
    weight.copy_(master)


@torch.compile(dynamic=True, fullgraph=True)
def stochastic_step(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, factors: Tensor
) -> None:
    """Step a bf16 weight in float32 and round it at random, by torch's generator of the device.

    Args:
        weight: (N,) bfloat16.
        grad: (N,).
        exp_avg: (N,) float32, and so is `exp_avg_sq`.
        exp_avg_sq: the second moment.
        factors: of `step_factors`.
    """
    noise = (torch.rand_like(exp_avg) * 2**16).to(torch.int32)
    weight.copy_(stochastic_round_(_stepped(weight.float(), grad, exp_avg, exp_avg_sq, factors), noise))


def _stepped(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, factors: Tensor) -> Tensor:
    """Return the float32 weight after a step; the moments are moved in place."""
    shrink, first, second, size, root, eps = factors.unbind()
    grad = grad.float()
    exp_avg.add_((grad - exp_avg) * first)
    exp_avg_sq.add_((grad * grad - exp_avg_sq) * second)
    return weight * shrink - size * exp_avg / (exp_avg_sq.sqrt() * root + eps)

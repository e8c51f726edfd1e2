"""AdamW that keeps small updates of bf16 weights.

At a learning rate of 5e-6 most updates are below half the spacing of bf16 numbers, and rounding to nearest
discards them. Here moments and arithmetic are float32, and a bf16 weight either has a float32 master copy or
is rounded stochastically, which preserves small updates on average.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from internvl_chat.train.optim.fused_step import fused_step, step_factors, stochastic_round_

# Names of `--optim` that mean the AdamW of this module.
OWN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
WEIGHT_PRECISIONS = ("master", "stochastic", "bf16")

# Maximum elements that an eager step casts to float32 at a time. On a CPU this scratch must stay in the
# cache, yet be large enough to pay for waking the threads; on a GPU it holds any matrix but a vocabulary's.
_SLICE = {"cpu": 2**20, "cuda": 2**28}

_STATE_BYTES = {"master": 12, "stochastic": 8, "bf16": 4}
_SCRATCH_BYTES = {"master": 4, "stochastic": 12, "bf16": 0}


def bytes_per_parameter(precision: str, dtype: torch.dtype) -> int:
    """Return the bytes of weight, gradient and optimizer state per trained float32 or bfloat16 parameter."""
    return 2 * dtype.itemsize + _STATE_BYTES["stochastic" if dtype == torch.float32 else precision]


def scratch_bytes(precision: str, parameters: Iterable[Tensor], device_type: str, compiled: bool) -> int:
    """Return the temporary memory of a step of these parameters (a DTensor's shard); none if compiled."""
    counts = [_local(p).numel() for p in parameters if p.dtype == torch.bfloat16]
    return 0 if compiled else _SCRATCH_BYTES[precision] * _slice_size(counts, device_type)


def build_adamw(
    groups: Sequence[dict[str, Any]],
    *,
    precision: str,
    seed: int = 0,
    compiled: bool = False,
    **options: Any,
) -> torch.optim.Optimizer:
    """Return a fused AdamW that updates bf16 weights in the given precision.

    Float32 parameters are updated as by `torch.optim.AdamW`, bit for bit, in every precision.

    Args:
        groups: parameter groups.
        precision: `master` (a float32 copy of each bf16 weight), `stochastic` (stochastic rounding; less
            memory) or `bf16` (weights and moments in bf16, as the reference trains).
        seed, compiled, options: see `Float32AdamW`.

    Raises:
        ValueError: unknown precision.
    """
    if precision not in WEIGHT_PRECISIONS:
        raise ValueError(f"weight precision {precision!r} is none of {', '.join(WEIGHT_PRECISIONS)}")
    parameters = itertools.chain.from_iterable(group["params"] for group in groups)
    if precision == "bf16" or all(p.dtype == torch.float32 for p in parameters):
        return torch.optim.AdamW(groups, fused=True, **options)
    return Float32AdamW(groups, precision=precision, seed=seed, compiled=compiled, **options)


class _Slice(NamedTuple):
    """The local tensors of a parameter, or a flat slice of them, and the number of its step."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None
    step: int

    def split(self, size: int) -> Iterator["_Slice"]:
        """Flatten and split into slices of at most `size` elements; only the gradient may be copied."""
        flat = self.weight.view(-1), self.grad.reshape(-1), self.exp_avg.view(-1), self.exp_avg_sq.view(-1)
        masters = itertools.repeat(None) if self.master is None else self.master.view(-1).split(size)
        for *tensors, master in zip(*(tensor.split(size) for tensor in flat), masters, strict=False):
            yield _Slice(*tensors, master, self.step)


class Float32AdamW(torch.optim.Optimizer):
    """AdamW with float32 arithmetic and moments for bf16 and float32 parameters.

    State of a parameter: `exp_avg` and `exp_avg_sq` in float32 and its shape (DTensors if it is one), `step`
    (float32 scalar on the CPU), and in precision `master` the float32 `master` of a bf16 weight. The master
    moves exactly as a float32 weight with the same gradients. Without a gradient nothing changes.

    The noise of stochastic rounding follows from the seed, the number of steps so far (both saved in the
    groups) and the group's index: data-parallel ranks round alike, and a resumed run as an uninterrupted one.

    Args:
        params: parameters or groups on one device, bf16 or float32.
        precision: `master` or `stochastic`.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        seed: seed of the stochastic rounding.
        compiled: update bf16 weights in one compiled pass over memory.

    Raises:
        TypeError: a parameter of another dtype.
        RuntimeError: in a step, a sparse gradient or a bf16 parameter that is not contiguous.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        precision: str,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        compiled: bool = False,
    ) -> None:
        self.stochastic, self.compiled = precision == "stochastic", compiled
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "seed": seed, "roundings": 0})
        for parameter in itertools.chain.from_iterable(group["params"] for group in self.param_groups):
            if parameter.dtype not in (torch.bfloat16, torch.float32):
                raise TypeError(f"trained parameters are float32 or bfloat16, not {parameter.dtype}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient; closures are not supported."""
        for index, group in enumerate(self.param_groups):
            slices = [self._next_step(p) for p in group["params"] if p.grad is not None]
            float32 = [one for one in slices if one.weight.dtype == torch.float32]
            _adamw(float32, [one.weight for one in float32], [one.grad for one in float32], group)
            # A rank's shard of a small parameter may be empty.
            bf16 = [one for one in slices if one.weight.dtype == torch.bfloat16 and one.weight.numel()]
            if bf16:
                # Hashed, because CPU generators use 32 bits of a seed and neighbours should be unrelated.
                noise_seed = random.Random(f"{group['seed']} {group['roundings']} {index}").getrandbits(63)
                group["roundings"] += 1
                (self._update_compiled if self.compiled else self._update)(bf16, group, noise_seed)

    def _next_step(self, parameter: Tensor) -> _Slice:
        """Return what the next step of a parameter uses; its state is made in the first."""
        if parameter.grad.is_sparse:
            raise RuntimeError(
                "AdamW does not support sparse gradients; make the embedding with sparse=False"
            )
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        if "master" not in state and parameter.dtype == torch.bfloat16 and not self.stochastic:
            state["master"] = parameter.detach().float()
        state["step"] += 1
        tensors = parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state.get("master")
        return _Slice(*map(_local, tensors), step=int(state["step"]))

    def _update(self, parameters: list[_Slice], group: dict[str, Any], noise_seed: int) -> None:
        """Update bf16 weights operation by operation, slice by slice."""
        device = parameters[0].weight.device
        size = _slice_size([one.weight.numel() for one in parameters], device.type)
        scratch = torch.empty(1 + self.stochastic, size, dtype=torch.float32, device=device)
        if self.stochastic:
            generator = torch.Generator(device).manual_seed(noise_seed)
            noise = torch.empty_like(scratch[0], dtype=torch.int32).random_(0, 2**16, generator=generator)
        for one in itertools.chain.from_iterable(one.split(size) for one in parameters):
            count = len(one.weight)
            grad = scratch[0, :count].copy_(one.grad)
            if not self.stochastic:
                _adamw([one], [one.master], [grad], group)
                one.weight.copy_(one.master)
                continue
            weight = scratch[1, :count].copy_(one.weight)
            _adamw([one], [weight], [grad], group)
            # Drawing noise takes a CPU longer than the step, so noise is reused under a new random mask: each
            # number is still uniform, and any two are independent.
            mask = torch.empty_like(noise[0]).random_(0, 2**16, generator=generator)
            one.weight.copy_(stochastic_round_(weight, noise[:count].bitwise_xor_(mask)))

    def _update_compiled(self, parameters: list[_Slice], group: dict[str, Any], noise_seed: int) -> None:
        """Update bf16 weights in one pass each."""
        device = parameters[0].weight.device
        steps = {one.step for one in parameters}
        factors = {step: step_factors(group, step).to(device, non_blocking=True) for step in steps}
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=self.stochastic):
            if self.stochastic:
                torch.manual_seed(noise_seed)
            for one in parameters:
                (flat,) = one.split(one.weight.numel())
                # `data` is no view: torch would compile again for other shapes of what is viewed.
                fused_step(*(None if t is None else t.data for t in flat[:-1]), factors[one.step])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of any precision, in float32 (torch would cast it to the dtype of the weights).

        What is not used here is dropped; what is missing is made in the next step.
        """
        super().load_state_dict({**state_dict, "state": {}})
        for group, name in itertools.product(self.param_groups, self.defaults):
            group.setdefault(name, self.defaults[name])
        parameters = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        names = ("step", "exp_avg", "exp_avg_sq", *(() if self.stochastic else ("master",)))
        for parameter, key in zip(parameters, saved, strict=True):
            if key in state_dict["state"]:
                self.state[parameter] = {
                    name: value.to("cpu" if name == "step" else parameter.device, torch.float32)
                    for name, value in state_dict["state"][key].items()
                    if name in names
                }


def _adamw(
    slices: Sequence[_Slice], weights: list[Tensor], grads: list[Tensor], group: dict[str, Any]
) -> None:
    """Update float32 weights with float32 gradients and the slices' moments, by torch's fused kernel."""
    if not slices:
        return
    # torch increments the steps that it is given.
    steps = torch.tensor([one.step - 1.0 for one in slices], dtype=torch.float32)
    steps = list(steps.to(weights[0].device, non_blocking=True).unbind())
    moments = [one.exp_avg for one in slices], [one.exp_avg_sq for one in slices]
    options = {name: group[name] for name in ("lr", "eps", "weight_decay")}
    options |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
    adamw(weights, grads, *moments, [], steps, fused=True, amsgrad=False, maximize=False, **options)


def _local(tensor: Tensor | None) -> Tensor | None:
    """Return this rank's shard of a DTensor, any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _slice_size(counts: Sequence[int], device_type: str) -> int:
    """Return the elements of a slice, for parameters of so many elements each."""
    return min(max(counts, default=0), _SLICE[device_type])

"""AdamW for bf16 weights that does not lose small updates.

At a learning rate of 5e-6, most updates are less than half the spacing of bf16 numbers, so rounding to
nearest discards them. This AdamW computes in float32. Each bf16 weight has a float32 master copy or is
rounded stochastically, which preserves small updates on average.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from internvl_chat.constants import WEIGHT_PRECISIONS
from internvl_chat.train.distributed.strategy import local_shard
from internvl_chat.train.optim.fused_step import fused_step, step_factors, stochastic_round_

# Values of `--optim` that select the AdamW of this module.
OWN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")

# Maximum number of elements that an eager step casts to float32 at a time. On a CPU, the scratch memory
# should fit in the cache but be large enough for multithreading. On a GPU, only embeddings and heads exceed
# the limit.
_SLICE = {"cpu": 2**20, "cuda": 2**28}

_STATE_BYTES = {"master": 12, "stochastic": 8, "bf16": 4}
_SCRATCH_BYTES = {"master": 4, "stochastic": 12, "bf16": 0}


def bytes_per_parameter(precision: str, dtype: torch.dtype) -> int:
    """Return the bytes per element of a trainable parameter: weight, gradient and optimizer state.

    Args:
        precision: see `build_adamw`.
        dtype: dtype of the parameter, float32 or bfloat16.
    """
    return 2 * dtype.itemsize + _STATE_BYTES["stochastic" if dtype == torch.float32 else precision]


def scratch_bytes(precision: str, parameters: Iterable[Tensor], device_type: str, compiled: bool) -> int:
    """Return the scratch memory in bytes that a step needs on this rank; 0 if the step is compiled."""
    counts = [local_shard(p).numel() for p in parameters if p.dtype == torch.bfloat16]
    return 0 if compiled else _SCRATCH_BYTES[precision] * _slice_size(counts, device_type)


def build_adamw(
    groups: Sequence[dict[str, Any]], *, precision: str, seed: int = 0, compiled: bool = False, **options: Any
) -> torch.optim.Optimizer:
    """Return a fused AdamW that updates bf16 weights with the given precision.

    Float32 parameters are updated bit-identically to `torch.optim.AdamW`, regardless of the precision.

    Args:
        precision: `master` (a float32 copy of each bf16 weight), `stochastic` (stochastic rounding; less
            memory) or `bf16` (bf16 weights and moments, like the reference).
        seed: see `Float32AdamW`.
        compiled: see `Float32AdamW`.
        options: arguments of both `Float32AdamW` and `torch.optim.AdamW`, such as `lr`.

    Raises:
        ValueError: the precision is unknown.
    """
    if precision not in WEIGHT_PRECISIONS:
        raise ValueError(f"weight precision {precision!r} must be one of {', '.join(WEIGHT_PRECISIONS)}")
    parameters = itertools.chain.from_iterable(group["params"] for group in groups)
    if precision == "bf16" or all(p.dtype == torch.float32 for p in parameters):
        return torch.optim.AdamW(groups, fused=True, **options)
    return Float32AdamW(groups, precision=precision, seed=seed, compiled=compiled, **options)


class _Slice(NamedTuple):
    """Local tensors of a parameter, or flat slices of them, and the number of its current step."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None
    step: int

    def split(self, size: int) -> Iterator["_Slice"]:
        """Split into flat slices of at most `size` elements; all are views, except possibly the gradient."""
        flat = self.weight.view(-1), self.grad.reshape(-1), self.exp_avg.view(-1), self.exp_avg_sq.view(-1)
        masters: Iterable[Tensor | None]
        masters = itertools.repeat(None) if self.master is None else self.master.view(-1).split(size)
        weights, grads, averages, squares = (tensor.split(size) for tensor in flat)
        for weight, grad, average, square, master in zip(
            weights, grads, averages, squares, masters, strict=False
        ):
            yield _Slice(weight, grad, average, square, master, self.step)


class Float32AdamW(torch.optim.Optimizer):
    """AdamW with float32 arithmetic and moments for bf16 and float32 parameters.

    State of a parameter:
    - `exp_avg`, `exp_avg_sq`: moments in float32 (DTensors if the parameter is one).
    - `step`: float32 scalar on the CPU.
    - `master`: float32 copy of a bf16 weight, with precision `master`; updated exactly like a float32 weight.

    The noise of stochastic rounding depends only on the seed, the number of steps and the index of the
    parameter group. The seed and the number of steps are saved, so a resumed run rounds identically, as do
    all data-parallel ranks.

    Args:
        params: bf16 or float32 parameters, or parameter groups, all on one device.
        precision: `master` or `stochastic`.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        seed: seed of the stochastic rounding.
        compiled: update bf16 weights in one compiled pass over memory.

    Raises:
        TypeError: a parameter is neither bf16 nor float32.
        RuntimeError: raised by `step` if a gradient is sparse or a bf16 parameter is not contiguous.
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
                raise TypeError(f"trained parameters must be float32 or bfloat16, not {parameter.dtype}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        """Update all parameters that have gradients; closures are not supported."""
        for index, group in enumerate(self.param_groups):
            slices = [self._next_step(p, p.grad) for p in group["params"] if p.grad is not None]
            float32 = [s for s in slices if s.weight.dtype == torch.float32]
            _adamw(float32, [s.weight for s in float32], [s.grad for s in float32], group)
            # With sharding, the local part of a small parameter may be empty.
            bf16 = [s for s in slices if s.weight.dtype == torch.bfloat16 and s.weight.numel()]
            if bf16:
                # Hashed, because CPU generators use only 32 bits of a seed.
                noise_seed = random.Random(f"{group['seed']} {group['roundings']} {index}").getrandbits(63)
                group["roundings"] += 1
                (self._update_compiled if self.compiled else self._update)(bf16, group, noise_seed)

    def _next_step(self, parameter: Tensor, gradient: Tensor) -> _Slice:
        """Increment the step count of a parameter and return its local tensors.

        Optimizer state is created on the first step.
        """
        if gradient.is_sparse:
            raise RuntimeError("AdamW does not support sparse gradients; use an embedding with sparse=False")
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        if "master" not in state and parameter.dtype == torch.bfloat16 and not self.stochastic:
            state["master"] = parameter.detach().float()
        state["step"] += 1
        master = local_shard(state["master"]) if "master" in state else None
        averages = local_shard(state["exp_avg"]), local_shard(state["exp_avg_sq"])
        return _Slice(local_shard(parameter), local_shard(gradient), *averages, master, int(state["step"]))

    def _update(self, parameters: list[_Slice], group: dict[str, Any], noise_seed: int) -> None:
        """Update bf16 weights eagerly, slice by slice."""
        device = parameters[0].weight.device
        size = _slice_size([s.weight.numel() for s in parameters], device.type)
        scratch = torch.empty(1 + self.stochastic, size, dtype=torch.float32, device=device)
        if self.stochastic:
            generator = torch.Generator(device).manual_seed(noise_seed)
            noise = torch.empty_like(scratch[0], dtype=torch.int32).random_(0, 2**16, generator=generator)
        for part in itertools.chain.from_iterable(s.split(size) for s in parameters):
            count = len(part.weight)
            grad = scratch[0, :count].copy_(part.grad)
            if part.master is not None:
                _adamw([part], [part.master], [grad], group)
                part.weight.copy_(part.master)
                continue
            weight = scratch[1, :count].copy_(part.weight)
            _adamw([part], [weight], [grad], group)
            # On a CPU, sampling noise would take longer than the step. Reuse the noise after XOR with a
            # random mask: the numbers remain uniform and pairwise independent.
            mask = torch.empty_like(noise[0]).random_(0, 2**16, generator=generator)
            part.weight.copy_(stochastic_round_(weight, noise[:count].bitwise_xor_(mask)))

    def _update_compiled(self, parameters: list[_Slice], group: dict[str, Any], noise_seed: int) -> None:
        """Update each bf16 weight in one pass over memory."""
        device = parameters[0].weight.device
        steps = {s.step for s in parameters}
        factors = {step: step_factors(group, step).to(device, non_blocking=True) for step in steps}
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=self.stochastic):
            if self.stochastic:
                torch.manual_seed(noise_seed)
            for parameter in parameters:
                (flat,) = parameter.split(parameter.weight.numel())
                # Pass `.data`: for a view, torch would recompile for each shape of its base tensor.
                weight, grad, average, square = (tensor.data for tensor in flat[:4])
                master = None if flat.master is None else flat.master.data
                fused_step(weight, grad, average, square, master, factors[parameter.step])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state that was saved with any precision, in float32.

        torch's own method would cast the state to the parameter dtype. Entries that this precision does not
        use are dropped; missing entries are created in the next step.
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
    """Update the float32 `weights` and the moments of `slices` with torch's fused kernel."""
    if not slices:
        return
    # The kernel increments the step count before it uses it.
    counts = torch.tensor([s.step - 1.0 for s in slices], dtype=torch.float32)
    steps = list(counts.to(weights[0].device, non_blocking=True).unbind())
    moments = [s.exp_avg for s in slices], [s.exp_avg_sq for s in slices]
    options = {name: group[name] for name in ("lr", "eps", "weight_decay")}
    options |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
    adamw(weights, grads, *moments, [], steps, fused=True, amsgrad=False, maximize=False, **options)


def _slice_size(counts: Sequence[int], device_type: str) -> int:
    """Return the slice size in elements, given the element counts of all parameters."""
    return min(max(counts, default=0), _SLICE[device_type])

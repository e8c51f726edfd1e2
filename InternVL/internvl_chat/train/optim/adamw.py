"""AdamW whose small steps are not lost in bf16 weights.

At a learning rate of 5e-6 most updates are below half the spacing of bf16 numbers, and rounding to nearest
throws them away. Here moments and arithmetic are float32, by torch's fused kernel, and a bf16 weight either
has a float32 master copy or is rounded at random, which keeps the small updates on average.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.training_args import OptimizerNames

from internvl_chat.train.optim.fused_step import master_step, step_factors, stochastic_step
from internvl_chat.train.optim.rounding import stochastic_round_

# The names that transformers has for what `build_optimizer` makes.
OWN_OPTIMIZERS = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)

WEIGHT_PRECISIONS = ("auto", "master", "stochastic", "bf16")

# Elements that are cast and stepped together. On a CPU the float32 scratch must stay in the cache, yet be
# large enough to pay for waking the threads; on a GPU it bounds memory (256 MB a buffer) and launches.
_CPU_SLICE = 2**20
_GPU_SLICE = 2**26
# Slices start at multiples of this, so that vector instructions meet the elements that they meet unsliced.
_ALIGNMENT = 64

_STATE_BYTES = {"master": 12, "stochastic": 8, "bf16": 4}


def bytes_per_parameter(precision: str, dtype: torch.dtype) -> int:
    """Return the bytes of weight, gradient and optimizer state of one trained parameter.

    Args:
        precision: `master`, `stochastic` or `bf16`.
        dtype: of the parameter, float32 (stepped alike whatever the precision) or bfloat16.

    Raises:
        ValueError: for another precision (`auto` must be resolved before) or dtype.
    """
    if precision not in _STATE_BYTES:
        raise ValueError(f"weight precision {precision!r} is none of {', '.join(_STATE_BYTES)}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"trained parameters are float32 or bfloat16, not {dtype}")
    state = 8 if dtype == torch.float32 else _STATE_BYTES[precision]
    return 2 * dtype.itemsize + state


def build_optimizer(
    parameter_groups: Sequence[dict[str, Any]],
    *,
    precision: str,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    seed: int,
    compiled: bool = False,
) -> torch.optim.Optimizer:
    """Return a fused AdamW that keeps bf16 weights in the way asked for.

    Float32 parameters are stepped as by `torch.optim.AdamW`, bit for bit, whatever the precision.

    Args:
        parameter_groups: as torch's, each with a list `params` and its own options, such as `weight_decay`.
        precision: `master` (a float32 copy of each bf16 weight), `stochastic` (rounded at random, so that the
            mean is right; less memory) or `bf16` (weights and moments in bf16, as the reference trains).
        lr: learning rate, unless a group has its own; as are `betas`, `eps` and `weight_decay`.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, so each step takes the share `lr * weight_decay` off a weight.
        seed: of the stochastic rounding.
        compiled: whether float32 arithmetic on bf16 weights is to be one compiled pass over memory.

    Raises:
        ValueError: for another precision; `auto` must be resolved before.
    """
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if precision not in _STATE_BYTES:
        raise ValueError(f"weight precision {precision!r} is none of {', '.join(_STATE_BYTES)}")
    parameters = chain.from_iterable(group["params"] for group in parameter_groups)
    if precision == "bf16" or all(p.dtype == torch.float32 for p in parameters):
        return torch.optim.AdamW(parameter_groups, fused=True, **options)
    if precision == "master":
        return MasterAdamW(parameter_groups, compiled=compiled, **options)
    return StochasticAdamW(parameter_groups, seed=seed, compiled=compiled, **options)


def group_by_decay(model: nn.Module, decayed: Collection[str], weight_decay: float) -> list[dict[str, Any]]:
    """Return the trained parameters as groups: those whose weights decay, by their names, and the others."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in decayed].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


class _Row(NamedTuple):
    """What the step of one parameter, or of a slice of it, reads and writes."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    master: Tensor | None

    def pieces(self, size: int) -> Iterator["_Row"]:
        """Cut the row flat into pieces of at most `size` elements; only the gradient may be copied."""
        flat = self.weight.view(-1), self.grad.reshape(-1), self.exp_avg.view(-1), self.exp_avg_sq.view(-1)
        masters = itertools.repeat(None) if self.master is None else self.master.view(-1).split(size)
        for *piece, master in zip(*(tensor.split(size) for tensor in flat), masters, strict=False):
            yield _Row(*piece, self.step, master)


class Float32AdamW(torch.optim.Optimizer):
    """AdamW with float32 arithmetic and moments for bf16 and float32 parameters; the base of the two ways.

    State of a parameter: `exp_avg` and `exp_avg_sq` in float32 and its shape (DTensors where it is one), and
    `step`, a float32 scalar on its device. Parameters without a gradient are left alone.

    Args:
        params: parameters or groups of them, bf16 or float32.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        compiled: whether the step of bf16 weights is one compiled pass over memory.
        extra: further options of a group, saved with the state.

    Raises:
        TypeError: for a parameter of another dtype.
        RuntimeError: at a step with a sparse gradient, or with a bf16 parameter that is not contiguous.
    """

    _state_names: tuple[str, ...] = ("step", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        compiled: bool = False,
        **extra: Any,
    ) -> None:
        self.compiled = compiled
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **extra}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, once the dtypes are known to be right."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in (torch.bfloat16, torch.float32):
                raise TypeError(f"trained parameters are float32 or bfloat16, not {parameter.dtype}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient; return what the closure, if any, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            for rows in self._rows_by_device(group["params"]):
                torch._foreach_add_([row.step for row in rows], 1)
                wide = [row for row in rows if row.weight.dtype == torch.float32]
                _adamw(wide, [row.weight for row in wide], [row.grad for row in wide], group)
                # Of a small parameter that is sharded, some processes hold nothing.
                narrow = [row for row in rows if row.weight.dtype == torch.bfloat16 and row.weight.numel()]
                if narrow:
                    self._step_bf16(narrow, group, index)
        return loss

    def _step_bf16(self, rows: list[_Row], group: dict[str, Any], index: int) -> None:
        """Step the bf16 parameters of group number `index` that are on one device."""
        raise NotImplementedError

    def _rows_by_device(self, parameters: Iterable[Tensor]) -> Iterable[list[_Row]]:
        rows: defaultdict[torch.device, list[_Row]] = defaultdict(list)
        for parameter in parameters:
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                raise RuntimeError("AdamW takes no sparse gradients; make the embedding with sparse=False")
            state = self._state(parameter)
            moments = state["exp_avg"], state["exp_avg_sq"]
            tensors = (parameter, parameter.grad, *moments, state["step"], state.get("master"))
            rows[parameter.device].append(_Row(*map(_local, tensors)))
        return rows.values()

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return a parameter's state, with whatever it lacks made: all at the first step."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, keeping the state float32 (torch would cast it to the weight's dtype).

        The state may be of another precision: what this one does not use is left out, and what it misses is
        made at the next step. Group options that the saved optimizer did not know keep their value here.
        """
        super().load_state_dict({**state_dict, "state": {}})
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for parameter, key in zip(parameters, saved, strict=True):
            if key in state_dict["state"]:
                self.state[parameter] = {
                    name: value.to(device=parameter.device, dtype=torch.float32)
                    for name, value in state_dict["state"][key].items()
                    if name in self._state_names
                }


class MasterAdamW(Float32AdamW):
    """`Float32AdamW` with a float32 `master` of each bf16 weight in the state, made at the first step.

    The master moves exactly as a float32 weight given the same gradients; the weight is the master rounded to
    nearest after each step.
    """

    _state_names = (*Float32AdamW._state_names, "master")

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = super()._state(parameter)
        if "master" not in state and parameter.dtype == torch.bfloat16:
            state["master"] = parameter.detach().float()
        return state

    def _step_bf16(self, rows: list[_Row], group: dict[str, Any], index: int) -> None:
        if self.compiled:
            for row, factors in _with_factors(rows, group):
                master_step(row.weight, row.grad, row.exp_avg, row.exp_avg_sq, row.master, factors)
            return
        scratch = torch.empty(_slice_size(rows), dtype=torch.float32, device=rows[0].weight.device)
        for batch in _batches(rows, len(scratch)):
            grads = _cast_into(scratch, [row.grad for row in batch])
            masters = [row.master for row in batch]
            _adamw(batch, masters, grads, group)
            torch._foreach_copy_([row.weight for row in batch], masters)


class StochasticAdamW(Float32AdamW):
    """`Float32AdamW` that rounds each new bf16 weight up or down at random, right in the mean.

    The random numbers follow from the seed, the roundings done (both saved in the groups) and the group's
    index. So data-parallel processes round alike, and a resumed run as one that was not interrupted.

    Args:
        params: as for `Float32AdamW`, as all other options.
        seed: of the rounding.
    """

    def __init__(self, params: Iterable[Any], *, seed: int, **options: Any) -> None:
        super().__init__(params, seed=seed, roundings=0, **options)

    def _step_bf16(self, rows: list[_Row], group: dict[str, Any], index: int) -> None:
        device = rows[0].weight.device
        # Hashed, because CPU generators use 32 bits of a seed and neighbouring seeds should not be related.
        mixed = random.Random(f"{group['seed']} {group['roundings']} {index}").getrandbits(63)
        group["roundings"] += 1
        if self.compiled:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(mixed)
                for row, factors in _with_factors(rows, group):
                    stochastic_step(row.weight, row.grad, row.exp_avg, row.exp_avg_sq, factors)
            return
        generator = torch.Generator(device).manual_seed(mixed)
        grad_scratch, weight_scratch = torch.empty(2, _slice_size(rows), dtype=torch.float32, device=device)
        noise = torch.empty_like(weight_scratch, dtype=torch.int32).random_(0, 2**16, generator=generator)
        for batch in _batches(rows, len(noise)):
            grads = _cast_into(grad_scratch, [row.grad for row in batch])
            weights = _cast_into(weight_scratch, [row.weight for row in batch])
            _adamw(batch, weights, grads, group)
            # A CPU draws slower than it steps, so the numbers are used again under a new random mask: each is
            # still uniform, and any two are independent.
            noise ^= torch.empty_like(noise[0]).random_(0, 2**16, generator=generator)
            stochastic_round_(weight_scratch, noise)
            torch._foreach_copy_([row.weight for row in batch], weights)


def _adamw(rows: Sequence[_Row], weights: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
    """Step float32 `weights` with float32 `grads` and the rows' moments, by torch's fused kernel."""
    if not rows:
        return
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        weights,
        grads,
        [row.exp_avg for row in rows],
        [row.exp_avg_sq for row in rows],
        [],
        [row.step for row in rows],
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


def _with_factors(rows: Sequence[_Row], group: dict[str, Any]) -> Iterator[tuple[_Row, Tensor]]:
    """Yield each row flat, with the factors of its step."""
    steps = torch.stack([row.step for row in rows]).tolist()
    factors = {step: step_factors(group, step).to(rows[0].weight.device) for step in set(steps)}
    for row, step in zip(rows, steps, strict=True):
        (whole,) = row.pieces(row.weight.numel())
        yield whole, factors[step]


def _local(tensor: Tensor | None) -> Tensor | None:
    """Return the part of a sharded tensor that this process holds; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _slice_size(rows: Sequence[_Row]) -> int:
    limit = _CPU_SLICE if rows[0].weight.device.type == "cpu" else _GPU_SLICE
    return min(limit, sum(_aligned(row.weight.numel()) for row in rows))


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _batches(rows: Iterable[_Row], size: int) -> Iterator[list[_Row]]:
    """Cut rows flat into batches of at most `size` elements, each piece counted up to the alignment.

    Large parameters are spread over several batches and small ones share one, in order.
    """
    batch: list[_Row] = []
    room = size
    for piece in chain.from_iterable(row.pieces(size) for row in rows):
        count = _aligned(len(piece.weight))
        if count > room:
            yield batch
            batch, room = [], size
        batch.append(piece)
        room -= count
    if batch:
        yield batch


def _cast_into(scratch: Tensor, sources: list[Tensor]) -> list[Tensor]:
    """Return float32 copies of flat `sources`, made in `scratch` at aligned offsets."""
    copies, offset = [], 0
    for source in sources:
        copies.append(scratch[offset : offset + len(source)])
        offset += _aligned(len(source))
    torch._foreach_copy_(copies, sources)
    return copies

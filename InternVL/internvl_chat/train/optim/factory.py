"""Build the optimizer and the learning-rate scheduler of a run."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from internvl_chat.train.config import RunConfig
from internvl_chat.train.optim.adamw import OWN_OPTIMIZERS, build_adamw
from internvl_chat.utils.distributed import any_rank
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# As in transformers, biases are matched by name, and norms by type or name.
_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
# These optimizers need a special training loop or selection of modules.
_REFUSED_OPTIMIZERS = ("adalomo", "apollo", "galore", "lomo", "schedule_free")
# These schedules need a metric in every step.
_REFUSED_SCHEDULERS = ("greedy", "reduce_lr_on_plateau")


def make_optimizer(run: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of the trainable parameters, without weight decay of biases and norms; collective.

    Raises:
        UsageError: `--optim` is not supported or its package is not installed.
    """
    groups = group_by_decay(model, run.weight_decay)
    if run.optim not in OWN_OPTIMIZERS:
        optimizer, options = _library_optimizer(run)
        if options.get("optim_bits") == 8:
            _keep_embeddings_32_bit(model)
        return optimizer(groups, **options)
    # DeepSpeed holds its own float32 master weights.
    precision = run.weight_precision if run.deepspeed is None else "bf16"
    has_bf16 = any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])
    return build_adamw(
        groups,
        precision=precision,
        seed=run.seed,
        compiled=has_bf16 and uses_compiled_step(precision, run.device),
        lr=run.learning_rate,
        betas=(run.adam_beta1, run.adam_beta2),
        eps=run.adam_epsilon,
        weight_decay=run.weight_decay,
    )


def make_scheduler(run: RunConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR:
    """Return the learning-rate scheduler for all steps of the run.

    Raises:
        UsageError: the schedule is not supported, or its options are invalid.
    """
    name, warmup = run.lr_scheduler_type, run.warmup_steps
    if name in _REFUSED_SCHEDULERS:
        raise UsageError(
            f"--lr_scheduler_type {name}: not supported: it needs a metric; use cosine or linear"
        )
    warmup_steps = int(warmup) if warmup >= 1 else math.ceil(total_steps * warmup)
    options = dict(run.lr_scheduler_kwargs)
    try:
        scheduler = get_scheduler(
            name, optimizer, warmup_steps, total_steps, scheduler_specific_kwargs=options
        )
        return cast(LambdaLR, scheduler)  # all but the refused ones
    except (TypeError, ValueError) as error:
        raise UsageError(f"--lr_scheduler_type {name}: check --lr_scheduler_kwargs: {error}") from None


def move_schedule(scheduler: LambdaLR, steps: int) -> float:
    """Move a new scheduler to the state after a number of steps; return the learning rate of the next one."""
    # With a count above 1, torch does not look for steps of the optimizer before those of the scheduler.
    position = {"last_epoch": steps - 1, "_step_count": max(steps, 2)}
    scheduler.load_state_dict({**scheduler.state_dict(), **position})
    scheduler.step()
    return float(scheduler.get_last_lr()[0])


def scheduled_rate(run: RunConfig, total_steps: int, step: int) -> float:
    """Return the learning rate of a step, counted from 1, of a run's own schedule."""
    probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=run.learning_rate)
    return move_schedule(make_scheduler(run, probe, total_steps), step - 1)


def optimizer_problems(run: RunConfig) -> Iterator[str]:
    """Yield the problems of `make_optimizer` and `make_scheduler` that can be found without a model."""
    probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=run.learning_rate)
    checks: list[Callable[[], Any]] = [functools.partial(make_scheduler, run, probe, 10**6)]
    if run.optim not in OWN_OPTIMIZERS:
        checks.insert(0, functools.partial(_library_optimizer, run))
    for check in checks:
        try:
            check()
        except UsageError as error:
            yield from error.problems


def group_by_decay(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups: with weight decay, and biases and norms without."""
    decayed = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))
    trained = [(name in decayed, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for decays, p in trained if decays], "weight_decay": weight_decay},
        {"params": [p for decays, p in trained if not decays], "weight_decay": 0.0},
    ]


@functools.cache
def uses_compiled_step(precision: str, device: torch.device) -> bool:
    """Return whether the step of bf16 weights is compiled: on GPUs, if every rank can compile; collective.

    On a CPU a compiled pass is not faster, and sampling its random numbers is much slower.
    """
    if device.type != "cuda" or precision == "bf16":
        return False
    return not any_rank(not _can_compile(precision, device))


def _can_compile(precision: str, device: torch.device) -> bool:
    weight = nn.Parameter(torch.zeros(2**20, dtype=torch.bfloat16, device=device))
    weight.grad = torch.zeros_like(weight)
    try:
        build_adamw([{"params": [weight]}], precision=precision, compiled=True, lr=0.0).step()
    except Exception as error:
        logger.warning("the optimizer step cannot be compiled and will be slower: %s", error)
        return False
    return True


def _library_optimizer(run: RunConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return class and options of an optimizer that transformers' Trainer supports."""
    from transformers import Trainer, TrainingArguments

    if run.optim.startswith(_REFUSED_OPTIMIZERS):
        raise UsageError(f"--optim {run.optim}: not supported; use adamw_torch, adafactor or sgd")
    try:
        # The method reads only flags that RunConfig has too.
        return Trainer.get_optimizer_cls_and_kwargs(cast(TrainingArguments, run))
    except (ImportError, ValueError) as error:
        raise UsageError(f"--optim {run.optim}: {error}; or use adamw_torch (the default)") from None


def _keep_embeddings_32_bit(model: nn.Module) -> None:
    """Exclude embeddings from 8-bit optimizer state, which is unstable for them, as transformers does."""
    from bitsandbytes.optim import GlobalOptimManager

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})

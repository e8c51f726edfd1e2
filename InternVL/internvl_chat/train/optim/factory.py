"""Build the optimizer and the learning-rate scheduler of a run."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from internvl_chat.train.config import RunConfig
from internvl_chat.train.flags import FSDP_MODES, RunArguments
from internvl_chat.train.optim.adamw import OWN_OPTIMIZERS, build_adamw, bytes_per_parameter
from internvl_chat.train.optim.parameter_groups import parameter_groups
from internvl_chat.utils.distributed import any_rank
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Prefixes of optimizers that need a special training loop or a selection of modules.
_UNSUPPORTED_OPTIMIZERS = ("adalomo", "apollo", "galore", "lomo", "schedule_free")
# 8-bit and 4-bit optimizers quantize the moments of parameters with at least this many elements, in blocks.
_QUANTIZED_ELEMENTS, _QUANTIZED_BLOCK = 4096, 256
# Schedules that need a metric at every step.
_UNSUPPORTED_SCHEDULERS = ("greedy", "reduce_lr_on_plateau")
# Arguments of transformers' schedules that the run sets, not the user.
_SET_BY_THE_RUN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")


def make_optimizer(run: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer for the trainable parameters, in the groups of `parameter_groups`.

    Collective: call on all ranks.

    Raises:
        UsageError: `--optim` is unsupported, its package is not installed, or its options are invalid.
    """
    groups = parameter_groups(model, run)
    has_bf16 = any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])
    if run.optim not in OWN_OPTIMIZERS:
        rounds_stochastically = "bf16_stochastic_round" in (run.optim_args or "")
        if has_bf16 and run.deepspeed is None and run.is_main and not rounds_stochastically:
            logger.warning(
                "--optim %s: bf16 weights are updated without float32 masters, so most small updates are "
                "lost; --optim adamw_torch keeps them", run.optim,
            )  # fmt: skip
        return _library_optimizer(run, groups, model)
    # DeepSpeed has its own float32 master weights.
    precision = run.weight_precision if run.deepspeed is None else "bf16"
    return build_adamw(
        groups,
        precision=precision,
        seed=run.seed,
        compiled=has_bf16 and uses_compiled_step(precision, run.optimizer_device),
        lr=run.learning_rate,
        betas=(run.adam_beta1, run.adam_beta2),
        eps=run.adam_epsilon,
        weight_decay=run.weight_decay,
    )


def make_scheduler(run: RunConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR:
    """Return the learning-rate scheduler for a run of `total_steps` steps.

    Raises:
        UsageError: the schedule is unsupported, or its options are invalid.
    """
    name, warmup = run.lr_scheduler_type, run.warmup_steps
    if name in _UNSUPPORTED_SCHEDULERS:
        raise UsageError(
            f"--lr_scheduler_type {name}: not supported, because it needs a metric; use cosine or linear"
        )
    warmup_steps = int(warmup) if warmup >= 1 else math.ceil(total_steps * warmup)
    options = dict(run.lr_scheduler_kwargs)
    function: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    known = [option for option in inspect.signature(function).parameters if option not in _SET_BY_THE_RUN]
    if unknown := [option for option in options if option not in known]:
        raise UsageError(
            f"--lr_scheduler_kwargs {', '.join(unknown)}: {name} has no such option; its options: "
            f"{', '.join(known) or 'none'}"
        )
    try:
        scheduler = get_scheduler(
            name, optimizer, warmup_steps, total_steps, scheduler_specific_kwargs=options
        )
        _check_rates(scheduler, total_steps)
        decay = options.get("num_decay_steps")
        if decay and "num_stable_steps" not in options and warmup_steps + decay > total_steps:
            raise ValueError(
                f"num_decay_steps {decay} plus {warmup_steps} warm-up steps exceed the total of {total_steps}"
            )
    except Exception as error:  # the schedules do not validate their options, so any type is possible
        raise UsageError(f"--lr_scheduler_type {name}: {error}; check --lr_scheduler_kwargs") from None
    return cast(LambdaLR, scheduler)  # all supported schedules use LambdaLR


def _check_rates(scheduler: LRScheduler, total_steps: int) -> None:
    """Check the learning rate at up to about 1000 steps: some invalid options show only at later steps.

    Raises:
        ValueError: a learning-rate factor is not between 0 and 1.
    """
    for factor in scheduler.lr_lambdas if isinstance(scheduler, LambdaLR) else ():
        for step in {*range(0, total_steps, total_steps // 1000 + 1), total_steps}:
            if not 0 <= (value := factor(step)) <= 1 + 1e-6:
                raise ValueError(
                    f"the learning rate at step {step} is {value:.3g} times --learning_rate; the factor must "
                    "be between 0 and 1"
                )


def move_schedule(scheduler: LambdaLR, steps: int) -> float:
    """Advance a new scheduler by the given number of steps; return the learning rate of the next step."""
    # With a count above 1, torch does not warn that the scheduler steps before the optimizer.
    position = {"last_epoch": steps - 1, "_step_count": max(steps, 2)}
    scheduler.load_state_dict({**scheduler.state_dict(), **position})
    scheduler.step()
    return float(scheduler.get_last_lr()[0])


def scheduled_rate(run: RunConfig, total_steps: int, step: int) -> float:
    """Return the learning rate of a run at a step (1-based)."""
    probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=run.learning_rate)
    return move_schedule(make_scheduler(run, probe, total_steps), step - 1)


def flags_without_effect(run: RunConfig) -> Iterator[str]:
    """Yield a warning for each flag on the command line that the schedule or the optimizer ignores."""
    function: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(run.lr_scheduler_type)]
    if run.warmup_steps and "num_warmup_steps" not in inspect.signature(function).parameters:
        similar = f"{run.lr_scheduler_type}_with_warmup"
        advice = f"; use {similar}" if similar in TYPE_TO_SCHEDULER_FUNCTION else ""
        yield (
            f"--warmup_steps (or --warmup_ratio) {run.warmup_steps:g}: has no effect with "
            f"--lr_scheduler_type {run.lr_scheduler_type}, which has no warm-up{advice}"
        )
    defaults = {name: getattr(RunArguments, name) for name in ("adam_beta1", "adam_beta2", "adam_epsilon")}
    for name, default in defaults.items() if run.optim not in OWN_OPTIMIZERS else ():
        pairs = run.optim_args.replace(" ", "").split(",") if run.optim_args else []
        options = [_library_options(dataclasses.replace(run, **{name: value}), pairs)[1]
                   for value in (getattr(run, name), default)]  # fmt: skip
        if getattr(run, name) != default and options[0] == options[1]:
            yield f"--{name} {getattr(run, name):g}: has no effect with --optim {run.optim}"


def has_quantized_state(optim: str) -> bool:
    """Return whether an optimizer stores its moments in 8 or 4 bits, given the value of `--optim`."""
    return "8bit" in optim or "4bit" in optim


def state_bytes(optim: str, precision: str, parameters: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the optimizer state without sharding.

    Args:
        optim: value of `--optim`.
        precision: see `build_adamw`; `bf16` for library optimizers.
        parameters: trainable parameters.
    """
    total = 0.0
    for parameter in parameters:
        if has_quantized_state(optim) and parameter.numel() >= _QUANTIZED_ELEMENTS:
            # Two moments, each with its codes and a float32 scale per block.
            total += 2 * parameter.numel() * ((1 if "8bit" in optim else 0.5) + 4 / _QUANTIZED_BLOCK)
        else:
            size = bytes_per_parameter(precision, parameter.dtype) - 2 * parameter.itemsize
            total += parameter.numel() * size
    return int(total)


def optimizer_problems(run: RunConfig) -> Iterator[str]:
    """Yield an error message for each problem with the optimizer and schedule flags; needs no model."""
    is_sharded = run.deepspeed is not None or run.parallel in FSDP_MODES
    if has_quantized_state(run.optim) and is_sharded and not run.cpu_offload:  # offload is reported elsewhere
        yield (
            f"--optim {run.optim}: 8-bit and 4-bit optimizer state cannot be sharded; use --parallel ddp, or "
            "--optim adamw_torch"
        )
    weight = nn.Parameter(torch.zeros(1))
    probe = torch.optim.SGD([weight], lr=run.learning_rate)
    groups = [{"params": [weight], "weight_decay": run.weight_decay}]
    total_steps = run.max_steps if run.max_steps > 0 else 10**6
    checks: list[Callable[[], Any]] = [functools.partial(make_scheduler, run, probe, total_steps)]
    if run.optim not in OWN_OPTIMIZERS:
        checks.insert(0, functools.partial(_library_optimizer, run, groups))
    elif run.optim_args:
        yield (
            f"--optim_args {run.optim_args}: {run.optim} has no options; use --adam_beta1, --adam_beta2, "
            "--adam_epsilon and --weight_decay"
        )
    for check in checks:
        try:
            check()
        except UsageError as error:
            yield from error.problems


@functools.cache
def uses_compiled_step(precision: str, device: torch.device) -> bool:
    """Return whether to compile the optimizer step for bf16 weights: on GPUs, if every rank can compile it.

    On a CPU, the compiled step is not faster, and its random number generation is much slower.

    Collective: call on all ranks.
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


def _library_optimizer(
    run: RunConfig, groups: list[dict[str, Any]], model: nn.Module | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer given with `--optim`, built as in transformers' Trainer.

    Args:
        model: model whose embeddings keep 32-bit state; None to only check the flags.

    Raises:
        UsageError: the optimizer is unsupported or not installed, or its options are invalid.
    """
    if run.optim.startswith(_UNSUPPORTED_OPTIMIZERS):
        raise UsageError(f"--optim {run.optim}: not supported; use adamw_torch, adafactor or sgd")
    pairs = run.optim_args.replace(" ", "").split(",") if run.optim_args else []
    if wrong := [pair for pair in pairs if pair.count("=") != 1]:
        raise UsageError(f"--optim_args {','.join(wrong)}: must be name=value,name=value")
    options_of = functools.partial(_library_options, run)
    try:
        optimizer_class, options = options_of(pairs)
        if options.get("bf16_stochastic_round") and run.world_size > 1:
            raise ValueError("bf16_stochastic_round requires a single rank: ranks would round differently")
        # transformers ignores unknown options, and the parameter groups have their own weight decay.
        unused = [
            pair for i, pair in enumerate(pairs)
            if pair.startswith("weight_decay=") or options_of(pairs[:i] + pairs[i + 1 :])[1] == options
        ]  # fmt: skip
        if unused:
            raise UsageError(f"--optim_args {','.join(unused)}: has no effect with --optim {run.optim}")
        if infinite := [
            name for name, value in options.items() if value in (math.inf, -math.inf) or value != value
        ]:
            raise ValueError(f"{', '.join(infinite)} must be finite")
        if model is not None and options.get("optim_bits") == 8:
            _keep_embeddings_32_bit(model)
        return optimizer_class(groups, **options)
    except UsageError:
        raise
    except Exception as error:  # each optimizer validates its own options, so any type is possible
        given = f" --optim_args {run.optim_args}" if pairs else ""
        raise UsageError(f"--optim {run.optim}{given}: {error}; alternatively, use adamw_torch") from None


def _library_options(
    run: RunConfig, pairs: Sequence[str]
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the optimizer class and its options for `--optim`.

    Args:
        pairs: content of `--optim_args` as a list of name=value pairs.
    """
    from transformers import Trainer, TrainingArguments

    run = dataclasses.replace(run, optim_args=",".join(pairs))
    # The method reads only fields that TrainingArguments and RunConfig have in common.
    return Trainer.get_optimizer_cls_and_kwargs(cast(TrainingArguments, run))


def _keep_embeddings_32_bit(model: nn.Module) -> None:
    """Keep 32-bit optimizer state for embeddings, like transformers: 8-bit state makes them unstable."""
    from bitsandbytes.optim import GlobalOptimManager

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})

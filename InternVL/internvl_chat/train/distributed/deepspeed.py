"""Train with DeepSpeed ZeRO-1, 2 or 3, configured by `--deepspeed`."""

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn, optim, zeros

from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.config import RunConfig
from internvl_chat.train.distributed.strategy import MakeOptimizer, MakeScheduler, Strategy
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import TrainingError, UsageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Options that DeepSpeed removes before it constructs torch's AdamW.
_ADAM_SWITCHES = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")


def zero_stage(config: Mapping[str, Any]) -> Any:
    """Return the ZeRO stage in a DeepSpeed configuration, without checking that it is valid."""
    section = config.get("zero_optimization")
    return section.get("stage", 0) if isinstance(section, Mapping) else 0


def offloads(config: Mapping[str, Any], state: str) -> bool:
    """Return whether an unchecked DeepSpeed configuration offloads `state`: `optimizer` or `param`."""
    section = config.get("zero_optimization")
    section = section.get(f"offload_{state}") if isinstance(section, Mapping) else None
    return isinstance(section, Mapping) and section.get("device", "none") != "none"


def resolve_deepspeed(run: RunConfig, hidden_size: int) -> dict[str, Any]:
    """Return the user's configuration with the batch sizes and all "auto" values set from the flags.

    Args:
        hidden_size: hidden size of the language model; determines the "auto" bucket sizes.

    Raises:
        UsageError: the ZeRO stage is unsupported, or a value contradicts the flags or cannot be "auto"; the
            message lists all problems.
    """
    config = copy.deepcopy(dict(run.deepspeed or {}))
    flags = {
        "train_micro_batch_size_per_gpu": run.records_per_pack,
        "gradient_accumulation_steps": -(-run.records_per_rank // run.records_per_pack),
        "train_batch_size": run.records_per_step,
        "gradient_clipping": run.max_grad_norm,
        "bf16.enabled": run.bf16,
        "fp16.enabled": False,
    }
    values = flags | {
        "zero_optimization.reduce_bucket_size": hidden_size**2,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
        "optimizer.params.lr": run.learning_rate,
        "optimizer.params.betas": [run.adam_beta1, run.adam_beta2],
        "optimizer.params.eps": run.adam_epsilon,
        "optimizer.params.weight_decay": run.weight_decay,
        "scheduler.params.warmup_min_lr": 0,
        "scheduler.params.warmup_max_lr": run.learning_rate,
    }
    problems: list[str] = []
    if zero_stage(config) not in (1, 2, 3):
        problems.append(
            f'--deepspeed: "zero_optimization.stage" is {zero_stage(config)!r}, but must be 1, 2 or 3; '
            "to train without ZeRO, use --parallel ddp instead of --deepspeed"
        )
    elif zero_stage(config) != 3 and offloads(config, "param"):
        problems.append('--deepspeed: "zero_optimization.offload_param" requires stage 3')
    _fill(config, "", values, flags, problems)
    # DeepSpeed sees one batch per rank and step; the training loop accumulates gradients over its packs.
    config["train_micro_batch_size_per_gpu"] = run.records_per_rank
    config["gradient_accumulation_steps"] = 1
    config["train_batch_size"] = run.records_per_step
    config.setdefault("gradient_clipping", run.max_grad_norm)
    config.setdefault("bf16", {"enabled": run.bf16})
    # Allow the optimizer from `make_optimizer`, which is used if the configuration has none.
    config.setdefault("zero_allow_untested_optimizer", True)
    # Keep this optimizer with offload, too: DeepSpeed's own CPU optimizer would have to be compiled.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    if _uses_torch_adam(config):
        config["optimizer"]["params"] = {"torch_adam": True} | (config["optimizer"].get("params") or {})
    if problems:
        raise UsageError(problems)
    return config


def _uses_torch_adam(config: Mapping[str, Any]) -> bool:
    """Return whether to use torch's AdamW: if the configuration selects Adam or AdamW without offload.

    This avoids compiling DeepSpeed's own GPU kernel. With offload, DeepSpeed needs its CPU kernel.
    """
    section, zero = config.get("optimizer"), config.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, Mapping) else None
    name = section.get("type") if isinstance(section, Mapping) else None
    return str(name).lower() in ("adam", "adamw") and not offload


def deepspeed_problems(run: RunConfig) -> Iterator[str]:
    """Yield an error message for each problem in the DeepSpeed configuration; needs no model."""
    try:
        config = resolve_deepspeed(run, hidden_size=1)
    except UsageError as error:
        yield from error.problems
        return
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

    kinds = {"optimizer": DEEPSPEED_OPTIMIZERS, "scheduler": VALID_LR_SCHEDULES}
    for name, known in kinds.items():
        kind = config[name].get("type") if isinstance(config.get(name), Mapping) else None
        is_optimizer = name == "optimizer" and (str(kind).lower() in known or hasattr(optim, str(kind)))
        if name in config and kind not in known and not is_optimizer:
            yield f'--deepspeed: "{name}.type" is {kind!r}, but must be one of {", ".join(known)}'
            return
    try:
        DeepSpeedConfig(config | {"train_batch_size": run.records_per_rank})  # assumes a single rank
    except ValidationError as error:
        for detail in error.errors():
            yield f'--deepspeed: "{".".join(map(str, detail["loc"]))}": {detail["msg"]}'
    except Exception as error:  # DeepSpeed raises many types of exceptions
        yield f"--deepspeed: {error}"
    if _uses_torch_adam(config):
        options = {k: v for k, v in config["optimizer"]["params"].items() if k not in _ADAM_SWITCHES}
        try:
            optim.AdamW([nn.Parameter(zeros(1))], **options)
        except Exception as error:
            yield f'--deepspeed: "optimizer.params": {error}'


def _fill(
    section: dict[str, Any],
    prefix: str,
    values: Mapping[str, Any],
    fixed: Mapping[str, Any],
    problems: list[str],
) -> None:
    for key, value in section.items():
        name = prefix + key
        if isinstance(value, dict):
            _fill(value, name + ".", values, fixed, problems)
        elif value == "auto":
            if name not in values:
                problems.append(f'--deepspeed: "{name}": "auto" is not supported; set a value')
            section[key] = values.get(name)
        elif name in fixed and value != fixed[name]:
            problems.append(
                f'--deepspeed: "{name}" is {value!r}, but the flags set {fixed[name]!r}; use "auto"'
            )


def warn_about_locks() -> None:
    """Warn about lock files of DeepSpeed's extensions, which may block the run at startup.

    If a compilation is killed, its lock file remains, and older versions of torch wait until someone deletes
    it. In newer versions, the operating system releases the lock.

    Collective: call on all ranks, before any of them compiles.
    """
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from torch.utils import cpp_extension

    if not hasattr(cpp_extension, "FileBaton"):
        return
    root, names = os.environ.get("TORCH_EXTENSIONS_DIR"), {builder.name for builder in ALL_OPS.values()}
    # Without the variable, torch adds a folder for the versions of Python and CUDA.
    locks = (
        Path(root).glob("*/lock") if root else Path(cpp_extension.get_default_build_root()).glob("*/*/lock")
    )
    for lock in sorted(locks) if distributed.local_rank() == 0 else ():
        if lock.parent.name in names:
            logger.warning(
                "%s: another process is compiling DeepSpeed's extensions, or its compilation was killed; if "
                "this run does not start, delete this file",
                lock,
            )
    distributed.barrier()


class DeepSpeedStrategy(Strategy):
    """Trains with a DeepSpeed engine, which clips gradients and updates float32 master weights.

    Args:
        make_optimizer: builds the optimizer if the configuration has none.
        make_scheduler: builds the learning-rate scheduler if the configuration has none.
        config: configuration from `resolve_deepspeed`.
    """

    name = "deepspeed"

    def __init__(
        self,
        model: InternVLChatModel,
        make_optimizer: MakeOptimizer,
        make_scheduler: MakeScheduler,
        config: dict[str, Any],
    ) -> None:
        import deepspeed

        warn_about_locks()
        self.shards_weights = zero_stage(config) == 3
        model.always_run_vision = self.shards_weights
        self.model = model
        self.engine, self.optimizer, _, self.scheduler = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=None if "optimizer" in config else make_optimizer(model),
            lr_scheduler=None if "scheduler" in config else make_scheduler,
            config=config,
        )
        self.wrapped, self._has_stepped = self.engine, False

    @contextlib.contextmanager
    def gradient_sync(self, last: bool) -> Iterator[None]:
        """See `Strategy`."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """See `Strategy`."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def clip_gradients(self, max_norm: float) -> float:
        """Clip to the configured norm, run the optimizer step, and return the gradient norm.

        DeepSpeed computes the norm only during the step.
        """
        self.engine.step()
        self._has_stepped = self.engine.was_step_applied()
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def step(self, *, apply: bool) -> None:
        """Advance the schedule if DeepSpeed skipped the step; otherwise, `clip_gradients` has done so.

        Raises:
            TrainingError: `apply` is False, but DeepSpeed has already applied the gradients.
        """
        if self._has_stepped and not apply:
            raise TrainingError(
                "this step cannot be skipped, because DeepSpeed has already applied its gradients; resume "
                "from the last checkpoint"
            )
        if not self._has_stepped:
            self.scheduler.step()
        self._has_stepped = False

    def full_weights(self) -> dict[str, Tensor]:
        """Return all weights, keyed by name. Collective: call on all ranks.

        With ZeRO-3, rank 0 gathers them in CPU memory and the other ranks return an empty dict.
        """
        if not self.shards_weights:
            return dict(self.model.state_dict())
        import deepspeed

        weights, main, error = {}, distributed.rank() == 0, None
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, name in names.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                try:
                    if main and error is None:
                        weights[name] = parameter.detach().to("cpu", copy=True)
                except RuntimeError as failure:
                    error = failure  # continue, because the other ranks need this one to gather the rest
        if error is not None:
            raise error
        tied = self.model.named_parameters(remove_duplicate=False)
        if main:
            weights |= {name: weights[names[parameter]] for name, parameter in tied}
            weights |= {
                name: buffer.cpu() for name, buffer in self.model.state_dict().items() if name not in weights
            }
        return weights


def save_engine(engine: Any, folder: Path, tag: str) -> None:
    """Write the state of a DeepSpeed engine; do not hang if a rank cannot write.

    Ranks synchronize inside `save_checkpoint`, so the files are written only after it has returned.

    Collective: call on all ranks.

    Raises:
        OSError: this rank cannot write its files.
    """
    writer, calls = engine.checkpoint_engine, []
    save, commit = writer.save, writer.commit
    writer.save = lambda *arguments, **options: calls.append(partial(save, *arguments, **options))
    writer.commit = lambda info: calls.append(partial(commit, info))
    try:
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)
    finally:
        del writer.save, writer.commit
    for call in calls:
        call()

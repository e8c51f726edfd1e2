"""DeepSpeed ZeRO-1, 2 and 3, with a configuration file of the user's."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.config import RunConfig
from internvl_chat.train.distributed.strategy import MakeOptimizer, MakeScheduler
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import UsageError


def zero_stage(config: Mapping[str, Any]) -> Any:
    """Return the ZeRO stage of a DeepSpeed configuration; `resolve_deepspeed` checks it."""
    section = config.get("zero_optimization")
    return section.get("stage", 0) if isinstance(section, Mapping) else 0


def resolve_deepspeed(run: RunConfig, hidden_size: int) -> dict[str, Any]:
    """Return the user's configuration with every "auto" replaced.

    Args:
        run: the resolved flags.
        hidden_size: of the language model; sets the bucket sizes of ZeRO-3 as transformers does.

    Raises:
        UsageError: lists the values that contradict the flags, or are not known.
    """
    config = copy.deepcopy(dict(run.deepspeed or {}))
    flags = {
        "train_micro_batch_size_per_gpu": run.records_per_pack,
        "gradient_accumulation_steps": run.flags["gradient_accumulation_steps"],
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
            "without ZeRO leave --deepspeed out and use --parallel ddp"
        )
    _fill(config, "", values, flags, problems)
    # A rank's records of a step are one batch, in as many packs as they need.
    config["train_micro_batch_size_per_gpu"] = run.records_per_rank
    config["gradient_accumulation_steps"] = 1
    config["train_batch_size"] = run.records_per_step
    config.setdefault("gradient_clipping", run.max_grad_norm)
    config.setdefault("bf16", {"enabled": run.bf16})
    # The optimizer is ours unless the configuration names one.
    config.setdefault("zero_allow_untested_optimizer", True)
    if problems:
        raise UsageError(problems)
    return config


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
                problems.append(f'--deepspeed: "{name}": "auto" is not known; give a value')
            section[key] = values.get(name)
        elif name in fixed and value != fixed[name]:
            problems.append(
                f'--deepspeed: "{name}" is {value!r}, but the flags make it {fixed[name]!r}; use "auto"'
            )


class DeepSpeedStrategy:
    """A model in a DeepSpeed engine, which keeps float32 masters and clips and steps by itself.

    Args:
        model: with its trained parameters chosen.
        make_optimizer: is given the model; not used where the configuration names an optimizer.
        make_scheduler: is given the optimizer; not used where the configuration names a schedule.
        config: of `resolve_deepspeed`.
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
        self.wrapped = self.engine

    @contextlib.contextmanager
    def gradient_sync(self, last: bool) -> Iterator[None]:
        """See `Strategy`."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """See `Strategy`."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def clip_gradients(self, max_norm: float) -> float:
        """Step, which clips; the norm is known only afterwards."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def optimizer_step(self) -> None:
        """The engine has stepped optimizer and schedule in `clip_gradients`."""

    def scheduler_step(self) -> None:
        """The engine has stepped the schedule."""

    def zero_grad(self) -> None:
        """The engine frees gradients as it steps."""

    def full_weights(self) -> dict[str, Tensor]:
        """See `Strategy`."""
        if not self.shards_weights:
            return dict(self.model.state_dict())
        import deepspeed

        weights, main = {}, distributed.rank() == 0
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, name in names.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                if main:
                    weights[name] = parameter.detach().to("cpu", copy=True)
        tied = self.model.named_parameters(remove_duplicate=False)
        if main:
            weights |= {name: weights[names[parameter]] for name, parameter in tied}
            weights |= {
                name: buffer.cpu() for name, buffer in self.model.state_dict().items() if name not in weights
            }
        return weights


def save_engine(engine: Any, folder: Path, tag: str) -> None:
    """Write the state of a DeepSpeed engine; a collective that cannot hang where a rank cannot write.

    Within `save_checkpoint` the ranks wait for each other, with ZeRO-3 also to gather weights. Files are
    therefore written after it, when no rank waits for another.

    Raises:
        OSError: on a rank that cannot write its files.
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

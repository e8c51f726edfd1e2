"""Resolve the training flags into a frozen configuration."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from internvl_chat.data.batching.dataloader import DataLoaderOptions
from internvl_chat.train.flags import INTERVALS, DataArguments, ModelArguments, RunArguments
from internvl_chat.utils import distributed
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class RunConfig:
    """Training configuration of this rank, with all defaults and alternatives resolved.

    Fields that are not listed here have the same name and meaning as their flags.

    Attributes:
        flags: values of all `RunArguments` flags before they were resolved.
        device: device of this rank.
        rank: rank of this process.
        world_size: number of ranks.
        local_world_size: number of ranks on this node.
        records_per_pack: records per forward pass without packing (`per_device_train_batch_size`).
        records_per_rank: records per optimizer step, divided by the number of ranks and rounded up.
        records_per_step: records per optimizer step across all ranks.
        warmup_steps: number of warm-up steps, or a fraction of all steps if below 1.
        deepspeed: parsed DeepSpeed configuration; None without DeepSpeed.
        parallel: parallel layout; `auto` lets the memory plan choose.
        compile_blocks: compile the transformer blocks (`--torch_compile`).
    """

    flags: Mapping[str, Any]
    output_dir: str
    device: torch.device
    rank: int
    world_size: int
    local_world_size: int
    # steps
    records_per_pack: int
    records_per_rank: int
    records_per_step: int
    num_train_epochs: float
    max_steps: int
    packing: bool
    max_packed_tokens: int
    train_sampling_strategy: str
    loss_reduction: str
    seed: int
    full_determinism: bool
    # optimizer
    optim: str
    optim_args: str | None
    learning_rate: float
    vision_lr: float | None
    projector_lr: float | None
    llm_lr: float | None
    loraplus_lr_ratio: float
    lr_scheduler_type: str
    lr_scheduler_kwargs: Mapping[str, Any]
    warmup_steps: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    # computation
    bf16: bool
    tf32: bool | None
    weight_precision: str
    compile_blocks: bool
    parallel: str
    cpu_offload: bool
    deepspeed: Mapping[str, Any] | None
    ddp_bucket_cap_mb: int | None
    ddp_timeout: int
    # dataloader
    dataloader_num_workers: int
    dataloader_prefetch_factor: int | None
    dataloader_pin_memory: bool
    # logging
    logging_strategy: str
    logging_steps: float
    logging_first_step: bool
    disable_tqdm: bool | None
    report_to: tuple[str, ...]
    run_name: str | None
    # validation
    do_eval: bool
    eval_strategy: str
    eval_steps: float
    eval_delay: float
    eval_on_start: bool
    eval_generate: int
    eval_samples: int
    early_stopping_patience: int
    load_best_model_at_end: bool
    metric_for_best_model: str | None
    greater_is_better: bool
    # checkpoints
    save_strategy: str
    save_steps: float
    save_total_limit: int | None
    save_only_model: bool
    async_save: bool
    resume_from_checkpoint: str | None
    allow_resume_changes: bool
    overwrite_output_dir: bool
    # checks
    sanity_check: bool
    max_bad_steps: int
    hang_seconds: float

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the logs and the model."""
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights: bfloat16 with `--bf16`, as in the reference, otherwise float32."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def tracks_best(self) -> bool:
        """Whether validation selects a best checkpoint."""
        return self.metric_for_best_model is not None

    @property
    def dataloader_options(self) -> DataLoaderOptions:
        """Workers, prefetching and memory pinning of the dataloader."""
        pin = self.dataloader_pin_memory and self.device.type == "cuda"
        return DataLoaderOptions(self.dataloader_num_workers, self.dataloader_prefetch_factor, pin)

    @property
    def optimizer_device(self) -> torch.device:
        """Device on which the optimizer updates the weights."""
        return torch.device("cpu") if self.cpu_offload else self.device

    def count_steps(self, epoch_steps: int) -> int:
        """Return the total number of optimizer steps, given the steps per epoch."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * epoch_steps)


@dataclass(frozen=True)
class TrainConfig:
    """Resolved configuration of a training run."""

    model: ModelArguments
    data: DataArguments
    run: RunConfig

    def to_dict(self) -> dict[str, Any]:
        """Return all flags by group, for the trackers. Safe to log: no flag contains a secret."""
        return {"model": vars(self.model), "data": vars(self.data), "training": dict(self.run.flags)}


def resolve_run(args: RunArguments, problems: list[str]) -> RunConfig:
    """Return the configuration that results from the flags and this rank's environment variables.

    Args:
        problems: list to which problems are appended; invalid values are replaced with defaults.
    """
    values = {f.name: getattr(args, f.name) for f in fields(RunConfig) if hasattr(args, f.name)}
    for name, enum in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        values[name] = _choice(name, values[name], [member.value for member in enum], problems)
    eval_strategy = args.evaluation_strategy if args.eval_strategy in ("no", None) else args.eval_strategy
    values["eval_strategy"] = _choice("eval_strategy", eval_strategy or "no", INTERVALS, problems)
    values["logging_strategy"] = _choice("logging_strategy", args.logging_strategy, INTERVALS, problems)
    values["save_strategy"] = _choice("save_strategy", args.save_strategy, (*INTERVALS, "best"), problems)
    values["lr_scheduler_kwargs"] = (
        _mapping("lr_scheduler_kwargs", args.lr_scheduler_kwargs or None, problems) or {}
    )
    values["deepspeed"] = _mapping("deepspeed", args.deepspeed or None, problems)
    values["parallel"], values["cpu_offload"] = _parallel(args, problems)
    values["device"] = _device(args, problems)
    if args.weight_precision == "auto":
        logger.warning("--weight_precision auto is deprecated; use master")
        values["weight_precision"] = "master"

    metric = args.metric_for_best_model
    needs_metric = args.load_best_model_at_end or args.early_stopping_patience
    if metric is None and (needs_metric or values["save_strategy"] == "best"):
        metric = "eval_loss"
    if args.greater_is_better is None:
        values["greater_is_better"] = metric is not None and not metric.endswith("loss")
    reports = dict.fromkeys(name for names in args.report_to for name in names.replace(",", " ").split())
    if "none" in reports and len(reports) > 1:
        problems.append(f"--report_to {' '.join(reports)}: none cannot be combined with trackers")
    values |= _batch(args, problems)
    values |= {
        "flags": vars(args),
        "output_dir": str(Path(args.output_dir or "").expanduser().absolute()),
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "local_world_size": distributed.local_world_size(),
        "warmup_steps": args.warmup_steps or args.warmup_ratio,
        "compile_blocks": args.torch_compile,
        "report_to": tuple(name for name in reports if name != "none"),
        "eval_steps": args.save_steps if args.eval_steps is None else args.eval_steps,
        "metric_for_best_model": metric,
        "sanity_check": args.sanity_check or args.self_test,
    }
    return RunConfig(**values)


def _batch(args: RunArguments, problems: list[str]) -> dict[str, int]:
    """Return the values of `records_per_pack`, `records_per_rank` and `records_per_step`.

    With `--global_batch_size`, the records per step do not depend on the number of ranks.
    """
    ranks, records = distributed.world_size(), args.per_device_train_batch_size
    step = args.global_batch_size or records * args.gradient_accumulation_steps * ranks
    if step < ranks:
        problems.append(
            f"--global_batch_size {step}: each of the {ranks} ranks needs at least one record per step; use "
            "fewer ranks or a larger batch"
        )
    if args.deepspeed and step % ranks:
        problems.append(
            f"--global_batch_size {step}: with DeepSpeed, it must be divisible by the {ranks} ranks"
        )
    return {"records_per_pack": records, "records_per_rank": -(-step // ranks), "records_per_step": step}


def _choice(name: str, value: str, known: Sequence[str], problems: list[str]) -> str:
    if value not in known:
        problems.append(f"--{name} {value}: must be one of {', '.join(known)}")
        return getattr(RunArguments, name)
    return value


def _mapping(name: str, value: str | None, problems: list[str]) -> dict[str, Any] | None:
    """Parse the value of a flag, which is JSON text or the path to a JSON file."""
    if value is None:
        return None
    try:
        text = value if value.lstrip().startswith("{") else Path(value).read_text(encoding="utf-8")
        loaded = json.loads(text, parse_constant=_reject_constant, object_pairs_hook=_unique)
    except OSError as error:
        problems.append(f"--{name} {value}: cannot be read ({error.strerror}); give JSON text or a JSON file")
    except ValueError as error:
        problems.append(f"--{name} {value}: not valid JSON ({error})")
    else:
        if isinstance(loaded, dict):
            return loaded
        problems.append(f"--{name} {value}: must be a JSON object")
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"duplicate key {repeated[0]!r}")
    return dict(pairs)


def _reject_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not allowed")


# Words in `--fsdp` -> parallel layout, if they select one.
_FSDP_WORDS = {"full_shard": "fsdp", "hybrid_shard": "hsdp", "auto_wrap": None, "offload": None}


def _parallel(args: RunArguments, problems: list[str]) -> tuple[str, bool]:
    """Return the parallel layout (from `--parallel`, `--fsdp` or `--deepspeed`), and whether to offload."""
    words = args.fsdp.split()
    unsupported = [word for word in words if word not in _FSDP_WORDS]
    layouts = {f"--fsdp {word}": layout for word in words if (layout := _FSDP_WORDS.get(word))}
    if words and (unsupported or not layouts):
        problems.append(
            f"--fsdp {' '.join(unsupported or words)}: use full_shard (--parallel fsdp) or hybrid_shard "
            "(--parallel hsdp), optionally with auto_wrap and offload"
        )
    layouts |= {"--deepspeed": "deepspeed"} if args.deepspeed else {}
    layouts |= {f"--parallel {args.parallel}": args.parallel} if args.parallel != "auto" else {}
    if len(set(layouts.values())) > 1:
        problems.append(f"{' and '.join(layouts)}: conflicting parallel layouts; use one of them")
    if args.parallel == "deepspeed" and not args.deepspeed:
        problems.append("--parallel deepspeed needs --deepspeed with a ZeRO configuration")
    offload = args.cpu_offload or "offload" in words
    layout = next(iter(layouts.values()), "fsdp" if offload else "auto")
    if offload and layout == "ddp":
        problems.append("--cpu_offload True: not supported with --parallel ddp; use --parallel fsdp")
    if offload and layout == "deepspeed":
        problems.append(
            "--cpu_offload True: not supported with --deepspeed; set offload_optimizer and offload_param in "
            "the DeepSpeed configuration, as in shell/deepspeed/zero3_offload.json"
        )
    if layout == "hsdp" and 1 < distributed.world_size() == distributed.local_world_size():
        logger.info("--parallel hsdp: on a single node, this is the same as --parallel fsdp")
        layout = "fsdp"
    return layout, offload


def _device(args: RunArguments, problems: list[str]) -> torch.device:
    """Return the device of this rank; if GPUs are missing, all ranks of a node report the same problem."""
    device = torch.device("cpu") if args.use_cpu else torch.device("cuda", distributed.local_rank())
    needed = max(distributed.local_world_size(), distributed.local_rank() + 1)
    visible = torch.cuda.device_count()
    if device.type == "cuda" and not torch.cuda.is_available():
        problems.append(
            "no GPU is available; train on the CPU with GPUS=0 (--use_cpu True without a launcher), or check "
            "CUDA_VISIBLE_DEVICES, nvidia-smi, and whether this torch matches the driver"
        )
    elif device.type == "cuda" and needed > visible:
        gpus = "1 GPU is visible" if visible == 1 else f"{visible} GPUs are visible"
        problems.append(
            f"GPUS={needed}, but {gpus}; lower GPUS (--nproc_per_node), or check CUDA_VISIBLE_DEVICES"
        )
    backend = "nccl" if device.type == "cuda" else "gloo"
    if args.ddp_backend not in (None, backend):
        problems.append(f"--ddp_backend {args.ddp_backend}: not supported; use {backend} or remove the flag")
    return device


def set_float32_precision(config: RunConfig) -> None:
    """Apply `--tf32` on GPUs; without the flag, keep torch's default."""
    if config.tf32 is not None and config.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")

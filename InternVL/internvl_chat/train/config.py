"""Resolve the flags of a run once into a frozen configuration.

Every field of transformers' TrainingArguments is either used (`USED_FLAGS`) or refused (`REFUSED_FLAGS`).
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from internvl_chat.data.batching.dataloader import DataLoaderOptions
from internvl_chat.train.flags import DataArguments, ModelArguments, RunArguments
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

_STRATEGIES = ("no", "steps", "epoch")

# Flags of transformers that have no effect here: the accepted values, and what to use instead.
REFUSED_FLAGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "accelerator_config": ((None,), "accelerate is not used for training"),
    "activation_checkpointing": ((None, False), "use --grad_checkpoint"),
    "activation_checkpointing_kwargs": ((None,), "use --grad_checkpoint"),
    "auto_find_batch_size": ((False,), "lower --per_device_train_batch_size or --max_packed_tokens"),
    "average_tokens_across_devices": ((True,), "use --loss_reduction"),
    "batch_eval_metrics": ((False,), "validation computes its metrics over all records"),
    "bf16_full_eval": ((False,), "validation runs in the precision of the weights"),
    "data_seed": ((None,), "--seed determines the order of the records"),
    "dataloader_drop_last": ((False,), "the last, smaller step of an epoch is used"),
    "dataloader_in_order": ((True,), "the order of the records is fixed"),
    "dataloader_multiprocessing_context": ((None,), "dataloader workers are forked"),
    "dataloader_persistent_workers": ((False, True), "dataloader workers are always persistent"),
    "ddp_broadcast_buffers": ((None, False), "the model's buffers are constant"),
    "ddp_find_unused_parameters": ((None, False), "every trained parameter is used in every step"),
    "ddp_static_graph": ((None, False), "packs differ from step to step"),
    "debug": (("", None), "use torch's own tools, such as torch.autograd.set_detect_anomaly"),
    "do_predict": ((False,), "use m3llm eval"),
    "enable_jit_checkpoint": ((False,), "a checkpoint is always saved on a stop signal"),
    "eval_accumulation_steps": ((None,), "validation stores no logits"),
    "eval_do_concat_batches": ((True,), "validation stores no logits"),
    "eval_use_gather_object": ((False,), "validation stores no logits"),
    "fp16": ((False,), "the model trains in bfloat16 (--bf16 True) or float32"),
    "fp16_full_eval": ((False,), "validation runs in the precision of the weights"),
    "fsdp_config": ((None,), "--parallel fsdp has no options"),
    "gradient_checkpointing": ((None, False), "use --grad_checkpoint"),
    "gradient_checkpointing_kwargs": ((None,), "use --grad_checkpoint"),
    "hub_always_push": ((False,), "upload the finished folder"),
    **dict.fromkeys(
        ("hub_model_id", "hub_private_repo", "hub_revision"), ((None,), "upload the finished folder")
    ),
    "hub_strategy": (("every_save",), "upload the finished folder"),
    "hub_token": ((None,), "upload the finished folder; log in with hf auth login"),
    "ignore_data_skip": ((False,), "a resumed run continues with the next record"),
    "include_for_metrics": (([], None), "validation measures losses and generated answers"),
    "include_num_input_tokens_seen": (("no", False, "False"), "metrics.jsonl has the tokens of each step"),
    "label_names": ((None,), "labels come from the conversation template"),
    "label_smoothing_factor": ((0.0,), "the loss is the reference's"),
    "length_column_name": (("length",), "the data check measures the lengths"),
    "liger_kernel_config": ((None,), "use --use_liger"),
    "log_level": (("passive",), "rank 0 logs information, warnings and errors"),
    "log_level_replica": (("warning",), "other ranks log warnings and errors"),
    "log_on_each_node": ((True,), "only rank 0 logs"),
    "logging_nan_inf_filter": ((True,), "steps with a non-finite loss are skipped and reported"),
    "neftune_noise_alpha": ((None,), "the embeddings are the reference's"),
    "optim_target_modules": ((None,), "the optimizers that need it are not supported"),
    "parallelism_config": ((None,), "use --parallel"),
    "per_device_eval_batch_size": ((8,), "validation packs records up to --max_packed_tokens"),
    "prediction_loss_only": ((False,), "validation stores no logits"),
    "project": (("huggingface",), "set the tracker's environment variable, such as WANDB_PROJECT"),
    "push_to_hub": ((False,), "upload the finished folder"),
    "remove_unused_columns": ((True, False), "records have no columns"),
    "restore_callback_states_from_checkpoint": ((False,), "the early-stopping state is always restored"),
    "save_on_each_node": ((False,), "all ranks write to one shared folder"),
    "skip_memory_metrics": ((True,), "metrics.jsonl has the peak memory of each step"),
    "torch_compile_backend": ((None,), "--torch_compile True uses inductor"),
    "torch_compile_mode": ((None,), "--torch_compile True compiles with dynamic shapes"),
    "torch_empty_cache_steps": ((None,), "memory is planned before training"),
    **{
        f"trackio_{name}_id": ((None,), "set trackio's environment variables")
        for name in ("bucket", "space", "static_space")
    },
    "use_cache": ((False,), "training needs no key-value cache"),
    "use_liger_kernel": ((False,), "use --use_liger"),
}


@dataclass(frozen=True)
class RunConfig:
    """Resolved training configuration of this rank; fields not listed have the meaning of their flag.

    Attributes:
        flags: the flags as given, for `config.yaml`.
        device: device of this rank.
        rank: rank of this process.
        world_size: number of ranks.
        local_world_size: number of ranks on this node.
        records_per_pack: records per forward pass without packing (`per_device_train_batch_size`).
        records_per_rank: records per optimizer step on each rank.
        records_per_step: records per optimizer step on all ranks.
        warmup_steps: number of warm-up steps, or below 1 a fraction of all steps.
        deepspeed: content of the DeepSpeed configuration; None without DeepSpeed.
        parallel: parallel layout; `auto` leaves the choice to the memory plan.
        compile_blocks: compile the blocks of both towers (`--torch_compile`).
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
    deepspeed: Mapping[str, Any] | None
    ddp_bucket_cap_mb: int | None
    ddp_timeout: int
    # data loading
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

    def count_steps(self, epoch_steps: int) -> int:
        """Return the number of optimizer steps of the run, given the steps per epoch."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * epoch_steps)


@dataclass(frozen=True)
class TrainConfig:
    """The resolved configuration of a training run."""

    model: ModelArguments
    data: DataArguments
    run: RunConfig

    def to_dict(self) -> dict[str, Any]:
        """Return the flags by group, for `config.yaml`; no flag holds a secret."""
        return {"model": vars(self.model), "data": vars(self.data), "training": dict(self.run.flags)}


# Flags that `resolve_run` turns into other fields.
_CONSUMED = ("per_device_train_batch_size", "gradient_accumulation_steps", "torch_compile", "fsdp", "use_cpu",
             "ddp_backend", "do_train", "evaluation_strategy", "warmup_ratio", "group_by_length",
             "self_test")  # fmt: skip
_SAVED_FLAGS = frozenset({f.name for f in fields(RunConfig)} | {*_CONSUMED})
# torchrun sets `local_rank`.
USED_FLAGS = _SAVED_FLAGS | {"local_rank"}


def resolve_run(args: RunArguments) -> RunConfig:
    """Resolve the training flags and the environment variables of this rank.

    Raises:
        UsageError: lists all flags that are refused or have an invalid value.
    """
    problems = _refused(args)
    # Fields only: properties of TrainingArguments, such as `device`, initialise devices.
    given = {f.name: getattr(args, f.name) for f in fields(args)}
    values = {f.name: given[f.name] for f in fields(RunConfig) if f.name in given}
    for name, enum in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        values[name] = _choice(name, values[name], [member.value for member in enum], problems)
    eval_strategy = args.evaluation_strategy if args.eval_strategy in ("no", None) else args.eval_strategy
    values["eval_strategy"] = _choice("eval_strategy", eval_strategy or "no", _STRATEGIES, problems)
    values["logging_strategy"] = _choice("logging_strategy", args.logging_strategy, _STRATEGIES, problems)
    values["save_strategy"] = _choice("save_strategy", args.save_strategy, (*_STRATEGIES, "best"), problems)
    values["lr_scheduler_kwargs"] = _mapping("lr_scheduler_kwargs", args.lr_scheduler_kwargs, problems) or {}
    values["deepspeed"] = _mapping("deepspeed", args.deepspeed or None, problems)
    values["parallel"] = _parallel(args, problems)
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
    reports = [name for names in args.report_to for name in names.replace(",", " ").split()]
    records = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if problems:
        raise UsageError(problems)
    values |= {
        "flags": {name: _plain(given[name]) for name in sorted(given.keys() & _SAVED_FLAGS)},
        "output_dir": str(Path(args.output_dir).expanduser().absolute()),
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "local_world_size": distributed.local_world_size(),
        "records_per_pack": args.per_device_train_batch_size,
        "records_per_rank": records,
        "records_per_step": records * distributed.world_size(),
        "warmup_steps": args.warmup_steps or args.warmup_ratio,
        "compile_blocks": args.torch_compile,
        "report_to": tuple(name for name in reports if name != "none"),
        "eval_steps": args.eval_steps or args.save_steps,
        "metric_for_best_model": metric,
        "sanity_check": args.sanity_check or args.self_test,
    }
    return RunConfig(**values)


def _refused(args: RunArguments) -> list[str]:
    """Report flags that have no effect here."""
    given = {f.name for f in fields(args)}
    return [
        f"--{flag} {getattr(args, flag)}: not supported; {advice}"
        for flag, (accepted, advice) in REFUSED_FLAGS.items()
        if flag in given and _plain(getattr(args, flag)) not in accepted
    ]


def _plain(value: Any) -> Any:
    """Return the value of an enum member, and any other value unchanged."""
    return getattr(value, "value", value)


def _choice(name: str, value: Any, known: Any, problems: list[str]) -> str:
    value = str(_plain(value))
    if value not in known:
        problems.append(f"--{name} {value}: must be one of {', '.join(known)}")
    return value


def _mapping(name: str, value: Any, problems: list[str]) -> dict[str, Any] | None:
    """Return the value of a flag that is a mapping, JSON text, or the path of a JSON file."""
    if value is None or isinstance(value, dict):
        return value
    try:
        text = value if value.lstrip().startswith("{") else Path(value).read_text(encoding="utf-8")
        loaded = json.loads(text)
    except OSError as error:
        problems.append(f"--{name} {value}: cannot be read ({error.strerror})")
    except ValueError as error:
        problems.append(f"--{name} {value}: not valid JSON ({error})")
    else:
        if isinstance(loaded, dict):
            return loaded
        problems.append(f"--{name} {value}: must be a JSON object")
    return None


def _parallel(args: RunArguments, problems: list[str]) -> str:
    """Return the parallel layout selected by `--parallel`, `--fsdp` or `--deepspeed`."""
    words = args.fsdp.split()
    unsupported = [word for word in words if word not in ("full_shard", "auto_wrap")]
    if words and (unsupported or "full_shard" not in words):
        problems.append(
            f"--fsdp {' '.join(unsupported or words)}: only full_shard is supported (--parallel fsdp)"
        )
    layouts = {"--fsdp": "fsdp"} if args.fsdp else {}
    layouts |= {"--deepspeed": "deepspeed"} if args.deepspeed else {}
    layouts |= {f"--parallel {args.parallel}": args.parallel} if args.parallel != "auto" else {}
    if len(set(layouts.values())) > 1:
        problems.append(f"{' and '.join(layouts)}: conflicting kinds of parallelism; use one of them")
    if args.parallel == "deepspeed" and not args.deepspeed:
        problems.append("--parallel deepspeed needs --deepspeed with a ZeRO configuration")
    return next(iter(layouts.values()), "auto")


def _device(args: RunArguments, problems: list[str]) -> torch.device:
    """Return the device of this rank; all ranks of a node report the same problems."""
    device = torch.device("cpu") if args.use_cpu else torch.device("cuda", distributed.local_rank())
    needed = max(distributed.local_world_size(), distributed.local_rank() + 1)
    visible = torch.cuda.device_count()
    if device.type == "cuda" and not torch.cuda.is_available():
        problems.append(
            "no GPU is available: train on the CPU with GPUS=0 (--use_cpu True without a launcher), or check "
            "CUDA_VISIBLE_DEVICES, nvidia-smi, and whether this torch matches the driver"
        )
    elif device.type == "cuda" and needed > visible:
        gpus = "1 GPU is visible" if visible == 1 else f"{visible} GPUs are visible"
        problems.append(
            f"GPUS={needed}, but {gpus}; lower GPUS (--nproc_per_node), or check CUDA_VISIBLE_DEVICES"
        )
    backend = "nccl" if device.type == "cuda" else "gloo"
    if args.ddp_backend not in (None, backend):
        problems.append(f"--ddp_backend {args.ddp_backend}: not supported; this run uses {backend}")
    return device


def set_float32_precision(config: RunConfig) -> None:
    """Apply `--tf32`; the default is torch's."""
    if config.tf32 is not None and config.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")


def is_restarted() -> bool:
    """Return whether torchrun has restarted this worker after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

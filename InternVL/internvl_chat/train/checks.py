"""Checks before weights are read: every problem of flags, model, data and output folder at once."""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from transformers.utils import is_liger_kernel_available

from internvl_chat.constants import MAX_TILES
from internvl_chat.data.encode.tokenizer import load_tokenizer
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.data.sources.meta import DatasetSpec, load_meta
from internvl_chat.model.attention import resolve_attention
from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.adapter import find_base, read_base
from internvl_chat.model.io.folders import is_adapter, model_folder, read_config
from internvl_chat.model.io.weights import weight_files
from internvl_chat.model.lora.injection import ranks_of, read_adapter_config
from internvl_chat.train.checkpoint.fingerprint import check_same_run, fingerprint
from internvl_chat.train.checkpoint.run_folder import OutputFolder, inspect_output_folder, list_checkpoints
from internvl_chat.train.checkpoint.saver import check_resumable
from internvl_chat.train.config import RunConfig, TrainConfig, is_restarted
from internvl_chat.train.distributed.deepspeed import resolve_deepspeed, zero_stage
from internvl_chat.train.monitor.trackers import tracker_problems
from internvl_chat.train.optim.factory import OWN_OPTIMIZERS, optimizer_problems
from internvl_chat.train.validation import metric_names
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import DataError, M3LLMError, ModelError, UsageError, format_problems
from internvl_chat.utils.paths import REPOSITORY


@dataclass(frozen=True)
class RunPlan:
    """A run whose configuration has been checked.

    Attributes:
        config: the resolved flags.
        output: what to do with the output folder.
        source: folder of the weights to start from (a checkpoint's when resuming).
        specs: the training sets.
        eval_specs: the validation sets.
        attn: the attention kernel to use.
    """

    config: TrainConfig
    output: OutputFolder
    source: Path
    specs: list[DatasetSpec]
    eval_specs: list[DatasetSpec]
    attn: str


def check_configuration(config: TrainConfig) -> RunPlan:
    """Check everything that can be checked without reading weights.

    Raises:
        UsageError: lists every problem of flags, model, data and output folder.
        ModelError: the same, where only files are at fault.
    """
    problems: list[str] = []
    data_fault_only = True
    results = {}
    run = config.run
    checks = {
        "output": lambda: _check_output(config),
        "attn": lambda: resolve_attention(config.model.attn, run.device, run.dtype),
        "specs": lambda: _check_data(config.data.meta_path, config),
        "eval_specs": lambda: _check_eval_data(config),
        "validation": lambda: _raise(_validation(config, results.get("eval_specs"))),
        "source": lambda: _check_model(config),
        "flags": lambda: check_flags(config),
    }
    for name, check in checks.items():
        try:
            results[name] = check()
        except M3LLMError as error:
            problems += error.problems if isinstance(error, UsageError) else [str(error)]
            data_fault_only &= not isinstance(error, UsageError)
    if problems and data_fault_only:
        raise ModelError(format_problems(problems))
    _raise(problems)
    output: OutputFolder = results["output"]
    source = output.resume or results["source"]
    return RunPlan(config, output, source, results["specs"], results["eval_specs"], results["attn"])


def _raise(problems: Sequence[str] | Iterator[str]) -> None:
    problems = list(problems)
    if problems:
        raise UsageError(problems)


# ---- flags


def check_flags(config: TrainConfig) -> None:
    """Check flags that make no sense, alone or together.

    Raises:
        UsageError: lists every problem.
    """
    groups = (_computation, _steps, _values, _trained_parts)
    _raise([problem for group in groups for problem in group(config)])


def _computation(config: TrainConfig) -> Iterator[str]:
    """Check kernels, parallelism, precision, optimizer and trackers."""
    run, use_liger = config.run, config.model.use_liger
    if use_liger and not is_liger_kernel_available():
        yield "--use_liger True: the package liger-kernel is not installed (pip install liger-kernel)"
    if use_liger and run.device.type != "cuda":
        yield f"--use_liger True: its kernels need an NVIDIA GPU, and this run is on {run.device.type}"
    if run.parallel == "fsdp" and run.world_size == 1:
        yield "--parallel fsdp: there is one process, so nothing to shard; remove it"
    chosen = f"--weight_precision {run.weight_precision}"
    if run.weight_precision != "master":
        if run.deepspeed:
            yield f"{chosen}: DeepSpeed has its own float32 masters; remove it"
        elif not run.bf16:
            yield f"{chosen}: the weights are float32 without --bf16; remove it"
        if run.optim not in OWN_OPTIMIZERS:
            yield f"{chosen}: --optim {run.optim} updates bf16 weights as they are; remove it"
    if run.deepspeed and find_spec("deepspeed") is None:
        yield "--deepspeed: the package deepspeed is not installed (pip install deepspeed)"
    elif run.deepspeed:
        try:
            resolve_deepspeed(run, hidden_size=1)
        except UsageError as error:
            yield from error.problems
    yield from optimizer_problems(run)
    yield from tracker_problems(run.report_to)


def _steps(config: TrainConfig) -> Iterator[str]:
    """Check how many steps there are, and how large they are."""
    run = config.run
    if run.max_packed_tokens < 1:
        yield f"--max_packed_tokens {run.max_packed_tokens} must be at least 1"
    if not run.flags["do_train"]:
        yield "--do_train False: this script only trains"
    if run.max_steps == 0 or (run.max_steps < 0 and run.num_train_epochs <= 0):
        yield "nothing would be trained: --max_steps (or --num_train_epochs) must be more than 0"
    if run.records_per_rank < 1:
        yield "--per_device_train_batch_size and --gradient_accumulation_steps must be at least 1"
    for flag in ("logging", "save", "eval"):
        value = getattr(run, f"{flag}_steps")
        if getattr(run, f"{flag}_strategy") == "steps" and (
            value <= 0 or (value > 1 and value != int(value))
        ):
            yield f"--{flag}_steps {value} must be an integer, or a fraction of all steps below 1"


def _values(config: TrainConfig) -> Iterator[str]:
    """Check single values, and minimum against maximum tiles."""
    model, data, run = config.model, config.data, config.run
    for flag, value, least in (
        ("learning_rate", run.learning_rate, 0),
        ("warmup_steps", run.warmup_steps, 0),
        ("seed", run.seed, 0),
        ("max_bad_steps", run.max_bad_steps, 0),
        ("hang_seconds", run.hang_seconds, 0),
        ("dataloader_num_workers", run.dataloader_num_workers, 0),
        ("force_image_size", data.force_image_size, 1),
        ("max_seq_length", data.max_seq_length, 1),
    ):
        if value < least:
            yield f"--{flag} {value} must be at least {least}"
    if run.save_total_limit is not None and run.save_total_limit < 1:
        yield f"--save_total_limit {run.save_total_limit} must be at least 1"
    yield from _share("drop_path_rate", model.drop_path_rate)
    if model.mlp_path and not Path(model.mlp_path).is_file():
        yield f"--mlp_path {model.mlp_path}: no such file"
    yield from _share("warmup_ratio", run.flags["warmup_ratio"])
    least, most = data.min_dynamic_patch, data.max_dynamic_patch
    if not 1 <= least <= most:
        yield f"--min_dynamic_patch {least} must be from 1 to --max_dynamic_patch {most}"
    if most > MAX_TILES:
        yield f"--max_dynamic_patch {most} must be at most {MAX_TILES}"


def _share(flag: str, value: float) -> Iterator[str]:
    if not 0 <= value < 1:
        yield f"--{flag} {value} must be from 0 to below 1"


def _trained_parts(config: TrainConfig) -> Iterator[str]:
    """Check the adapters, and that something is trained."""
    model = config.model
    adapters = model.use_llm_lora or model.use_backbone_lora
    if min(model.use_llm_lora, model.use_backbone_lora) < 0:
        yield "--use_llm_lora and --use_backbone_lora are ranks, from 0"
    yield from _share("lora_dropout", model.lora_dropout)
    if model.model_name_or_path is None and adapters:
        yield (
            "adapters need one base on disk: train the model that is assembled from --vision_path and "
            "--llm_path first, and give it as --model_name_or_path"
        )
    frozen = model.freeze_llm and model.freeze_mlp and model.freeze_backbone
    if frozen and not (adapters or model.unfreeze_lm_head or model.unfreeze_vit_layers):
        yield "everything is frozen: nothing would be trained"


# ---- validation


def _validation(config: TrainConfig, sets: Sequence[DatasetSpec] | None) -> Iterator[str]:
    """Check the flags of validation; without `sets` their files cannot be read."""
    run = config.run
    if run.eval_strategy == "no":
        for flag, value in _given_validation_flags(config).items():
            yield f"--{flag} {value}: there is no validation without --eval_strategy steps (or epoch)"
        return
    for flag in ("eval_generate", "early_stopping_patience"):
        if getattr(run, flag) < 0:
            yield f"--{flag} {getattr(run, flag)} must be at least 0"
    if run.eval_generate > 0:
        zero3 = run.deepspeed is not None and zero_stage(run.deepspeed) == 3
        if run.parallel == "fsdp" or zero3:
            yield sharded_generation_problem(run, "ZeRO-3" if zero3 else "FSDP")
        if find_spec("rouge") is None:
            yield f"--eval_generate {run.eval_generate}: rouge is not installed (pip install rouge)"
    if run.metric_for_best_model and sets is not None:
        yield from _metric_problem(run, [spec.name for spec in sets])
    if run.load_best_model_at_end and run.save_strategy == "no":
        yield "--load_best_model_at_end True: nothing is saved with --save_strategy no"
    if config.data.eval_meta_path is None:
        yield f"--eval_strategy {run.eval_strategy} needs --eval_meta_path"


def sharded_generation_problem(run: RunConfig, how: str) -> str:
    """Return the message for answers in validation where no rank has all weights."""
    return (
        f"--eval_generate {run.eval_generate}: with {how} no rank has all weights, and answers differ in "
        "length; remove it, or use --parallel ddp"
    )


def _given_validation_flags(config: TrainConfig) -> dict[str, object]:
    """Return the flags that mean nothing without validation, as far as they are given."""
    run = config.run
    values = {
        "eval_meta_path": config.data.eval_meta_path,
        "eval_generate": run.eval_generate,
        "early_stopping_patience": run.early_stopping_patience,
        "load_best_model_at_end": run.load_best_model_at_end,
        "do_eval": run.do_eval,
        "save_strategy": "best" if run.save_strategy == "best" else None,
    }
    found = {flag: value for flag, value in values.items() if value}
    # Some of the others imply it.
    if not found and run.metric_for_best_model:
        found["metric_for_best_model"] = run.metric_for_best_model
    return found


def _metric_problem(run: RunConfig, sets: Sequence[str]) -> Iterator[str]:
    """Check the metric that chooses the best model."""
    known, with_answers = (metric_names(sets, generate=generate) for generate in (False, True))
    wanted = f"eval_{run.metric_for_best_model.removeprefix('eval_')}"
    if wanted in (with_answers if run.eval_generate > 0 else known):
        return
    near = difflib.get_close_matches(wanted, with_answers, n=1)
    if wanted in with_answers:
        advice = "it needs --eval_generate"
    else:
        advice = f"did you mean {near[0]}?" if near else f"use one of {', '.join(with_answers)}"
    yield f"--metric_for_best_model {run.metric_for_best_model}: not measured; {advice}"


# ---- output folder, data, model


def _check_output(config: TrainConfig) -> OutputFolder:
    """Decide on rank 0 what to do with the output folder, for all ranks."""
    found, problems = None, []
    if config.run.is_main:
        try:
            found = _inspect_output(config)
        except UsageError as error:
            problems = error.problems
    found, problems = distributed.broadcast_object((found, problems))
    _raise(problems)
    if found.resume and not (found.resume / "trainer_state.json").is_file():
        raise UsageError(
            f"rank {config.run.rank} does not see the checkpoint {found.resume}: "
            "--output_dir must be on a disk that all machines share"
        )
    return found


def _inspect_output(config: TrainConfig) -> OutputFolder:
    inputs = [config.model.model_name_or_path, config.model.vision_path, config.model.llm_path]
    inputs += [config.data.meta_path, config.data.eval_meta_path]
    paths = [Path(path) for path in inputs if path and Path(path).exists()]
    paths += [Path(read_base(path).path) for path in paths if is_adapter(path)]
    folder = Path(config.run.output_dir)
    overwrite, resume = config.run.overwrite_output_dir, config.run.resume_from_checkpoint
    if is_restarted() and list_checkpoints(folder):
        # Wherever the run first started, a restart by torchrun resumes from its newest checkpoint.
        overwrite, resume = False, "auto"
    found = inspect_output_folder(folder, overwrite=overwrite, resume=resume, inputs=paths)
    if found.resume:
        check_resumable(found.resume)
        check_same_run(found.resume, fingerprint(config))
    return found


def _check_eval_data(config: TrainConfig) -> list[DatasetSpec]:
    """Check the validation sets, if there are any."""
    if config.data.eval_meta_path is None:
        return []
    try:
        return _check_data(config.data.eval_meta_path, config)
    except DataError as error:
        raise DataError(f"--eval_meta_path: {error}") from None


def _check_data(meta: str, config: TrainConfig) -> list[DatasetSpec]:
    """Read a meta file and index every annotation file."""
    specs = load_meta(meta, config.data.data_root or REPOSITORY)
    problems = []
    for spec in specs:
        try:
            RecordFile(spec.annotation)
        except DataError as error:
            problems.append(f"data set {spec.name}: {error}")
    if problems:
        raise DataError(format_problems(problems))
    return specs


def _check_model(config: TrainConfig) -> Path:
    """Check the folder to start from, and return it."""
    model, data = config.model, config.data
    if model.model_name_or_path is None:
        for path in (model.vision_path, model.llm_path):
            weight_files(model_folder(path))
        return model_folder(model.llm_path)
    folder = model_folder(model.model_name_or_path)
    problems = []
    if is_adapter(folder):
        ranks = ranks_of(read_adapter_config(folder))
        base, _ = find_base(folder, model.base_model_path)
        found = read_config(base)
    else:
        weight_files(folder)
        found = read_config(folder)
        ranks = (found.use_llm_lora, found.use_backbone_lora)
    for tower, flag, rank, asked in (
        ("language model", "use_llm_lora", ranks[0], model.use_llm_lora),
        ("vision tower", "use_backbone_lora", ranks[1], model.use_backbone_lora),
    ):
        if rank and rank != asked:
            problems.append(
                f"{folder} holds adapters of rank {rank} in the {tower}, but --{flag} is {asked}; "
                f"give --{flag} {rank} to continue training them, or merge them first (m3llm merge)"
            )
    if data.down_sample_ratio != found.downsample_ratio:
        problems.append(
            f"--down_sample_ratio {data.down_sample_ratio} is not the model's {found.downsample_ratio}"
        )
    if abs(model.unfreeze_vit_layers) > found.vision_config.num_hidden_layers:
        problems.append(
            f"--unfreeze_vit_layers {model.unfreeze_vit_layers}: the vision tower has "
            f"{found.vision_config.num_hidden_layers} layers"
        )
    changed = dataclasses.replace(found)
    apply_flags(changed, config)
    problems += [f"with these flags: {problem}" for problem in changed.problems()]
    found.build_llm_config()
    load_tokenizer(folder)
    _raise(problems)
    return folder


def apply_flags(model_config: InternVLChatConfig, config: TrainConfig) -> None:
    """Set the flags in the model's configuration, as the reference does."""
    model, data = config.model, config.data
    model_config.template = data.conv_style
    model_config.select_layer = model.vision_select_layer
    model_config.ps_version = model.ps_version
    model_config.dynamic_image_size = data.dynamic_image_size
    model_config.use_thumbnail = data.use_thumbnail
    model_config.min_dynamic_patch = data.min_dynamic_patch
    model_config.max_dynamic_patch = data.max_dynamic_patch
    model_config.pad2square = data.pad2square
    model_config.force_image_size = data.force_image_size

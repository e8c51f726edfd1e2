"""What must hold before a run begins; every problem of flags, model, data and output folder at once."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from internvl_chat.data.jsonl import RecordFile
from internvl_chat.data.meta import DatasetSpec, load_meta
from internvl_chat.data.tokenizer import load_tokenizer
from internvl_chat.model.adapter import find_base, read_base
from internvl_chat.model.attention import resolve_attention
from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.folders import is_adapter, model_folder, read_config
from internvl_chat.model.lora import ranks_of, read_adapter_config
from internvl_chat.model.weights import weight_files
from internvl_chat.train.arguments import Arguments
from internvl_chat.train.checkpoint.fingerprint import check_same_run, fingerprint
from internvl_chat.train.checkpoint.run_folder import OutputFolder, inspect_output_folder, list_checkpoints
from internvl_chat.train.flag_rules import check_flags
from internvl_chat.train.validation_flags import check_validation
from internvl_chat.utils.errors import DataError, M3LLMError, ModelError, UsageError, format_problems
from internvl_chat.utils.paths import REPOSITORY


@dataclass(frozen=True)
class Plan:
    """A run whose configuration has been checked.

    Attributes:
        args: the command line.
        output: what to do with the output folder.
        source: folder of the weights to start from (a checkpoint's when resuming).
        specs: the data sets.
        held_out: those to validate on.
        attn: the attention to use.
    """

    args: Arguments
    output: OutputFolder
    source: Path
    specs: list[DatasetSpec]
    held_out: list[DatasetSpec]
    attn: str


def check_configuration(args: Arguments) -> Plan:
    """Check everything that can be checked without reading weights.

    Raises:
        UsageError: lists every problem of flags, model, data and output folder.
    """
    problems: list[str] = []
    data_fault_only = True
    results = {}
    checks = {
        "output": lambda: _check_output(args),
        "attn": lambda: resolve_attention(args.model.attn, args.run.device, training_dtype(args)),
        "specs": lambda: _check_data(args.data.meta_path, args),
        "held_out": lambda: _check_held_out(args),
        "validation": lambda: check_validation(args, results.get("held_out")),
        "source": lambda: _check_model(args),
        "flags": lambda: check_flags(args),
    }
    for name, check in checks.items():
        try:
            results[name] = check()
        except M3LLMError as error:
            problems += error.problems if isinstance(error, UsageError) else [str(error)]
            data_fault_only &= not isinstance(error, UsageError)
    if problems and data_fault_only:
        raise ModelError(format_problems(problems))
    if problems:
        raise UsageError(problems)
    output: OutputFolder = results["output"]
    source = output.resume or results["source"]
    return Plan(args, output, source, results["specs"], results["held_out"], results["attn"])


def _check_output(args: Arguments) -> OutputFolder:
    """Decide on the main process what to do with the output folder; the others are told."""
    answer: list = [None, None]
    if args.run.process_index == 0:
        try:
            answer[0] = _inspect_output(args)
        except UsageError as error:
            answer[1] = error.problems
    if args.run.world_size > 1:
        torch.distributed.broadcast_object_list(answer, src=0)
    found, problems = answer
    if problems:
        raise UsageError(problems)
    if found.resume and not (found.resume / "trainer_state.json").is_file():
        raise UsageError(
            f"process {args.run.process_index} does not see the checkpoint {found.resume}: "
            "--output_dir must be on a disk that all machines share"
        )
    return found


def _inspect_output(args: Arguments) -> OutputFolder:
    inputs = [args.model.model_name_or_path, args.model.vision_path, args.model.llm_path]
    inputs += [args.data.meta_path, args.data.eval_meta_path]
    paths = [Path(path) for path in inputs if path and Path(path).exists()]
    paths += [Path(read_base(path).path) for path in paths if is_adapter(path)]
    folder = Path(args.run.output_dir)
    overwrite, resume = args.run.overwrite_output_dir, args.run.resume_from_checkpoint
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and list_checkpoints(folder):
        # What torchrun has started again goes on, wherever it first began.
        overwrite, resume = False, "auto"
    found = inspect_output_folder(folder, overwrite=overwrite, resume=resume, inputs=paths)
    if found.resume:
        check_same_run(found.resume, fingerprint(args))
    return found


def _check_held_out(args: Arguments) -> list[DatasetSpec]:
    """Check the data sets to validate on, if there are any."""
    if args.data.eval_meta_path is None:
        return []
    try:
        return _check_data(args.data.eval_meta_path, args)
    except DataError as error:
        raise DataError(f"--eval_meta_path: {error}") from None


def _check_data(meta: str, args: Arguments) -> list[DatasetSpec]:
    """Read a meta file and index every annotation file."""
    specs = load_meta(meta, args.data.data_root or REPOSITORY)
    problems = []
    for spec in specs:
        try:
            RecordFile(spec.annotation)
        except DataError as error:
            problems.append(f"data set {spec.name}: {error}")
    if problems:
        raise DataError(format_problems(problems))
    return specs


def training_dtype(args: Arguments) -> torch.dtype:
    """Return the dtype of the weights: bfloat16 with `--bf16`, as the reference, else float32."""
    return torch.bfloat16 if args.run.bf16 else torch.float32


def _check_model(args: Arguments) -> Path:
    """Check the folder to start from, and return it."""
    model, data = args.model, args.data
    if model.model_name_or_path is None:
        for path in (model.vision_path, model.llm_path):
            weight_files(model_folder(path))
        return model_folder(model.llm_path)
    folder = model_folder(model.model_name_or_path)
    problems = []
    if is_adapter(folder):
        ranks = ranks_of(read_adapter_config(folder))
        base, _ = find_base(folder, model.base_model_path)
        config = read_config(base)
    else:
        weight_files(folder)
        config = read_config(folder)
        ranks = (config.use_llm_lora, config.use_backbone_lora)
    for tower, flag, rank, asked in (
        ("language model", "use_llm_lora", ranks[0], model.use_llm_lora),
        ("vision tower", "use_backbone_lora", ranks[1], model.use_backbone_lora),
    ):
        if rank and rank != asked:
            problems.append(
                f"{folder} holds adapters of rank {rank} in the {tower}, but --{flag} is {asked}; "
                f"give --{flag} {rank} to go on training them, or merge them first (m3llm merge)"
            )
    if data.down_sample_ratio != config.downsample_ratio:
        problems.append(
            f"--down_sample_ratio {data.down_sample_ratio} is not the model's {config.downsample_ratio}"
        )
    if abs(model.unfreeze_vit_layers) > config.vision_config.num_hidden_layers:
        problems.append(
            f"--unfreeze_vit_layers {model.unfreeze_vit_layers}: the vision tower has "
            f"{config.vision_config.num_hidden_layers} layers"
        )
    changed = dataclasses.replace(config)
    configure(changed, args)
    problems += [f"with these flags: {problem}" for problem in changed.problems()]
    config.build_llm_config()
    load_tokenizer(folder)
    if problems:
        raise UsageError(problems)
    return folder


def configure(config: InternVLChatConfig, args: Arguments) -> None:
    """Set the options of the command line in the model's configuration, as the reference does."""
    model, data = args.model, args.data
    config.template = data.conv_style
    config.select_layer = model.vision_select_layer
    config.ps_version = model.ps_version
    config.dynamic_image_size = data.dynamic_image_size
    config.use_thumbnail = data.use_thumbnail
    config.min_dynamic_patch = data.min_dynamic_patch
    config.max_dynamic_patch = data.max_dynamic_patch
    config.pad2square = data.pad2square
    config.force_image_size = data.force_image_size

"""What must hold before a run begins, and the objects that it is made of."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from internvl_chat.data.dataset import TrainingData, build_sets
from internvl_chat.data.encoding import RecordEncoder
from internvl_chat.data.meta import DatasetSpec, load_meta
from internvl_chat.data.order import StepSampler
from internvl_chat.data.preprocessing import Preprocessing
from internvl_chat.data.template import SYSTEM_TEXTS
from internvl_chat.data.tokenizer import image_context_id, load_tokenizer
from internvl_chat.errors import M3LLMError, ModelError, UsageError, format_problems
from internvl_chat.logs import get_logger
from internvl_chat.model.assemble import assemble_model
from internvl_chat.model.attention import resolve_attention
from internvl_chat.model.checkpoint import (
    BaseModel,
    copy_companions,
    find_base,
    is_adapter,
    load_model,
    model_folder,
    read_config,
    resize_vocabulary,
    save_adapter,
    save_model,
)
from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.lora import add_lora, lora_layers, ranks_of, read_adapter_config
from internvl_chat.model.modeling import InternVLChatModel
from internvl_chat.model.weights import weight_files, weights_digest
from internvl_chat.train.arguments import Arguments
from internvl_chat.train.output_folder import OutputFolder, inspect_output_folder

logger = get_logger(__name__)

REPOSITORY = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Plan:
    """A run whose configuration has been checked.

    Attributes:
        args: the command line.
        output: what to do with the output folder.
        source: folder of the weights to start from (a checkpoint's when resuming).
        specs: the data sets.
        attn: the attention to use.
    """

    args: Arguments
    output: OutputFolder
    source: Path
    specs: list[DatasetSpec]
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
        "attn": lambda: resolve_attention(args.model.attn, args.run.device),
        "specs": lambda: load_meta(args.data.meta_path, args.data.data_root or REPOSITORY),
        "source": lambda: _check_model(args),
        "flags": lambda: _check_flags(args),
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
    return Plan(args, output, output.resume or results["source"], results["specs"], results["attn"])


def _check_output(args: Arguments) -> OutputFolder:
    if args.run.process_index:  # the main process decides, and the others follow the checkpoints they see
        resume = args.run.resume_from_checkpoint
        overwrite = args.run.overwrite_output_dir
        try:
            return inspect_output_folder(Path(args.run.output_dir), overwrite=overwrite, resume=resume)
        except UsageError:
            return OutputFolder(Path(args.run.output_dir), None, overwrite=False)
    return inspect_output_folder(
        Path(args.run.output_dir),
        overwrite=args.run.overwrite_output_dir,
        resume=args.run.resume_from_checkpoint,
    )


def _check_flags(args: Arguments) -> None:
    """Check values that only make sense together."""
    model, data, run = args.model, args.data, args.run
    problems = []
    if run.fp16:
        problems.append("--fp16: the model trains in bfloat16 (--bf16 True) or float32")
    if not 0 <= run.warmup_ratio < 1:
        problems.append(f"--warmup_ratio {run.warmup_ratio} must be from 0 to below 1")
    if data.max_dynamic_patch < data.min_dynamic_patch or data.min_dynamic_patch < 1:
        problems.append(
            f"--min_dynamic_patch {data.min_dynamic_patch} must be from 1 to --max_dynamic_patch "
            f"{data.max_dynamic_patch}"
        )
    if min(model.use_llm_lora, model.use_backbone_lora) < 0:
        problems.append("--use_llm_lora and --use_backbone_lora are ranks, from 0")
    if not 0 <= model.lora_dropout < 1:
        problems.append(f"--lora_dropout {model.lora_dropout} must be from 0 to below 1")
    trains_something = (
        not (model.freeze_llm and model.freeze_mlp and model.freeze_backbone)
        or model.use_llm_lora
        or model.use_backbone_lora
        or model.unfreeze_lm_head
        or model.unfreeze_vit_layers
    )
    if not trains_something:
        problems.append("everything is frozen: nothing would be trained")
    if problems:
        raise UsageError(problems)


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
        base, _ = find_base(folder)
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


def training_dtype(args: Arguments) -> torch.dtype:
    """Return the dtype of the weights: bfloat16 with `--bf16`, as the reference, else float32."""
    return torch.bfloat16 if args.run.bf16 else torch.float32


def load_for_training(plan: Plan) -> tuple[InternVLChatModel, PreTrainedTokenizerBase, Preprocessing]:
    """Load the model and tokenizer, apply the command line's options, and add adapters where asked.

    What is trained is decided afterwards, by `set_trainable`.
    """
    args = plan.args
    deepspeed = args.run.hf_deepspeed_config if args.run.deepspeed else None
    if deepspeed is None:
        return _load_for_training(plan)
    # Under ZeRO-3 transformers would split a model's parameters while it is built; ours are read whole and
    # split when training begins. Every process must then run every module.
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    model, tokenizer, preprocessing = _load_for_training(plan)
    set_hf_deepspeed_config(deepspeed)
    model.always_run_vision = deepspeed.is_zero3()
    return model, tokenizer, preprocessing


def _load_for_training(plan: Plan) -> tuple[InternVLChatModel, PreTrainedTokenizerBase, Preprocessing]:
    args, dtype = plan.args, training_dtype(plan.args)
    tokenizer, added = load_tokenizer(plan.source)
    context = image_context_id(tokenizer)
    if args.model.model_name_or_path is None and plan.output.resume is None:
        model = assemble_model(
            vision_folder=model_folder(args.model.vision_path),
            llm_folder=model_folder(args.model.llm_path),
            mlp_file=Path(args.model.mlp_path) if args.model.mlp_path else None,
            downsample_ratio=args.data.down_sample_ratio,
            image_context_id=context,
            dtype=dtype,
            attn=plan.attn,
            drop_path_rate=args.model.drop_path_rate,
        )
    else:
        model = load_model(
            plan.source,
            image_context_id=context,
            dtype=dtype,
            attn=plan.attn,
            lora_dropout=args.model.lora_dropout,
            drop_path_rate=args.model.drop_path_rate,
        )
    if added:
        logger.info("%d special tokens added to the tokenizer", added)
        resize_vocabulary(model, len(tokenizer), added)
    if model.config.image_size != args.data.force_image_size:
        model.vision_model.resize_positions(args.data.force_image_size)
    configure(model.config, args)
    if not lora_layers(model):
        add_lora(
            model,
            llm_rank=args.model.use_llm_lora,
            vision_rank=args.model.use_backbone_lora,
            dropout=args.model.lora_dropout,
        )
    if args.model.grad_checkpoint:
        model.enable_gradient_checkpointing()
    preprocessing = dataclasses.replace(
        Preprocessing.from_model_config(model.config),
        system_text=SYSTEM_TEXTS[args.data.conv_style],
        normalize_type=args.data.normalize_type,
        max_seq_length=args.data.max_seq_length,
    )
    return model, tokenizer, preprocessing


def load_data(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, preprocessing: Preprocessing
) -> tuple[TrainingData, StepSampler]:
    """Open the data sets and decide the order of their records."""
    run, resample = plan.args.run, plan.args.data.use_data_resampling
    sets = build_sets(plan.specs, RecordEncoder(tokenizer, preprocessing))
    data = TrainingData(sets, seed=run.seed)
    for records in sets:
        logger.info("data set %s: %d records, %d an epoch", records.spec.name, len(records), records.num_used)
    by_length = run.train_sampling_strategy == "group_by_length" and run.world_size > 1
    sampler = StepSampler(
        data.sizes,
        step_records=run.step_records,
        rank=run.process_index,
        processes=run.world_size,
        seed=run.seed,
        strategy=run.train_sampling_strategy,
        resample=resample,
        lengths=data.estimated_lengths() if by_length else None,
    )
    return data, sampler


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes self-contained checkpoints: the model or its adapters, tokenizer, preprocessing.

    Attributes:
        model: the model in training.
        tokenizer: saved anew where it was changed, else copied.
        preprocessing: of the run.
        source: folder that tokenizer and companions come from.
        base: for adapters, the model that they belong to.
        keep_tokenizer: the source's tokenizer files are right as they are.
    """

    model: InternVLChatModel
    tokenizer: PreTrainedTokenizerBase
    preprocessing: Preprocessing
    source: Path
    base: BaseModel | None
    keep_tokenizer: bool

    def __call__(self, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write a checkpoint into a folder, which is made if need be."""
        if self.base is not None:
            save_adapter(self.model, folder, self.base, state_dict)
        else:
            save_model(self.model, folder, state_dict)
        copy_companions(self.source, folder)
        if not self.keep_tokenizer:
            self.tokenizer.save_pretrained(str(folder))
        self.preprocessing.save(folder)


def checkpoint_writer(
    plan: Plan, model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, preprocessing: Preprocessing
) -> CheckpointWriter:
    """Return what writes the run's checkpoints; hashes the base of adapters on the main process."""
    base = None
    if lora_layers(model) and plan.args.run.should_save:
        base = _base_of(plan)
    _, added = load_tokenizer(plan.source)
    return CheckpointWriter(model, tokenizer, preprocessing, plan.source, base, keep_tokenizer=added == 0)


def _base_of(plan: Plan) -> BaseModel:
    """Return the whole model under the adapters of this run."""
    if is_adapter(plan.source):
        return find_base(plan.source)[1]
    path = plan.args.model.model_name_or_path
    return BaseModel(str(Path(path).absolute()) if Path(path).is_dir() else path, weights_digest(plan.source))

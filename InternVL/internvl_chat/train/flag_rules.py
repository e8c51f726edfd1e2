"""What must hold of the flags by themselves, before a run begins; each rule says which flag to change."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_liger_kernel_available

from internvl_chat.data.meta import MOST_TILES
from internvl_chat.train.arguments import Arguments
from internvl_chat.train.optim.adamw import OWN_OPTIMIZERS
from internvl_chat.utils.errors import UsageError

# Flags of transformers that would be ignored or fail late, what they must be, and what to use.
_UNSUPPORTED = (
    ("label_smoothing_factor", 0.0, "the loss is the reference's"),
    ("dataloader_drop_last", False, "the last, short step of an epoch is used"),
    ("data_seed", None, "--seed decides the order of the records"),
    ("ignore_data_skip", False, "a run that resumes goes on with the records that it has not used"),
    ("gradient_checkpointing", False, "use --grad_checkpoint"),
    ("activation_checkpointing", False, "use --grad_checkpoint"),
    ("fsdp_config", None, "--fsdp full_shard has no options"),
    ("torch_compile_backend", None, "--torch_compile True uses inductor"),
    ("torch_compile_mode", None, "--torch_compile True compiles for rows of any length"),
    ("use_liger_kernel", False, "use --use_liger"),
    ("enable_jit_checkpoint", False, "checkpoints are written by --save_steps"),
    ("auto_find_batch_size", False, "lower --per_device_train_batch_size"),
    ("neftune_noise_alpha", None, "the embeddings are the reference's"),
    ("push_to_hub", False, "upload the finished folder"),
)


def check_flags(args: Arguments) -> None:
    """Check values that make no sense, alone or together.

    Raises:
        UsageError: lists every problem.
    """
    groups = (_computation, _steps, _unsupported, _reports, _values, _trained_parts)
    problems = [problem for group in groups for problem in group(args)]
    if problems:
        raise UsageError(problems)


def _computation(args: Arguments) -> Iterator[str]:
    """Look at numbers, kernels and how the weights are spread."""
    run, use_liger = args.run, args.model.use_liger
    if run.fp16:
        yield "--fp16: the model trains in bfloat16 (--bf16 True) or float32"
    if use_liger and not is_liger_kernel_available():
        yield "--use_liger True: the package liger-kernel is not installed (pip install liger-kernel)"
    if use_liger and run.device.type != "cuda":
        yield f"--use_liger True: its kernels need an NVIDIA GPU, and this run is on {run.device.type}"
    if run.sharded and run.deepspeed:
        yield "--fsdp and --deepspeed: both spread the weights; use one of them"
    if run.sharded and run.world_size == 1:
        yield "--fsdp full_shard: there is one process, so nothing to spread; leave it out"
    chosen = f"--weight_precision {run.weight_precision}"
    if run.weight_precision in ("stochastic", "bf16") and run.deepspeed:
        yield f"{chosen}: DeepSpeed keeps float32 masters; leave it out"
    elif run.weight_precision in ("stochastic", "bf16") and not run.bf16:
        yield f"{chosen}: the weights are float32 without --bf16; leave it out"
    if run.weight_precision != "auto" and run.optim not in OWN_OPTIMIZERS:
        yield f"{chosen}: --optim {run.optim.value} steps bf16 weights as such"


def _steps(args: Arguments) -> Iterator[str]:
    """Look at how many steps there are, and of how much."""
    run = args.run
    if run.max_packed_tokens < 1:
        yield f"--max_packed_tokens {run.max_packed_tokens} must be at least 1"
    if not run.do_train:
        yield "--do_train False: this script does nothing but train"
    if run.max_steps == 0 or (run.max_steps < 0 and run.num_train_epochs <= 0):
        yield "nothing would be trained: --max_steps (or --num_train_epochs) must be more than 0"
    if run.share_of_step < 1:
        yield "--per_device_train_batch_size and --gradient_accumulation_steps must be at least 1"


def _unsupported(args: Arguments) -> Iterator[str]:
    """Look at flags of transformers that have no use here."""
    for flag, default, advice in _UNSUPPORTED:
        value = getattr(args.run, flag, default)
        if value != default and (value or default):
            yield f"--{flag} {value}: not supported; {advice}"


def _reports(args: Arguments) -> Iterator[str]:
    """Look at where figures are reported to."""
    wanted = args.run.report_to
    unknown = set(wanted) - INTEGRATION_TO_CALLBACK.keys()
    if unknown:
        yield f"--report_to {' '.join(sorted(unknown))}: unknown; use none or wandb"
    for name in ("wandb", "tensorboard"):
        if name in wanted and find_spec(name) is None:
            yield f"--report_to {name}: the package {name} is not installed"


def _values(args: Arguments) -> Iterator[str]:
    """Look at values one by one, and at the fewest and the most tiles."""
    model, data, run = args.model, args.data, args.run
    for flag, value, least in (
        ("learning_rate", run.learning_rate, 0),
        ("seed", run.seed, 0),
        ("max_bad_steps", run.max_bad_steps, 0),
        ("hang_seconds", run.hang_seconds, 0),
        ("dataloader_num_workers", run.dataloader_num_workers, 0),
        ("force_image_size", data.force_image_size, 1),
        ("max_seq_length", data.max_seq_length, 1),
    ):
        if value < least:
            yield f"--{flag} {value} must be at least {least}"
    yield from _share("drop_path_rate", model.drop_path_rate)
    if model.mlp_path and not Path(model.mlp_path).is_file():
        yield f"--mlp_path {model.mlp_path}: no such file"
    yield from _share("warmup_ratio", run.warmup_ratio)
    fewest, most = data.min_dynamic_patch, data.max_dynamic_patch
    if not 1 <= fewest <= most:
        yield f"--min_dynamic_patch {fewest} must be from 1 to --max_dynamic_patch {most}"
    if most > MOST_TILES:
        yield f"--max_dynamic_patch {most} must be at most {MOST_TILES}"


def _share(flag: str, value: float) -> Iterator[str]:
    if not 0 <= value < 1:
        yield f"--{flag} {value} must be from 0 to below 1"


def _trained_parts(args: Arguments) -> Iterator[str]:
    """Look at the adapters, and at whether anything is trained."""
    model = args.model
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

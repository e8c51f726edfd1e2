"""Build the parts of a run: model, tokenizer, preprocessing, data, sampler and parallel strategy."""

import copy
import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase

from internvl_chat.constants import SYSTEM_TEXTS
from internvl_chat.data.audit.checks import check_before_training
from internvl_chat.data.batching.packing import StepPlanner
from internvl_chat.data.batching.sampler import StepSampler
from internvl_chat.data.dataset import TrainingData, build_sets
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer import image_context_id, load_tokenizer
from internvl_chat.data.index.cache import Lengths
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.data.sources.skip_policy import ExcludedRecord
from internvl_chat.data.storage.stores import ObjectStore
from internvl_chat.model.assemble import assemble_model, assembled_config
from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.flops import FlopCounter
from internvl_chat.model.io.checkpoint import load_model, resize_vocabulary
from internvl_chat.model.io.folders import is_adapter, model_folder, read_config
from internvl_chat.model.lora.injection import add_lora, lora_layers
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.checks import RunPlan, apply_flags
from internvl_chat.train.config import RunConfig, TrainConfig
from internvl_chat.train.distributed.deepspeed import DeepSpeedStrategy, resolve_deepspeed
from internvl_chat.train.distributed.fsdp import FSDPStrategy
from internvl_chat.train.distributed.strategy import Strategy
from internvl_chat.train.flags import FSDP_MODES
from internvl_chat.train.optim.factory import make_optimizer, make_scheduler
from internvl_chat.train.preflight.memory import MemoryPlan
from internvl_chat.train.preflight.sanity import preprocessing_changes
from internvl_chat.train.validation import Validation
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.text import counted

logger = get_logger(__name__)

# Maximum number of excluded records that are logged; the ledger lists all.
_MAX_LOGGED = 20
# Validation records that each rank loads at a time.
_EVAL_RECORDS = 32
# Names of N images, and their sizes and versions, (N, 2) int64.
ImageStates: TypeAlias = tuple[list[str], np.ndarray]


def adapter_base(plan: RunPlan) -> str | None:
    """Return the path to the adapters' base model; None to use the path stored with the adapters."""
    model = plan.config.model
    if model.base_model_path or plan.output.resume is None:
        return model.base_model_path
    path = model.model_name_or_path
    return None if path is None or is_adapter(model_folder(path)) else path


def load_for_training(plan: RunPlan) -> tuple[InternVLChatModel, PreTrainedTokenizerBase, Preprocessing]:
    """Return the model with the flags applied and adapters added, its tokenizer, and its preprocessing."""
    config, dtype = plan.config, plan.config.run.dtype
    tokenizer, added = load_tokenizer(plan.source)
    context = image_context_id(tokenizer)
    if config.model.model_name_or_path is None and plan.output.resume is None:
        vision, llm = map(model_folder, config.model.parts)
        model = assemble_model(
            vision_folder=vision,
            llm_folder=llm,
            mlp_file=Path(config.model.mlp_path) if config.model.mlp_path else None,
            downsample_ratio=config.data.down_sample_ratio,
            image_context_id=context,
            dtype=dtype,
            attn=plan.attn,
            drop_path_rate=config.model.drop_path_rate,
        )
    else:
        model = load_model(
            plan.source,
            base=adapter_base(plan),
            image_context_id=context,
            dtype=dtype,
            attn=plan.attn,
            lora_dropout=config.model.lora_dropout,
            drop_path_rate=config.model.drop_path_rate,
            load_in_4bit=config.model.load_in_4bit,
        )
    if added:
        logger.info("%d special tokens added to the tokenizer", added)
        resize_vocabulary(model, len(tokenizer), added)
    preprocessing = prepare_model(model, config, plan.specs)
    _report_changes(plan.source, preprocessing)
    return model, tokenizer, preprocessing


def _report_changes(source: Path, preprocessing: Preprocessing) -> None:
    """Log how the preprocessing differs from the options stored with the initial checkpoint."""
    for name, change in preprocessing_changes(source, preprocessing).items():
        if name not in ("tile_size", "tokens_per_tile"):  # already logged by `prepare_model`
            # Each recipe has its own limits, so they usually differ.
            is_limit = name in ("max_seq_length", "max_dynamic_patch")
            logger.log(logging.INFO if is_limit else logging.WARNING, "%s", change)


def prepare_model(
    model: InternVLChatModel, config: TrainConfig, specs: Sequence[DatasetSpec]
) -> Preprocessing:
    """Apply the flags to a loaded model, add adapters, and return its preprocessing."""
    before = model.config.image_size, model.config.tokens_per_tile
    if before[0] != config.data.force_image_size:
        model.vision_model.resize_positions(config.data.force_image_size)
    apply_flags(model.config, config)
    if before[0] != config.data.force_image_size:
        logger.warning(
            "--force_image_size %d: the checkpoint uses %d-pixel tiles of %d tokens; this run uses %d-pixel "
            "tiles of %d tokens and interpolates the position embeddings",
            config.data.force_image_size, *before, model.config.image_size, model.config.tokens_per_tile,
        )  # fmt: skip
    if not lora_layers(model):
        add_lora(
            model,
            llm_rank=config.model.use_llm_lora,
            vision_rank=config.model.use_backbone_lora,
            dropout=config.model.lora_dropout,
            use_dora=config.model.use_dora,
            use_rslora=config.model.use_rslora,
        )
    preprocessing = plan_preprocessing(model.config, config, specs)
    model.config.max_dynamic_patch = preprocessing.max_dynamic_patch
    model.config.min_dynamic_patch = preprocessing.min_dynamic_patch
    return preprocessing


def plan_preprocessing(
    model_config: InternVLChatConfig, config: TrainConfig, specs: Sequence[DatasetSpec]
) -> Preprocessing:
    """Return the preprocessing of a model after applying the flags.

    Args:
        specs: training datasets; the model gets the largest of their tile limits.
    """
    model_config = copy.deepcopy(model_config)
    apply_flags(model_config, config)
    limits = [spec.max_dynamic_patch or config.data.max_dynamic_patch for spec in specs]
    model_config.max_dynamic_patch = max(limits)
    model_config.min_dynamic_patch = min(model_config.min_dynamic_patch, *limits)
    return dataclasses.replace(
        Preprocessing.from_model_config(model_config),
        system_text=SYSTEM_TEXTS[config.data.conv_style],
        normalize_type=config.data.normalize_type,
        max_seq_length=config.data.max_seq_length,
        image_background=config.data.image_background,
        exif_transpose=config.data.exif_transpose,
        escape_control_tokens=config.data.escape_control_tokens,
    )


def load_encoder(plan: RunPlan) -> RecordEncoder:
    """Return the record encoder, with the tile limit `--max_dynamic_patch`; does not read weights."""
    config = plan.config
    if config.model.model_name_or_path is None and plan.output.resume is None:
        vision, llm = map(model_folder, config.model.parts)
        model_config = assembled_config(vision, llm, config.data.down_sample_ratio)
    else:
        model_config = read_config(plan.source)
    tokenizer, _ = load_tokenizer(plan.source)
    preprocessing = plan_preprocessing(model_config, config, plan.specs)
    preprocessing = preprocessing.with_tile_limit(config.data.max_dynamic_patch)
    return RecordEncoder(tokenizer, preprocessing, truncate_text=config.data.truncate_text)


def load_records(
    config: TrainConfig,
    specs: Sequence[DatasetSpec],
    encoder: RecordEncoder,
    *,
    resumed_exclusions: Sequence[tuple[str, int]] | None = None,
) -> TrainingData:
    """Open the datasets, check every record, and return the training data.

    Args:
        resumed_exclusions: (dataset, index) of the records that were excluded when the resumed run started.
            They are excluded again, even if repaired, so that the record order does not change. None for a
            new run.

    Raises:
        DataError: with `--on_bad_record fail`, a record is unusable; with `skip`, too many are.
    """
    sets = build_sets(specs, encoder)
    limits = {s.spec.name: s.encoder.preprocessing.max_dynamic_patch for s in sets}
    splits = encoder.preprocessing.dynamic_image_size
    if splits and len(set(limits.values())) > 1:
        logger.warning("tile limits differ between datasets (%s); the checkpoint stores the largest", limits)
    lengths, excluded, digests, image_digests, states = distributed.run_on_rank_0(
        lambda: _check_records(sets, config, resumed_exclusions)
    )
    _compare_nodes(sets, digests)
    for records, known in zip(sets, states, strict=True):
        if known is not None:
            records.remember_images(*known)
    skip = config.data.on_bad_record == "skip"
    data = TrainingData(
        sets,
        seed=config.run.seed,
        lengths=lengths,
        excluded=excluded,
        max_bad_fraction=config.data.max_bad_fraction if skip else None,
        digests=digests,
        image_digests=image_digests,
    )
    rows = [
        f"  {s.spec.name}: {counted(len(s), 'record')}, {size} per epoch, "
        + (f"at most {counted(limits[s.spec.name], 'tile')} each" if splits else "one tile per image")
        for s, size in zip(sets, data.sizes, strict=True)
    ]
    logger.info("data: %s per epoch\n%s", counted(len(data), "record"), "\n".join(rows))
    if excluded:
        logger.warning(
            "%s excluded; ledger.jsonl lists all of them:\n%s",
            counted(len(excluded), "record"),
            "\n".join(f"  {record.message}" for record in excluded[:_MAX_LOGGED]),
        )  # fmt: skip
    return data


def _compare_nodes(sets: Sequence[RecordSet], digests: Sequence[str]) -> None:
    """Check that all nodes have the same annotation files as rank 0. Collective: call on all ranks.

    Raises:
        AgreedError: the annotation files of a node differ.
    """
    if distributed.world_size() == distributed.local_world_size():
        return
    differing: list[str] = []
    if distributed.local_rank() == 0:
        files = zip(sets, digests, strict=True)
        differing = [str(s.spec.annotation) for s, digest in files if s.digest() != digest]
    error = DataError(
        f"{', '.join(differing)}: differs from the file on the node of rank 0; use the same data on all nodes"
    )
    distributed.agree(error if differing else None, group=distributed.host_group())


def build_sampler(config: TrainConfig, data: TrainingData, flops: FlopCounter) -> StepSampler:
    """Return the sampler, which packs the records of each step and balances FLOPs across ranks."""
    run = config.run
    return _sampler(
        run,
        data,
        flops,
        step_records=run.records_per_step,
        seed=run.seed,
        strategy=run.train_sampling_strategy,
        resample=config.data.use_data_resampling,
    )


def _sampler(run: RunConfig, data: TrainingData, flops: FlopCounter, **options: Any) -> StepSampler:
    lengths = data.epoch_lengths()
    planner = StepPlanner(
        run.world_size,
        tokens=lengths.tokens,
        costs=flops.records(lengths.tokens, lengths.supervised, lengths.tiles),
        max_packed_tokens=run.max_packed_tokens if run.packing else None,
        records_per_pack=run.records_per_pack,
    )
    return StepSampler(data.sizes, planner=planner, rank=run.rank, **options)


def build_validation(
    config: TrainConfig, data: TrainingData, flops: FlopCounter, *, sharded: bool
) -> Validation:
    """Return the `Validation` of a run; it reads its records in file order.

    Args:
        config: configuration of the run.
        data: validation data.
        flops: FLOPs of the model.
        sharded: whether the weights are sharded. Then there are no sample answers, because all ranks would
            have to run the same number of decoding steps.
    """
    run, records = config.run, _EVAL_RECORDS * config.run.world_size
    if sharded and run.eval_samples:
        logger.info("no sample answers (--eval_samples): not supported with sharded weights")
    sampler = _sampler(run, data, flops, step_records=records, strategy="sequential")
    normalization = data.sets[0].encoder.preprocessing.normalize_type
    return Validation(
        data,
        sampler,
        reduction=run.loss_reduction,
        generate=run.eval_generate,
        samples=0 if sharded else run.eval_samples,
        normalization=normalization,
        options=run.dataloader_options,
    )


def _check_records(
    sets: Sequence[RecordSet], config: TrainConfig, resumed_exclusions: Sequence[tuple[str, int]] | None
) -> tuple[list[Lengths], list[ExcludedRecord], list[str], list[str], list[ImageStates | None]]:
    """Run the data check. A resumed run excludes the same records as before.

    Returns:
        Record lengths (per dataset), excluded records, digests of the annotation files (per dataset),
        digests of the image files (per dataset), and arguments for `RecordSet.remember_images` (per dataset;
        None without object storage).
    """
    lengths, excluded, manifests = check_before_training(
        sets,
        check=config.data.check,
        on_bad_record=config.data.on_bad_record,
        max_bad_fraction=config.data.max_bad_fraction,
    )
    if resumed_exclusions is not None:
        excluded = [
            ExcludedRecord(name, index, "excluded since the start of this run")
            for name, index in resumed_exclusions
        ]
    image_digests = [
        manifest.digest({record.index for record in excluded if record.dataset == records.spec.name})
        for records, manifest in zip(sets, manifests, strict=True)
    ]
    states = [
        (manifest.names, manifest.states) if isinstance(records.root, ObjectStore) else None
        for records, manifest in zip(sets, manifests, strict=True)
    ]
    return lengths, excluded, [records.digest() for records in sets], image_digests, states


def build_strategy(config: TrainConfig, memory: MemoryPlan, model: InternVLChatModel, steps: int) -> Strategy:
    """Parallelize the model as planned, and build its optimizer and learning-rate scheduler.

    Args:
        model: model, after `set_trainable`.
        steps: total number of optimizer steps.
    """
    run = config.run
    optimizer, scheduler = partial(make_optimizer, run), partial(make_scheduler, run, total_steps=steps)
    if memory.parallel in (*FSDP_MODES, "deepspeed"):
        distributed.init_single_rank(run.device)
    if memory.parallel == "deepspeed":
        hidden_size = model.language_model.config.hidden_size
        return DeepSpeedStrategy(model, optimizer, scheduler, resolve_deepspeed(run, hidden_size))
    if memory.parallel in FSDP_MODES:
        shards = run.local_world_size if memory.parallel == "hsdp" else run.world_size
        return FSDPStrategy(
            model, optimizer, scheduler, run.device, num_shards=shards, cpu_offload=run.cpu_offload
        )
    return Strategy(model, optimizer, scheduler, run.device, bucket_cap_mb=run.ddp_bucket_cap_mb)

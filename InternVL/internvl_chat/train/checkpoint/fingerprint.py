"""Fingerprint of a run: the settings and data that determine its remaining steps.

It is stored in every checkpoint, and `resume_changes` compares it when a run resumes.
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.train.config import RunConfig, TrainConfig
from internvl_chat.train.distributed.deepspeed import zero_stage
from internvl_chat.train.flags import DataArguments, ModelArguments
from internvl_chat.utils.files import file_sha256

FINGERPRINT = "run_fingerprint.json"

SET_SIZES = "records of each set"
EXCLUDED = "excluded records"
STEP_SIZE = "records of a step"
TOTAL_STEPS = "total steps"
SETS = "datasets"
ANNOTATION = "SHA-256 of the annotation file of "
REPEATS = "repeat_time per dataset"
AUGMENTED = "data_augment per dataset"
TILE_LIMITS = "max_dynamic_patch per dataset"
IMAGES = "image files per dataset"
BEST = "choice of the best checkpoint"
EVAL_TILE_LIMITS = "max_dynamic_patch per validation dataset"
EVAL_IMAGES = "image files per validation dataset"
DEEPSPEED_RANKS = "number of ranks (with DeepSpeed use as many as before)"

# Configuration fields that may change on resume, because they change the remaining steps at most by rounding.
NOT_COMPARED = {
    "model": (
        # Location of the initial model; a resumed run loads the checkpoint instead.
        "model_name_or_path", "base_model_path", "vision_path", "llm_path", "mlp_path",
        # Memory and speed.
        "grad_checkpoint", "attn", "use_liger",
        # No effect.
        "use_fast_tokenizer",
    ),
    "data": (
        # Location of the data, which may move; the content is compared.
        "meta_path", "eval_meta_path", "data_root", "image_root",
        # Handling of unusable records. Records excluded at the start stay excluded.
        "check", "on_bad_record", "max_bad_fraction",
    ),
    "run": (
        "output_dir", "allow_resume_changes",
        # Layout: the number of ranks and how they share the records of a step.
        "device", "rank", "world_size", "local_world_size", "records_per_pack", "records_per_rank", "packing",
        "max_packed_tokens", "parallel", "cpu_offload", "ddp_bucket_cap_mb", "ddp_timeout",
        # These affect only rounding.
        "tf32", "compile_blocks", "full_determinism",
        # Data loading, logging and checkpoints.
        "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory", "logging_strategy",
        "logging_steps", "logging_first_step", "disable_tqdm", "report_to", "run_name", "save_strategy",
        "save_steps", "save_total_limit", "save_only_model", "async_save", "resume_from_checkpoint",
        "overwrite_output_dir", "load_best_model_at_end", "do_eval", "eval_on_start", "eval_samples",
        # Checks.
        "sanity_check", "max_bad_steps", "hang_seconds",
    ),
}  # fmt: skip
# Configuration fields that `fingerprint` and `fingerprint_run` store in a different form.
_RESOLVED = (
    "flags", "num_train_epochs", "max_steps", "records_per_step", "weight_precision", "deepspeed",
    "max_dynamic_patch", "metric_for_best_model", "greater_is_better",
)  # fmt: skip
# Flags that affect the choice of the best checkpoint and early stopping; compared only with `tracks_best`.
VALIDATION_FLAGS = ("eval_strategy", "eval_steps", "eval_delay", "eval_generate", "early_stopping_patience")


class DataState(NamedTuple):
    """State of the datasets of a run; stored in the fingerprint to detect changes.

    Attributes:
        sizes: number of records per epoch, for each dataset.
        digests: SHA-256 of each annotation file.
        excluded: (dataset name, record index) of each excluded record.
        images: for each dataset, a digest of its image files; empty if unknown.
    """

    specs: Sequence[DatasetSpec]
    sizes: Sequence[int]
    digests: Sequence[str]
    excluded: Sequence[tuple[str, int]] = ()
    images: Sequence[str] = ()

    @classmethod
    def of(cls, data: TrainingData) -> "DataState":
        """Create the state from opened datasets."""
        excluded = [(record.dataset, int(record.index)) for record in data.excluded]
        specs = [records.spec for records in data.sets]
        return cls(specs, data.sizes, data.digests, excluded, data.image_digests)

    @classmethod
    def of_files(cls, specs: Sequence[DatasetSpec], excluded: Sequence[tuple[str, int]] = ()) -> "DataState":
        """Create the state from annotation files without checking the records.

        Args:
            excluded: (dataset name, record index) of each record excluded by the run to resume.
        """
        sizes = []
        for spec in specs:
            total = len(RecordFile(spec.annotation))
            used = spec.num_used(total)
            distinct = min(total, used)
            unusable = {index for name, index in excluded if name == spec.name and index < distinct}
            sizes.append((distinct - len(unusable)) * (used // distinct if distinct else 0))
        return cls(specs, sizes, [file_sha256(spec.annotation) for spec in specs], excluded)


def fingerprint(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that determine the remaining steps of a run, without those of the datasets.

    The number of ranks is included only with DeepSpeed; otherwise it may change on resume.
    """
    groups = ("model", ModelArguments), ("data", DataArguments), ("run", RunConfig)
    settings = {
        field.name: getattr(getattr(config, group), field.name)
        for group, kind in groups
        for field in fields(kind)
        if field.name not in (*NOT_COMPARED[group], *_RESOLVED)
    }
    run = config.run
    if not run.tracks_best:
        settings = {name: value for name, value in settings.items() if name not in VALIDATION_FLAGS}
    settings["max_dynamic_patch"] = config.data.max_dynamic_patch
    settings["weight precision"] = run.weight_precision
    settings[STEP_SIZE] = run.records_per_step
    settings["DeepSpeed"] = bool(run.deepspeed)
    if run.deepspeed:
        settings[DEEPSPEED_RANKS] = run.world_size
        settings["ZeRO stage"] = zero_stage(run.deepspeed)
        settings |= {f"DeepSpeed's {key}": run.deepspeed.get(key) for key in ("optimizer", "scheduler")}
    return settings


def fingerprint_run(config: TrainConfig, data: DataState, eval_data: DataState | None) -> dict[str, Any]:
    """Return the fingerprint of a run: its settings, the state of its datasets, and derived values."""
    names = [spec.name for spec in data.specs]
    epoch_steps = -(-sum(data.sizes) // config.run.records_per_step)
    settings = {
        **fingerprint(config),
        TOTAL_STEPS: config.run.count_steps(epoch_steps),
        SETS: names,
        SET_SIZES: list(data.sizes),
        EXCLUDED: [list(record) for record in data.excluded],
        **{f"{ANNOTATION}{name}": digest for name, digest in zip(names, data.digests, strict=True)},
        REPEATS: {spec.name: spec.repeat_time for spec in data.specs},
        AUGMENTED: {spec.name: spec.data_augment for spec in data.specs},
        TILE_LIMITS: _tile_limits(config, data.specs),
        BEST: None,
    }
    if data.images:
        settings[IMAGES] = dict(zip(names, data.images, strict=True))
    if config.run.tracks_best and eval_data is not None:
        settings[BEST] = {
            "metric": config.run.metric_for_best_model,
            "greater is better": config.run.greater_is_better,
            "datasets": [
                [spec.name, digest, spec.repeat_time]
                for spec, digest in zip(eval_data.specs, eval_data.digests, strict=True)
            ],
        }
        settings[EVAL_TILE_LIMITS] = _tile_limits(config, eval_data.specs)
        if eval_data.images:
            eval_names = [spec.name for spec in eval_data.specs]
            settings[EVAL_IMAGES] = dict(zip(eval_names, eval_data.images, strict=True))
    return settings


def _tile_limits(config: TrainConfig, specs: Sequence[DatasetSpec]) -> dict[str, int]:
    return {spec.name: spec.max_dynamic_patch or config.data.max_dynamic_patch for spec in specs}


def read_fingerprint(checkpoint: Path) -> dict[str, Any]:
    """Return the fingerprint stored in a checkpoint; empty if there is none.

    Earlier versions did not store the list of datasets; it is reconstructed from the annotation hashes.
    """
    file = checkpoint / FINGERPRINT
    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    names = [name.removeprefix(ANNOTATION) for name in stored if name.startswith(ANNOTATION)]
    return {SETS: names, **stored} if names else stored

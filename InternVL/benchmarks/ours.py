"""The preset `fast`: this project's trainer, with the recipe's flags and those that make it fast.

All that the benchmarks know of the trainer's inside is here.
"""

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablations import ABLATIONS
from benchmarks.flags import FAST_FLAGS, RECIPE_FLAGS, Flags, as_tokens
from benchmarks.jobs import Clock, Job, Steps
from benchmarks.recipes import LORA_DROPOUT
from benchmarks.shapes import random_model
from benchmarks.workload import Workload
from internvl_chat.data.encoding import RecordEncoder
from internvl_chat.data.meta import load_meta
from internvl_chat.data.tokenizer import image_context_id
from internvl_chat.model.attention import resolve_attention
from internvl_chat.model.flops import count_flops
from internvl_chat.train.arguments import Arguments, parse_arguments
from internvl_chat.train.checkpoint.run_folder import METRICS
from internvl_chat.train.freeze import set_trainable
from internvl_chat.train.preflight.dry_run import plan_memory
from internvl_chat.train.setup import choose_kernels, load_data, prepare_model
from internvl_chat.train.trainer import M3LLMTrainer


def arguments(job: Job, workload: Workload) -> Arguments:
    """Return the training command's arguments."""
    recipe, folder = job.settings, str(Path(job.folder) / "run")
    own: Flags = {
        "model_name_or_path": folder,
        "meta_path": workload.meta,
        "output_dir": folder,
        "gradient_accumulation_steps": recipe.step_records,
        "max_dynamic_patch": workload.max_dynamic_patch,
        "force_image_size": job.shape.sizes.image_size,
        "use_cpu": job.device == "cpu",
        "freeze_llm": recipe.lora_rank > 0,
        "freeze_mlp": recipe.lora_rank > 0,
        "use_llm_lora": recipe.lora_rank,
        "lora_dropout": LORA_DROPOUT,
    }
    changed = ABLATIONS[job.variant].flags if job.variant else {}
    return parse_arguments(as_tokens(RECIPE_FLAGS | own | FAST_FLAGS[job.device] | changed) + list(job.flags))


def make_trainer(job: Job, workload: Workload, device: torch.device) -> M3LLMTrainer:
    """Return the trainer of a job; its checkpoints hold no model."""
    args, tokenizer = arguments(job, workload), workload.load_tokenizer()
    attn = resolve_attention(args.model.attn, device)
    model = random_model(job.shape, image_context_id(tokenizer), attn=attn, device=device)
    if job.variant and ABLATIONS[job.variant].undo:
        ABLATIONS[job.variant].undo(model)
    specs = load_meta(workload.meta, data_root=Path.cwd())
    preprocessing = prepare_model(model, args, specs)
    frozen = {name: getattr(args.model, name) for name in ("freeze_llm", "freeze_mlp", "freeze_backbone")}
    set_trainable(model, **frozen)
    encoder = RecordEncoder(tokenizer, preprocessing).with_max_tiles(workload.max_dynamic_patch)
    data, sampler = load_data(args, specs, encoder, count_flops(model))
    rehearsal = plan_memory(args, model, sampler, data)
    model.recompute_layers(rehearsal.recomputed)
    choose_kernels(model, args)
    Path(args.run.output_dir).mkdir()
    return M3LLMTrainer(
        model,
        args.run,
        data=data,
        sampler=sampler,
        normalization=args.data.normalize_type,
        save_model_to=lambda folder, state: None,
        fingerprint={},
        weight_precision=rehearsal.precision,
        rehearsal=rehearsal,
    )


def read_metrics(job: Job) -> list[dict[str, Any]]:
    """Read what the trainer of a job has noted of its steps."""
    lines = (Path(job.folder) / "run" / METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def run(job: Job, workload: Workload, clock: Clock) -> Steps:
    """Train all steps of a job."""
    trainer = make_trainer(job, workload, clock.device)
    trainer.add_callback(clock)
    trainer.train()
    rows = read_metrics(job)
    return Steps([row["tokens"] for row in rows], [row["loss"] for row in rows])

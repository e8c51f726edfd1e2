"""The `fast` preset: the training loop of this project.

This is the only benchmark module that depends on internals of the training loop.
"""

import atexit
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.jobs import Clock, Job, Steps
from benchmarks.presets.ablations import ABLATIONS
from benchmarks.presets.recipes import LORA_DROPOUT, RECIPE_FLAGS, Flags, as_tokens, fast_flags
from benchmarks.shapes import random_model
from benchmarks.workload import Workload
from internvl_chat.data.batching.collator import Pack
from internvl_chat.data.batching.dataloader import kill_workers
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.tokenizer import image_context_id
from internvl_chat.data.sources.meta import load_meta
from internvl_chat.model.attention import resolve_attention
from internvl_chat.model.flops import count_flops
from internvl_chat.model.kernels.apply import apply_kernels
from internvl_chat.train.arguments import parse_arguments
from internvl_chat.train.checkpoint.run_folder import METRICS
from internvl_chat.train.checkpoint.saver import Checkpointer
from internvl_chat.train.checkpoint.state import TrainState
from internvl_chat.train.config import TrainConfig
from internvl_chat.train.freeze import set_trainable
from internvl_chat.train.loop import TrainingLoop
from internvl_chat.train.monitor.step_metrics import StepRecord
from internvl_chat.train.monitor.trackers import Trackers
from internvl_chat.train.preflight.dry_run import run_dry_run
from internvl_chat.train.preflight.memory import plan_memory
from internvl_chat.train.setup import build_sampler, build_strategy, load_records, prepare_model

# File in the run folder that contains the memory plan.
PLAN = "memory_plan.json"


def configuration(job: Job, workload: Workload) -> TrainConfig:
    """Return the training configuration of a job."""
    recipe, folder = job.settings, str(Path(job.folder) / "run")
    job_flags: Flags = {
        "model_name_or_path": folder,
        "meta_path": workload.meta,
        "output_dir": folder,
        "gradient_accumulation_steps": recipe.step_records,
        "max_dynamic_patch": workload.max_dynamic_patch,
        "force_image_size": job.shape.sizes.image_size,
        "use_cpu": job.device == "cpu",
        "bf16": job.bf16,
        "freeze_llm": recipe.lora_rank > 0,
        "freeze_mlp": recipe.lora_rank > 0,
        "use_llm_lora": recipe.lora_rank,
        "lora_dropout": LORA_DROPOUT,
    }
    ablation = ABLATIONS[job.variant].flags if job.variant else {}
    flags = RECIPE_FLAGS | job_flags | fast_flags(job.device, job.bf16) | ablation
    return parse_arguments(as_tokens(flags) + list(job.flags))


def make_loop(
    job: Job, workload: Workload, write_model: Callable[..., dict] = lambda model, folder, weights: {}
) -> TrainingLoop:
    """Return the training loop of a job, for a model with random weights.

    Args:
        job: job to set up.
        workload: records and tokenizer.
        write_model: function that writes a checkpoint's weights, given model, folder and weights.
    """
    atexit.register(kill_workers)  # otherwise the process waits for the workers
    config, tokenizer = configuration(job, workload), workload.load_tokenizer()
    run = config.run
    attn = resolve_attention(config.model.attn, run.device)
    model = random_model(
        job.shape, image_context_id(tokenizer), attn=attn, device=run.device, dtype=job.torch_dtype
    )
    if job.variant and ABLATIONS[job.variant].patch:
        ABLATIONS[job.variant].patch(model)
    specs = load_meta(workload.meta, data_root=Path.cwd())
    preprocessing = prepare_model(model, config, specs)
    frozen = {name: getattr(config.model, name) for name in ("freeze_llm", "freeze_mlp", "freeze_backbone")}
    set_trainable(model, **frozen)
    apply_kernels(
        model,
        run.device,
        liger=config.model.use_liger,
        persistent_buffers=run.device.type == "cpu" and run.world_size == 1,
    )
    encoder = RecordEncoder(tokenizer, preprocessing.with_tile_limit(workload.max_dynamic_patch))
    data, flops = load_records(config, specs, encoder), count_flops(model)
    sampler = build_sampler(config, data, flops)
    memory = plan_memory(config, model, sampler, data)
    model.checkpoint_layers(memory.checkpointed_layers)
    if run.compile_blocks:
        model.compile_blocks()
    strategy = build_strategy(config, memory, model, run.count_steps(len(sampler)))
    folder = Path(run.output_dir)
    folder.mkdir(exist_ok=True)  # another rank may have created it
    plan = {
        name: getattr(memory, name) for name in ("parallel", "checkpointed_layers", "components", "total")
    }
    if run.is_main:
        (folder / PLAN).write_text(json.dumps(plan), encoding="utf-8")
    checkpointer = Checkpointer(
        folder,
        strategy,
        partial(write_model, model),
        fingerprint={},
        device=run.device,
        keep=run.save_total_limit,
        model_only=run.save_only_model,
        background=run.async_save,
    )
    loop = TrainingLoop(
        run, strategy, data, sampler, preprocessing.normalize_type, flops, checkpointer,
        trackers=Trackers.start((), run_name=None, folder=run.output_dir, config={}), state=TrainState(),
    )  # fmt: skip
    run_dry_run(loop, memory, config.model.grad_checkpoint)
    return loop


def read_metrics(job: Job) -> list[dict[str, Any]]:
    """Return the metrics of a job, one row per step."""
    lines = (Path(job.folder) / "run" / METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def run(job: Job, workload: Workload, clock: Clock) -> Steps:
    """Run all training steps of a job; return their token counts and losses."""
    loop = make_loop(job, workload)
    train_step = loop.train_step

    def timed_step(step: int, packs: Sequence[Pack]) -> StepRecord:
        if not clock.stamps:
            clock.tick()
        record = train_step(step, packs)
        clock.tick()
        return record

    loop.train_step = timed_step
    loop.train()
    rows = read_metrics(job)
    return Steps([row["tokens"] for row in rows], [row["loss"] for row in rows])

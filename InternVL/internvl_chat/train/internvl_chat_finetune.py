"""Training script, run by the launchers.

`train` shows the stages: check the flags, load data and model, plan memory, parallelize, train, save.
"""

import atexit
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate.utils import set_seed
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from internvl_chat.data.audit.overlap import warn_about_overlap
from internvl_chat.data.batching.dataloader import WORKER_DIED, kill_workers
from internvl_chat.data.batching.sampler import StepSampler
from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.model.flops import count_flops
from internvl_chat.model.kernels.apply import apply_kernels
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.arguments import dump_config, parse_arguments
from internvl_chat.train.checkpoint.best import copy_best
from internvl_chat.train.checkpoint.fingerprint import (
    EXCLUDED,
    DataState,
    fingerprint_run,
    read_fingerprint,
)
from internvl_chat.train.checkpoint.model_files import checkpoint_writer
from internvl_chat.train.checkpoint.resume_changes import check_images
from internvl_chat.train.checkpoint.run_folder import (
    CONFIG,
    FINISHED,
    METRICS,
    PLOT,
    REPORT,
    SESSIONS,
    VALIDATION,
)
from internvl_chat.train.checkpoint.saver import Checkpointer, load_training_state
from internvl_chat.train.checkpoint.state import TrainState
from internvl_chat.train.checks import RunPlan, check_configuration, sharded_generation_problem
from internvl_chat.train.config import RunConfig, TrainConfig, set_float32_precision
from internvl_chat.train.distributed.signals import exit_code, report_exit, stop_with_launcher
from internvl_chat.train.flag_help import build_help_parser
from internvl_chat.train.flags import FSDP_MODES
from internvl_chat.train.freeze import format_table, set_trainable
from internvl_chat.train.loop import TrainingLoop
from internvl_chat.train.model_card import count_parameters, describe_run, read_validation, write_model_card
from internvl_chat.train.monitor.plots import plot_loss
from internvl_chat.train.monitor.session import session_row
from internvl_chat.train.monitor.trackers import Trackers
from internvl_chat.train.preflight.dry_run import run_dry_run
from internvl_chat.train.preflight.memory import MemoryPlan, plan_memory
from internvl_chat.train.preflight.sanity import run_sanity_checks
from internvl_chat.train.setup import (
    build_sampler,
    build_strategy,
    build_validation,
    load_encoder,
    load_for_training,
    load_records,
)
from internvl_chat.train.validation import validation_specs
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import DataError, M3LLMError, StorageError, TrainingError, UsageError
from internvl_chat.utils.files import JsonLinesFile, write_json
from internvl_chat.utils.logging import configure_logging, get_logger
from internvl_chat.utils.text import counted

# `__name__` is `__main__` when the launchers run this script.
logger = get_logger("internvl_chat.train.internvl_chat_finetune")


def train(config: TrainConfig) -> int:
    """Run training from a resolved configuration to the saved model; return the exit code."""
    run = config.run
    distributed.init_process_group(run.device, timedelta(seconds=run.ddp_timeout))
    set_float32_precision(run)
    plan = check_configuration(config)
    resume = plan.output.resume

    data, eval_data = _load_data(plan)
    model, tokenizer, preprocessing = _load_model(plan)
    flops = count_flops(model)
    sampler = build_sampler(config, data, flops)

    memory = _apply_memory_plan(config, model, sampler, data)
    strategy = build_strategy(config, memory, model, run.count_steps(len(sampler)))
    validation = None
    if eval_data is not None:
        validation = build_validation(config, eval_data, flops, sharded=strategy.shards_weights)
    state = load_training_state(resume, strategy) if resume else TrainState()
    lock = _open_output(plan) if run.is_main else None
    eval_state = None if eval_data is None else DataState.of(eval_data)
    checkpointer = Checkpointer(
        plan.output.path,
        strategy,
        checkpoint_writer(plan, model, tokenizer, preprocessing),
        fingerprint=fingerprint_run(config, DataState.of(data), eval_state),
        device=run.device,
        keep=run.save_total_limit,
        model_only=run.save_only_model,
        background=run.async_save,
    )
    trackers = Trackers.start(
        run.report_to, run_name=run.run_name, folder=run.output_dir, config=config.to_dict()
    )
    normalization = preprocessing.normalize_type
    loop = TrainingLoop(
        run, strategy, data, sampler, normalization, flops, checkpointer, trackers, state, validation
    )
    if run.sanity_check:
        run_sanity_checks(plan.source, model, data, tokenizer, preprocessing)
    run_dry_run(loop, memory, config.model.grad_checkpoint)
    if run.is_main:
        _log_session(config, loop, eval_data)
    logger.info("output: %s, %d of %d steps done", plan.output.path, state.step, loop.total_steps)
    # Before this point, a signal ends the process immediately, because there is nothing to save.
    with loop.stop:
        stopped_by = loop.train()
        if stopped_by is None:
            _finish(plan, loop, eval_data)
    code = _report_end(loop, stopped_by)
    trackers.finish()
    if lock is not None:
        lock.release()
    distributed.destroy_process_group()
    return code


def _load_data(plan: RunPlan) -> tuple[TrainingData, TrainingData | None]:
    """Load and check the training and validation records; on resume, check that the images are unchanged."""
    encoder, resume = load_encoder(plan), plan.output.resume
    excluded = read_fingerprint(resume).get(EXCLUDED) if resume else None
    data = load_records(plan.config, plan.specs, encoder, resumed_exclusions=excluded)
    eval_specs = validation_specs(plan.eval_specs)
    eval_data = load_records(plan.config, eval_specs, encoder) if eval_specs else None
    if resume:
        compared = [data] if eval_data is None or not plan.config.run.tracks_best else [data, eval_data]
        images = [
            {
                records.spec.name: digest
                for records, digest in zip(opened.sets, opened.image_digests, strict=True)
            }
            for opened in compared
        ]
        changes = check_images(resume, *images, allow_changes=plan.config.run.allow_resume_changes)
        for line in changes if plan.config.run.is_main else ():
            logger.warning("%s", line)
    if eval_data is not None and plan.config.run.is_main:
        warn_about_overlap(data, eval_data)
    return data, eval_data


def _open_output(plan: RunPlan) -> FileLock:
    """Open the output folder, write `config.yaml`, and return the folder's lock."""
    lock = plan.output.open()
    (plan.output.path / CONFIG).write_text(dump_config(plan.config), encoding="utf-8")
    return lock


def _log_session(config: TrainConfig, loop: TrainingLoop, eval_data: TrainingData | None) -> None:
    """Append the start of this session to `sessions.jsonl`."""
    row = session_row(
        config.run,
        step=loop.state.step,
        total_steps=loop.total_steps,
        description=describe_run(config),
        layout=loop.strategy.name,
        parameters=count_parameters(loop.strategy.model),
        data=loop.data,
        eval_data=eval_data,
    )
    JsonLinesFile(Path(config.run.output_dir) / SESSIONS).append(row)


def _load_model(plan: RunPlan) -> tuple[InternVLChatModel, PreTrainedTokenizerBase, Preprocessing]:
    """Load the model, set its trainable parameters, and apply the optimized kernels."""
    run, options = plan.config.run, plan.config.model
    set_seed(run.seed)
    if run.full_determinism:
        torch.use_deterministic_algorithms(True)
    model, tokenizer, preprocessing = load_for_training(plan)
    rows = set_trainable(
        model,
        freeze_llm=options.freeze_llm,
        freeze_mlp=options.freeze_mlp,
        freeze_backbone=options.freeze_backbone,
        unfreeze_vit_layers=options.unfreeze_vit_layers,
        unfreeze_lm_head=options.unfreeze_lm_head,
    )
    logger.info("model: %s, attention: %s\n%s", plan.source, plan.attn, format_table(rows))
    if not rows[-1].trainable:
        raise UsageError("these flags leave no trainable parameters; see the table above")
    persistent_buffers = run.device.type == "cpu" and run.world_size == 1 and not run.cpu_offload
    apply_kernels(model, run.device, liger=options.use_liger, persistent_buffers=persistent_buffers)
    return model, tokenizer, preprocessing


def _apply_memory_plan(
    config: TrainConfig, model: InternVLChatModel, sampler: StepSampler, data: TrainingData
) -> MemoryPlan:
    """Plan the memory; enable activation checkpointing as planned, and compilation with `--torch_compile`."""
    memory = plan_memory(config, model, sampler, data)
    if memory.parallel in FSDP_MODES and config.run.eval_generate:
        raise UsageError(sharded_generation_problem(config.run, "FSDP (chosen by --parallel auto)"))
    model.checkpoint_layers(memory.checkpointed_layers)
    if config.run.compile_blocks:
        model.compile_blocks()
    return memory


def _how_to_resume(run: RunConfig) -> str:
    if run.save_only_model:
        return "to continue without optimizer state, add --allow_resume_changes True to the command"
    return "run the same command again to resume"


def _finish(plan: RunPlan, loop: TrainingLoop, eval_data: TrainingData | None) -> None:
    """Save the final or best model, the loss plot, the model card and the results.

    Raises:
        TrainingError: all steps were skipped, or the model cannot be saved.
    """
    output, run, state = plan.output.path, plan.config.run, loop.state
    if state.skipped_steps == state.step:
        steps = "the only step was skipped" if state.step == 1 else f"all {state.step} steps were skipped"
        raise TrainingError(
            f"{output}: {steps}, so the model has not changed and is not saved; "
            f"see skipped_because in {METRICS} for the reasons"
        )
    step = None
    try:
        if not run.load_best_model_at_end:
            loop.checkpointer.save_model(output)
        elif run.is_main:
            step = copy_best(state, output, plan.output.resume)
        if run.is_main:
            title = describe_run(plan.config)
            plot_loss(output / METRICS, output / PLOT, output / VALIDATION, subtitle=title)
            validation = read_validation(output / VALIDATION, step)
            parameters = count_parameters(loop.strategy.model)
            write_model_card(plan.config, loop.data, eval_data, parameters, validation)
            write_json(output / FINISHED, dataclasses.asdict(state))
            write_run_report(output)
    except OSError as error:
        raise TrainingError(
            f"{output}: the model cannot be saved: {error}; free disk space and run the same command again "
            "to resume from the newest checkpoint"
        ) from None
    if run.is_main:
        skipped = (
            f" ({state.skipped_steps} of {counted(state.step, 'step')} skipped)"
            if state.skipped_steps
            else ""
        )
        logger.info("finished: the model is in %s%s", output, skipped)


def write_run_report(output: Path) -> None:
    """Write the HTML report of a finished run; a failure is only logged."""
    if find_spec("plotly") is None:
        logger.info("no %s: it requires plotly (pip install 'm3llm[ui]')", REPORT)
        return
    try:
        from internvl_chat.train.report.page import write_report

        write_report([output], output / REPORT)
    except Exception as error:
        logger.warning("%s: not written (%s: %s)", output / REPORT, type(error).__name__, error)


def _report_end(loop: TrainingLoop, stopped_by: signal.Signals | None) -> int:
    """Log how training ended, including a failure of the last save; return the exit code."""
    failure, step = loop.checkpointer.failure, loop.state.step
    if failure is not None:
        end, remedy = "training finished and the model is saved", ""
        if stopped_by is not None:
            end = f"training was stopped by {stopped_by.name} after step {step}"
            remedy = "; free disk space and run the same command again to resume"
        if loop.run.is_main:
            logger.error("%s, but the last checkpoint is missing: %s%s", end, failure, remedy)
        return TrainingError.exit_code
    if stopped_by is None:
        return 0
    logger.info("stopped by %s after step %d; %s", stopped_by.name, step, _how_to_resume(loop.run))
    return exit_code(stopped_by)


def _explain(error: RuntimeError) -> str | None:
    """Return a clear message if an error means that another process has died or hangs; otherwise None."""
    text = str(error)
    if "DataLoader worker" in text:
        return f"{WORKER_DIED} ({text})"
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
    if isinstance(error, torch.distributed.DistError) or any(sign in text for sign in signs):
        return "another rank has failed; see the error message of that rank or of the launcher"
    if "Timed out waiting" in text:
        return f"another rank did not respond within --ddp_timeout; it hangs or is very slow ({text})"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Train with command-line flags and return the exit code."""
    configure_logging()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # dataloader workers run in parallel
    tokens = list(sys.argv[1:] if argv is None else argv)
    if "--help" in tokens or "-h" in tokens:
        build_help_parser().print_help()
        return 0
    stop_with_launcher()
    # Exit handlers run in reverse order, so this one runs before Python waits for the workers.
    atexit.register(kill_workers)
    try:
        return report_exit(train(parse_arguments(tokens)))
    except M3LLMError as error:
        # Problems with the flags or the model are the same on all ranks; others may occur on one rank only.
        if distributed.local_rank() == 0 or isinstance(error, DataError | StorageError | TrainingError):
            logger.error("%s", error)
        return error.exit_code
    except RuntimeError as error:
        explanation = _explain(error)
        if explanation is None:
            raise
        logger.error("%s", explanation)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted before the first step; no checkpoint was saved")
        return exit_code(signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())

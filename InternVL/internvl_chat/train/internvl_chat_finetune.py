"""Fine-tune InternVL3: the training script that the launchers start.

`train` reads from top to bottom: check, data, load, freeze, plan memory, parallelize, train, save.
"""

import atexit
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
import yaml
from transformers import set_seed

from internvl_chat.data.batching.dataloader import WORKER_DIED, kill_workers
from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.model.flops import count_flops
from internvl_chat.model.kernels.apply import apply_kernels
from internvl_chat.train.arguments import build_parser, parse_arguments
from internvl_chat.train.checkpoint.best import copy_best
from internvl_chat.train.checkpoint.fingerprint import (
    EXCLUDED,
    check_same_run,
    describe_data,
    fingerprint,
    read_fingerprint,
)
from internvl_chat.train.checkpoint.model_files import checkpoint_writer
from internvl_chat.train.checkpoint.run_folder import (
    CONFIG,
    FINISHED,
    METRICS,
    PLOT,
    VALIDATION,
)
from internvl_chat.train.checkpoint.saver import Checkpointer, load_training_state
from internvl_chat.train.checkpoint.state import TrainState
from internvl_chat.train.checks import RunPlan, check_configuration, sharded_generation_problem
from internvl_chat.train.config import TrainConfig, set_float32_precision
from internvl_chat.train.distributed.signals import exit_code, report_stop, stop_with_launcher
from internvl_chat.train.freeze import format_table, set_trainable
from internvl_chat.train.loop import TrainingLoop
from internvl_chat.train.model_card import count_parameters, read_validation, write_model_card
from internvl_chat.train.monitor.plots import plot_loss
from internvl_chat.train.monitor.trackers import Trackers
from internvl_chat.train.preflight.memory import plan_memory
from internvl_chat.train.preflight.sanity import run_sanity_checks
from internvl_chat.train.setup import (
    build_strategy,
    load_encoder,
    load_for_training,
    load_records,
    order_records,
    plan_validation,
)
from internvl_chat.train.validation import validation_specs
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import DataError, M3LLMError, TrainingError, UsageError
from internvl_chat.utils.logging import configure_logging, get_logger

# Not __name__, which is `__main__` where this is run as a script.
logger = get_logger("internvl_chat.train.internvl_chat_finetune")


def train(config: TrainConfig) -> signal.Signals | None:
    """Run a training from a resolved configuration to the saved model.

    Returns:
        The signal that stopped it before its end, if one did.
    """
    run = config.run
    distributed.init_process_group(run.device, timedelta(seconds=run.ddp_timeout))
    set_float32_precision(run)
    plan = check_configuration(config)
    resume = plan.output.resume

    # Data
    encoder = load_encoder(plan)
    excluded = read_fingerprint(resume).get(EXCLUDED) if resume else None
    data = load_records(config, plan.specs, encoder, resumed_exclusions=excluded)
    eval_data = load_records(config, validation_specs(plan.eval_specs), encoder) if plan.eval_specs else None
    if resume:
        check_same_run(resume, describe_data(data))
    lock = None
    if run.is_main:
        lock = plan.output.open()
        (plan.output.path / CONFIG).write_text(
            yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8"
        )

    # Model
    set_seed(run.seed)
    if run.full_determinism:
        torch.use_deterministic_algorithms(True)
    model, tokenizer, preprocessing = load_for_training(plan)
    rows = set_trainable(
        model,
        freeze_llm=config.model.freeze_llm,
        freeze_mlp=config.model.freeze_mlp,
        freeze_backbone=config.model.freeze_backbone,
        unfreeze_vit_layers=config.model.unfreeze_vit_layers,
        unfreeze_lm_head=config.model.unfreeze_lm_head,
    )
    logger.info("model: %s, attention: %s\n%s", plan.source, plan.attn, format_table(rows))
    if not rows[-1].trainable:
        raise UsageError("with these flags nothing is trained; see the table above")
    apply_kernels(
        model,
        run.device,
        liger=config.model.use_liger,
        persistent_buffers=run.device.type == "cpu" and run.world_size == 1,
    )

    # Steps, memory and parallelism
    flops = count_flops(model)
    sampler = order_records(config, data, flops)
    steps = run.count_steps(len(sampler))
    memory = plan_memory(config, model, sampler, data)
    if memory.parallel == "fsdp" and run.eval_generate:
        raise UsageError(sharded_generation_problem(run, "FSDP (chosen by --parallel auto)"))
    model.checkpoint_layers(memory.checkpointed_layers)
    if run.compile_blocks:
        model.compile_blocks()
    strategy = build_strategy(config, memory, model, steps)
    state = load_training_state(resume, strategy) if resume else TrainState()

    # Training
    write_model = checkpoint_writer(plan, model, tokenizer, preprocessing)
    checkpointer = Checkpointer(
        plan.output.path,
        strategy,
        write_model,
        fingerprint=fingerprint(config) | describe_data(data),
        device=run.device,
        keep=run.save_total_limit,
        model_only=run.save_only_model,
        background=run.async_save,
    )
    loop = TrainingLoop(
        run,
        strategy,
        data,
        sampler,
        preprocessing.normalize_type,
        flops,
        checkpointer,
        trackers=_start_trackers(config),
        state=state,
        validation=None if eval_data is None else plan_validation(config, eval_data, flops),
    )
    if run.sanity_check:
        run_sanity_checks(plan.source, model, data, tokenizer, preprocessing)
    loop.dry_run(memory, config.model.grad_checkpoint)
    logger.info("output: %s, %d of %d steps are done", plan.output.path, state.step, steps)
    # Until now there was nothing to save, and a signal ended the process.
    with loop.stop:
        stopped_by = loop.train()
        if stopped_by is None:
            _finish(plan, loop, eval_data, preprocessing)
        else:
            logger.info(
                "stopped by %s after step %d; the same command again resumes from there",
                stopped_by.name, loop.state.step,
            )  # fmt: skip
    loop.trackers.finish()
    if lock is not None:
        lock.release()
    distributed.destroy_process_group()
    return stopped_by


def _start_trackers(config: TrainConfig) -> Trackers:
    run = config.run
    return Trackers.start(
        run.report_to if run.is_main else (),
        run_name=run.run_name,
        folder=run.output_dir,
        config=config.to_dict(),
    )


def _finish(
    plan: RunPlan, loop: TrainingLoop, eval_data: TrainingData | None, preprocessing: Preprocessing
) -> None:
    """Write the finished model, the newest or the best, and what describes the run."""
    output, run = plan.output.path, plan.config.run
    step = None
    try:
        if not run.load_best_model_at_end:
            loop.checkpointer.save_model(output)
        elif run.is_main:
            step = copy_best(loop.state, output, plan.output.resume)
    except OSError as error:
        raise TrainingError(
            f"{output}: the finished model cannot be written: {error}; when there is room, the same command "
            "again repeats the steps since the newest checkpoint and writes it"
        ) from None
    parameters = count_parameters(loop.strategy.model)
    if run.is_main:
        plot_loss(output / METRICS, output / PLOT, output / VALIDATION)
        validation = read_validation(output / VALIDATION, step)
        write_model_card(plan.config, loop.data, eval_data, parameters, validation)
        results = dataclasses.asdict(loop.state)
        (output / FINISHED).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        logger.info("finished: the model is in %s", output)


def _explain(error: RuntimeError) -> str | None:
    """Return the meaning of an error that torch raises, wherever it is, when a process has died."""
    text = str(error)
    if "DataLoader worker" in text:
        return f"{WORKER_DIED} ({text})"
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
    if isinstance(error, torch.distributed.DistError) or any(sign in text for sign in signs):
        return "another rank of this run has ended; its own message, or the launcher's, says why"
    if "Timed out waiting" in text:
        return f"another rank has not answered within --ddp_timeout: it hangs, or is very slow ({text})"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    configure_logging()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the dataloader workers run in parallel instead
    tokens = list(sys.argv[1:] if argv is None else argv)
    if "--help" in tokens or "-h" in tokens:
        build_parser().print_help()
        return 0
    stop_with_launcher()
    # Python runs the last registered function first, so this comes before it waits for the workers.
    atexit.register(kill_workers)
    try:
        stopped_by = train(parse_arguments(tokens))
    except M3LLMError as error:
        # The ranks of a machine find the same faults of flags and model; a bad record is met by one of them.
        if distributed.local_rank() == 0 or isinstance(error, DataError | TrainingError):
            logger.error("%s", error)
        return error.exit_code
    except RuntimeError as error:
        explanation = _explain(error)
        if explanation is None:
            raise
        logger.error("%s", explanation)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted before the first step; there is nothing to save")
        return exit_code(signal.SIGINT)
    return report_stop(stopped_by) if stopped_by else 0


if __name__ == "__main__":
    sys.exit(main())

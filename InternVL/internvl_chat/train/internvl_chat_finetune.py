"""Fine-tune InternVL3: the training script that the launchers start.

Read from top to bottom: parse, check, load, freeze, data, train, save.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, set_seed

from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.preprocessing import Preprocessing
from internvl_chat.model.flops import count_flops
from internvl_chat.model.modeling import InternVLChatModel
from internvl_chat.train.arguments import Arguments, build_parser, parse_arguments
from internvl_chat.train.checkpoint.best import copy_best
from internvl_chat.train.checkpoint.fingerprint import (
    LEFT_OUT,
    WEIGHT_PRECISION,
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
    checkpoint_step,
    unlock_folder,
)
from internvl_chat.train.checks import Plan, check_configuration
from internvl_chat.train.dataloader import LOADER_ENDED
from internvl_chat.train.distributed.fsdp import shard
from internvl_chat.train.distributed.signals import StopRequest, exit_code, report_stop, stop_with_launcher
from internvl_chat.train.freeze import format_table, set_trainable
from internvl_chat.train.model_card import count_parameters, read_validation, write_model_card
from internvl_chat.train.monitor.plots import plot_loss
from internvl_chat.train.preflight.dry_run import plan_memory
from internvl_chat.train.preflight.sanity import (
    check_packing,
    check_preprocessing,
    first_samples,
    show_supervision,
)
from internvl_chat.train.setup import (
    choose_kernels,
    load_encoder,
    load_for_training,
    load_records,
    order_records,
    plan_validation,
)
from internvl_chat.train.trainer import M3LLMTrainer
from internvl_chat.train.validation import held_out
from internvl_chat.utils.distributed import of_all_processes
from internvl_chat.utils.errors import DataError, M3LLMError, TrainingError, UsageError
from internvl_chat.utils.logging import configure_logging, get_logger

# Not __name__, which is `__main__` where this is run as a script.
logger = get_logger("internvl_chat.train.internvl_chat_finetune")


def train(args: Arguments) -> signal.Signals | None:
    """Run a training from checked arguments to the saved model.

    Returns:
        The signal that stopped it before its end, if one did.
    """
    plan = check_configuration(args)
    settled = read_fingerprint(plan.output.resume) if plan.output.resume else {}
    encoder = load_encoder(plan)
    data = load_records(args, plan.specs, encoder, began_without=settled.get(LEFT_OUT))
    held = load_records(args, held_out(plan.held_out), encoder) if plan.held_out else None
    if plan.output.resume:
        check_same_run(plan.output.resume, describe_data(data))
    lock = None
    if args.run.process_index == 0:
        lock = plan.output.open()
        (plan.output.path / CONFIG).write_text(
            yaml.safe_dump(args.to_dict(), sort_keys=False), encoding="utf-8"
        )
    set_seed(args.run.seed)
    model, tokenizer, preprocessing = load_for_training(plan)
    trainer = _build_trainer(plan, model, tokenizer, preprocessing, data, held)
    if args.run.self_test:
        _self_test(plan, trainer, tokenizer, preprocessing)
    # Until now there was nothing to save, and a signal ended the process.
    with trainer.stop_request:
        stopped_by = _run(plan, trainer)
    if lock is not None:
        unlock_folder(lock)
    _end_together()
    return stopped_by


def _build_trainer(
    plan: Plan,
    model: InternVLChatModel,
    tokenizer: PreTrainedTokenizerBase,
    preprocessing: Preprocessing,
    data: TrainingData,
    held: TrainingData | None,
) -> M3LLMTrainer:
    """Choose what is trained, in which order, and in how much memory.

    Raises:
        UsageError: nothing is trained, or a checkpoint is of another run.
    """
    args, resume = plan.args, plan.output.resume
    rows = set_trainable(
        model,
        freeze_llm=args.model.freeze_llm,
        freeze_mlp=args.model.freeze_mlp,
        freeze_backbone=args.model.freeze_backbone,
        unfreeze_vit_layers=args.model.unfreeze_vit_layers,
        unfreeze_lm_head=args.model.unfreeze_lm_head,
    )
    logger.info("attention: %s\n%s", plan.attn, format_table(rows))
    if not rows[-1].trainable:
        raise UsageError("with these flags nothing is trained; see the table above")
    if resume and args.run.weight_precision == "auto":
        # What fitted then was chosen for all of the run.
        args.run.weight_precision = read_fingerprint(resume).get(WEIGHT_PRECISION, "auto")
    flops = count_flops(model)
    sampler = order_records(args, data, flops)
    rehearsal = plan_memory(args, model, sampler, data)
    settled = {WEIGHT_PRECISION: rehearsal.precision}
    if resume:
        check_same_run(resume, settled)
    model.recompute_layers(rehearsal.recomputed)
    choose_kernels(model, args)
    if args.run.sharded:
        shard(model, args.run.device)
    left_out = [[out.dataset, out.index] for out in data.left_out]
    return M3LLMTrainer(
        model,
        args.run,
        data=data,
        sampler=sampler,
        normalization=preprocessing.normalize_type,
        save_model_to=checkpoint_writer(plan, model, tokenizer, preprocessing),
        fingerprint=fingerprint(args) | describe_data(data) | settled | {LEFT_OUT: left_out},
        weight_precision=rehearsal.precision,
        rehearsal=rehearsal,
        validation=None if held is None else plan_validation(args, held, flops),
    )


def _run(plan: Plan, trainer: M3LLMTrainer) -> signal.Signals | None:
    """Train and save; returns the signal that ended it before that, if one did."""
    output, resume = plan.output.path, plan.output.resume
    if resume and checkpoint_step(resume) >= trainer.total_steps:
        logger.info("%s is the end of the run already; only the model is written", resume)
        results = {}
    else:
        results = trainer.train(resume_from_checkpoint=str(resume) if resume else None).metrics
    if trainer.stops and not trainer.has_ended:
        stopped_by = _stopped_by(trainer.stop_request)
        logger.info(
            "stopped by %s after step %d; the same command again goes on from there",
            stopped_by.name, trainer.state.global_step,
        )  # fmt: skip
        return stopped_by
    step = _save_result(plan, trainer)
    if plan.args.run.process_index == 0:
        plot_loss(output / METRICS, output / PLOT, output / VALIDATION)
        validation = read_validation(output / VALIDATION, step)
        held = None if trainer.validation is None else trainer.validation.data
        parameters = count_parameters(trainer.model)
        write_model_card(plan.args, trainer.data, held, parameters, validation)
        (output / FINISHED).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        logger.info("finished: the model is in %s", output)
    return None


def _self_test(
    plan: Plan, trainer: M3LLMTrainer, tokenizer: PreTrainedTokenizerBase, preprocessing: Preprocessing
) -> None:
    """Look at what is about to happen; see `self_test`."""
    check_preprocessing(plan.source, preprocessing)
    show_supervision(trainer.data, tokenizer)
    if plan.args.run.deepspeed:
        logger.info("packed and single records are not compared: DeepSpeed is not set up yet")
        return
    samples = first_samples(trainer.data, 0, 2)
    if samples:
        check_packing(trainer.model, samples, preprocessing.normalize_type)


def _save_result(plan: Plan, trainer: M3LLMTrainer) -> int | None:
    """Write the finished model: the newest, or the best if that is asked for.

    Returns:
        The step of the best model, where it was written by this process.

    Raises:
        TrainingError: that is impossible, as on a full disk.
    """
    output, resume = plan.output.path, plan.output.resume
    try:
        if plan.args.run.ends_with_best:
            if plan.args.run.process_index == 0:
                return copy_best(trainer.state, output, resume)
        else:
            trainer.save_model()
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{trainer.args.output_dir}: the finished model cannot be written: {error}; when there is room, "
            "the same command again does the steps since the newest checkpoint and writes it"
        ) from None
    return None


def _stopped_by(stop_request: StopRequest) -> signal.Signals:
    """Return the signal that one of the processes was sent, or the first one's where several were."""
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    sent = of_all_processes(stop_request.signal, processes)
    return next(one for one in sent if one is not None)


def _explain(error: RuntimeError) -> str | None:
    """Return what an error means that torch raises, wherever the program is, when a process has ended."""
    text = str(error)
    if "DataLoader worker" in text:
        return f"{LOADER_ENDED} ({text})"
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
    if isinstance(error, torch.distributed.DistError) or any(sign in text for sign in signs):
        return "another process of this run has ended; its own message, or the launcher's, tells why"
    return None


def _end_together() -> None:
    """Wait for the others: a process that leaves while others still talk to it may take them down."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    configure_logging()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader processes are what is parallel
    tokens = list(sys.argv[1:] if argv is None else argv)
    if "--help" in tokens or "-h" in tokens:
        build_parser().print_help()
        return 0
    stop_with_launcher()
    try:
        args = parse_arguments(tokens)
        args.run.output_dir = str(Path(args.run.output_dir).expanduser().absolute())
        stopped_by = train(args)
    except M3LLMError as error:
        # The processes of a machine find the same faults of flags and model; a record is met by one of them.
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, DataError | TrainingError):
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

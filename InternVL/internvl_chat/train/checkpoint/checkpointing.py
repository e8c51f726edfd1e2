"""Saving and resuming: transformers' Trainer with checkpoints that are written beside training.

What a checkpoint is, and when it is whole, is `checkpoint_folder`'s business.
"""

import contextlib
import copy
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from internvl_chat.train.arguments import RunArguments
from internvl_chat.train.checkpoint.background import BackgroundSaver
from internvl_chat.train.checkpoint.folder import CheckpointFiles, CheckpointFolder, SaveModel
from internvl_chat.train.checkpoint.run_folder import PARTIAL
from internvl_chat.train.distributed.fsdp import (
    gather_optimizer,
    gather_weights,
    is_sharded,
    spread_optimizer,
)
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)


class _WaitForCopies(TrainerCallback):
    """Keeps the optimizer from changing what a checkpoint under way has yet to copy."""

    def __init__(self, saver: BackgroundSaver) -> None:
        self.saver = saver

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer when the gradients are there."""
        self.saver.wait_until_copied()


class CheckpointingTrainer(Trainer):
    """A Trainer whose checkpoints appear when they are whole.

    Args:
        save_model_to: writes the model (or its adapters) and all that belongs to a checkpoint.
        fingerprint: what a run that resumes must have in common with this one.
        args, callbacks, options: of transformers' Trainer.
    """

    def __init__(
        self,
        *,
        args: RunArguments,
        save_model_to: SaveModel,
        fingerprint: dict[str, Any],
        callbacks: Sequence[TrainerCallback],
        **options: Any,
    ) -> None:
        self.save_model_to, self.fingerprint = save_model_to, fingerprint
        self.saver = BackgroundSaver(args.device)
        self._checkpoint_root: Path | None = None
        self._said_why = False
        super().__init__(args=args, callbacks=[*callbacks, _WaitForCopies(self.saver)], **options)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write the model into a folder; called by transformers with the gathered weights where need be."""
        if self.args.should_save:
            self.save_model_to(Path(output_dir or self.args.output_dir), state_dict)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does; when this ends, by an error too, no checkpoint is under way."""
        try:
            with self.saver:
                return super().train(*args, **kwargs)
        finally:
            with contextlib.suppress(OSError):
                (Path(self.args.output_dir) / PARTIAL).rmdir()

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Write a checkpoint beside the others, if possible while training goes on."""
        output, best = Path(self.args.output_dir), self.state.best_global_step
        folder = CheckpointFolder(
            output,
            self.state.global_step,
            self.fingerprint,
            keep=self.args.save_total_limit,
            best=str(output / f"checkpoint-{best}") if best else None,
        )
        reason = self._reason_to_wait()
        if reason:
            self._save_while_waiting(folder, reason, model, trial)
            return
        self.saver.wait()
        self.store_flos()
        if not self.args.save_only_model:
            self._save_rng_state(str(folder.partial))  # each process its own
            self._save_scaler(str(folder.partial))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._save_beside_training(folder)

    def _save_beside_training(self, folder: CheckpointFolder) -> None:
        """Hand all that changes with the steps to the thread that writes it."""
        model = self.accelerator.unwrap_model(self.model)
        tensors, scheduler = {"weights": dict(model.state_dict())}, None
        if not self.args.save_only_model:
            tensors["optimizer"] = self.optimizer.state_dict()
            scheduler = copy.deepcopy(self.lr_scheduler.state_dict())
        callbacks = [*self.callback_handler.callbacks, self.control]
        state = dataclasses.replace(
            self.state,
            log_history=list(self.state.log_history),
            stateful_callbacks=[one for one in callbacks if isinstance(one, ExportableState)],
        )
        files = CheckpointFiles(folder, self.save_model_to, scheduler, state, self.saver.pause)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        self.saver.save(tensors, files.write, fixed=frozen)

    def _reason_to_wait(self) -> str | None:
        """Return why checkpoints cannot be written while training goes on; None if they can."""
        if self.is_deepspeed_enabled or is_sharded(self.model):
            return "with DeepSpeed and FSDP every process holds a part of the state"
        if os.environ.get("WANDB_LOG_MODEL", "").lower() == "checkpoint":
            return "W&B uploads each at once (WANDB_LOG_MODEL)"
        return None

    def _save_while_waiting(
        self, folder: CheckpointFolder, reason: str, model: nn.Module, trial: object
    ) -> None:
        """Let transformers write a checkpoint, on all processes."""
        if not self._said_why:
            logger.info("training waits while checkpoints are written: %s", reason)
            self._said_why = True
        self._checkpoint_root = folder.partial.parent
        with folder.failures() as failed:
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint is not None:
                # It was found where it is written; where it will be follows from its step.
                self.state.best_model_checkpoint = None
                if self.args.should_save:
                    self.state.save_to_json(str(folder.partial / TRAINER_STATE_NAME))
        self._checkpoint_root = None
        if not self._anywhere(bool(failed)) and self.args.should_save:
            with folder.failures():
                folder.publish()
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model into a folder, gathered on the main process where it is spread."""
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call=_internal_call)
            return
        self._save(output_dir, gather_weights(self.model))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = gather_optimizer(self.model, self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, scheduler = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        spread_optimizer(self.model, self.optimizer.optimizer, optimizer)
        self.lr_scheduler.load_state_dict(scheduler)

    def _get_output_dir(self, trial: object) -> str:
        return str(self._checkpoint_root or super()._get_output_dir(trial))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The model was loaded from the checkpoint when it was made; there is nothing to do."""

    def _anywhere(self, value: bool) -> bool:
        """Say whether something is true on any process."""
        return bool(self._sum_over_processes(torch.tensor([float(value)])).item())

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """Sum float64 values over the processes; returns them on the CPU."""
        if self.args.world_size == 1:
            return values
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum").cpu()

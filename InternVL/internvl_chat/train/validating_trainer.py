"""Validation between steps: what becomes of its figures, which checkpoint is best, when to stop early."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from internvl_chat.train.arguments import RunArguments
from internvl_chat.train.checkpoint.checkpointing import CheckpointingTrainer
from internvl_chat.train.checkpoint.run_folder import VALIDATION
from internvl_chat.train.distributed.fsdp import is_sharded
from internvl_chat.train.distributed.signals import StopRequest
from internvl_chat.train.monitor.run_log import AppendedFile
from internvl_chat.train.validation import Outcome, Validation
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)


class EarlyStop(EarlyStoppingCallback):
    """Ends a run after so many validations in a row without a new best; a resumed run counts on."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer before the first step."""
        stored = (state.stateful_callbacks or {}).get(type(self).__name__, {})
        counted = stored.get("attributes", {}).get("early_stopping_patience_counter", 0)
        self.early_stopping_patience_counter = counted

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Called after each validation, before its figures can become the best."""
        super().on_evaluate(args, state, control, metrics)
        if control.should_training_stop:
            logger.info(
                "step %d: %s has not improved for %d validations; training ends early",
                state.global_step, args.metric_for_best_model, self.early_stopping_patience_counter,
            )  # fmt: skip


class ValidatingTrainer(CheckpointingTrainer):
    """A Trainer that validates between steps, and keeps the best checkpoint.

    Args:
        args: of the run.
        validation: what to validate on; None for no validation.
        callbacks, options: of `CheckpointingTrainer`.

    Attributes:
        stop_request: by which the run may be asked to stop.
        stops: True once all processes know that the run is to stop.
    """

    def __init__(
        self,
        *,
        args: RunArguments,
        validation: Validation | None,
        callbacks: Sequence[TrainerCallback],
        **options: Any,
    ) -> None:
        self.validation = validation
        self.stop_request, self.stops = StopRequest(), False
        self._validation_log = AppendedFile(Path(args.output_dir) / VALIDATION)
        early = [EarlyStop(args.early_stopping_patience)] if args.early_stopping_patience else []
        super().__init__(
            args=args,
            eval_dataset=None if validation is None else validation.data,
            callbacks=[*callbacks, *early],
            **options,
        )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validate, and report the figures; called by the Trainer."""
        began = time.perf_counter()
        model = self.accelerator.unwrap_model(self.model)
        # Blocks that are compiled for training would be compiled once more.
        eager = torch.compiler.set_stance("force_eager") if self.args.compile_blocks else nullcontext()
        with eager:
            outcome = self.validation.run(
                model, self.get_eval_dataloader(), self._sum_over_processes, self._may_leave_early()
            )
        if outcome is None:
            logger.warning("step %d: the validation was not finished", self.state.global_step)
            self.stops = True
            self.control.should_save = self.control.should_training_stop = True
            return {}
        metrics = outcome.metrics()
        if self.is_world_process_zero():
            self._write(outcome, time.perf_counter() - began)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _may_leave_early(self) -> Callable[[], bool]:
        """Return what tells that this process is to stop, where each may leave a validation by itself."""
        if is_sharded(self.model) or self.is_deepspeed_enabled:
            return lambda: False
        return lambda: self.stop_request.signal is not None

    def _write(self, outcome: Outcome, seconds: float) -> None:
        """Append to `validation.jsonl`."""
        row = {"step": self.state.global_step, "epoch": round(self.state.epoch or 0.0, 6)}
        self._validation_log.append(row | {"seconds": round(seconds, 4)} | outcome.row())

    def _determine_best_metric(self, metrics: dict[str, float], trial: object) -> bool:
        """Have a new best saved, whatever else is; returns whether this step is saved at all."""
        if metrics and super()._determine_best_metric(metrics, trial):
            self.state.best_global_step = self.state.global_step
            self.control.should_save = True
        return self.control.should_save

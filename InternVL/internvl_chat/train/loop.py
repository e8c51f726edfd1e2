"""The training loop.

The sampler selects the records of a step; the selection does not depend on the number of ranks. Each rank
runs the forward and backward passes of its packs, and gradients are reduced once per step. The loss is the
weighted mean over all supervised tokens of the step (see `model.loss`).
"""

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from internvl_chat.data.batching.collator import Pack, PackDataset
from internvl_chat.data.batching.dataloader import StepDataLoader
from internvl_chat.data.batching.sampler import StepSampler
from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.record_set import RecordKey
from internvl_chat.inference.tile_features import tile_features
from internvl_chat.model.flops import FlopCounter
from internvl_chat.model.loss import token_weight
from internvl_chat.train.checkpoint.run_folder import LEDGER, METRICS, SAMPLES, VALIDATION
from internvl_chat.train.checkpoint.saver import Checkpointer
from internvl_chat.train.checkpoint.state import TrainState
from internvl_chat.train.config import RunConfig
from internvl_chat.train.distributed.signals import StopRequest
from internvl_chat.train.distributed.strategy import Strategy
from internvl_chat.train.monitor.console import Console
from internvl_chat.train.monitor.nan_guard import NanGuard
from internvl_chat.train.monitor.step_metrics import (
    StepRecord,
    StepSums,
    dataset_losses,
    dataset_sums,
    ledger_row,
    metrics_row,
    skipped_records,
)
from internvl_chat.train.monitor.trackers import Trackers
from internvl_chat.train.monitor.watchdog import Watchdog
from internvl_chat.train.validation import Validation, named_metrics
from internvl_chat.utils import distributed
from internvl_chat.utils.files import JsonLinesFile
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# With compiled blocks, packs are padded to a multiple of this many tokens to avoid recompilation.
_COMPILED_MULTIPLE = 128


@dataclass
class TrainingLoop:
    """Trains from a given state to the end of the run.

    Attributes:
        sampler: selects and packs the records of each step.
        normalization: pixel normalization, one of `NORMALIZATIONS`.
        state: training progress; updated after each step.
        validation: None to train without validation.
    """

    run: RunConfig
    strategy: Strategy
    data: TrainingData
    sampler: StepSampler
    normalization: str
    flop_counter: FlopCounter
    checkpointer: Checkpointer
    trackers: Trackers
    state: TrainState
    validation: Validation | None = None
    stop: StopRequest = field(default_factory=StopRequest)

    def __post_init__(self) -> None:
        run = self.run
        self.packs = PackDataset(self.data, multiple=_COMPILED_MULTIPLE if run.compile_blocks else 1)
        self.set_names = [records.spec.name for records in self.data.sets]
        self.dataloader = StepDataLoader(self.packs, self.sampler, run.dataloader_options)
        self.total_steps = run.count_steps(len(self.sampler))
        files = (Path(run.output_dir) / name for name in (METRICS, LEDGER, VALIDATION, SAMPLES))
        self.metrics, self.ledger, self.validations, self.samples = map(JsonLinesFile, files)
        self.nan_guard = NanGuard(run.max_bad_steps)
        self.watchdog, self.skip_budget = Watchdog(run.hang_seconds), self.data.skip_budget()
        self.should_stop = False  # the same on all ranks

    # ---- the run

    def train(self) -> signal.Signals | None:
        """Train to the last step; return the signal that stopped the run early, if any."""
        first = self.state.step + 1
        self._open_ledger()
        show_bar = self.run.is_main and not self.run.disable_tqdm
        console = Console(self.total_steps, first_step=first, show_bar=show_bar)
        with self.checkpointer, self.watchdog:
            batches = self.dataloader.steps(first, self.total_steps)
            if self.run.eval_on_start and first == 1:
                self.validate()
            # Rank 0 may have done slow work. A barrier has a longer timeout than the collectives of a step.
            distributed.barrier()
            start, pause = time.perf_counter(), 0.0
            for step in range(first, self.total_steps + 1):
                self.watchdog.note(f"waiting for the records of step {step}")
                packs = next(batches)
                record = self.train_step(step, packs)
                end = time.perf_counter()
                needs_barrier = self._log(record, console, seconds=end - start - pause, pause=pause)
                start, pause_start = end, time.perf_counter()
                if not self.should_stop and self._is_due("eval"):
                    self.validate()
                    needs_barrier = True
                is_last = self.should_stop or step == self.total_steps
                needs_barrier |= self._save(required=is_last, saving=record.sums.saving)
                if self.should_stop:
                    break
                if needs_barrier:
                    self.watchdog.note(f"waiting for rank 0 after step {step}")
                    distributed.barrier()
                pause = time.perf_counter() - pause_start
        console.close()
        if self.run.is_main:
            self._flush()
        if self.state.step == self.total_steps or self._is_out_of_patience():
            return None
        signals = distributed.all_gather_object(self.stop.signal)
        return next((number for number in signals if number is not None), None)

    def train_step(self, step: int, packs: Sequence[Pack]) -> StepRecord:
        """Run one optimizer step on this rank's packs.

        Raises:
            DataError: more than `--max_bad_fraction` of the records are unusable.
            TrainingError: more than `--max_bad_steps` steps have been skipped.
        """
        names = ", ".join(f"{key.dataset} {key.index}" for pack in packs for key in pack.keys)
        self.watchdog.note(f"running step {step} on the records {names}")
        # Seed dropout from step and rank, so that resuming does not require the random state.
        seed = np.random.SeedSequence((self.run.seed, step, self.run.rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))
        self.strategy.wrapped.train()
        learning_rate = float(self.strategy.optimizer.param_groups[0]["lr"])
        weights = [self._record_weights(pack) for pack in packs]
        flops = sum(self.flop_counter.step(p.lengths.tolist(), p.num_supervised, len(p.tiles)) for p in packs)
        stop_requested, saving = self.stop.signal is not None, self.checkpointer.busy
        local = StepSums.from_packs(packs, weights, flops, stop_requested=stop_requested, saving=saving)
        sums, skipped, sets, loss, norm = local.all_reduce(), [], {}, 0.0, 0.0
        if sums.skipped:
            records = [record for pack in packs for record in pack.skipped]
            gathered = distributed.all_gather_object(records, in_step=True)
            skipped = [record for records in gathered for record in records]
            self.skip_budget.add(skipped)
        if sums.supervised_tokens:  # 0 if every record of the step is skipped
            # The factor `world_size` undoes the averaging of the gradients across ranks.
            scale = self.run.world_size / sums.weight
            weighted_sum, token_losses = self.forward_backward(packs, weights, scale)
            by_set = dataset_sums(self.set_names, packs, weights, token_losses)
            losses = torch.cat([weighted_sum.reshape(1).cpu(), by_set.flatten()])
            losses = distributed.all_reduce_sum(losses, in_step=True)
            loss = losses[0].item() / sums.weight
            sets = dataset_losses(self.set_names, losses[1:].view_as(by_set))
            self.checkpointer.before_optimizer_step()
            norm = self.strategy.clip_gradients(self.run.max_grad_norm)
        skipped_because = self.nan_guard.check(
            step, loss, norm, sums.supervised_tokens, lambda: self._records_of(step)
        )
        self.strategy.step(apply=skipped_because is None)
        self.should_stop = self.should_stop or sums.stop_requested > 0
        state = self.state
        state.step, state.epoch = step, step / len(self.sampler)
        state.total_flops += sums.flops
        state.skipped_steps += skipped_because is not None
        return StepRecord(step, state.epoch, loss, learning_rate, norm, sums, sets, skipped, skipped_because)

    def forward_backward(
        self, packs: Sequence[Pack], weights: Sequence[torch.Tensor], scale: float, *, sync: bool = True
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the forward and backward passes of this rank's packs.

        Args:
            weights: per pack, the loss weight of the tokens of each record: (R,).
            scale: factor on the loss in the backward pass.
            sync: reduce gradients across ranks after the last pack.

        Returns:
            The weighted sum of the token losses in float64 and, per pack, the loss of each supervised token:
            (U,).
        """
        device = self.run.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        token_losses = []
        model, features = self.strategy.model, None
        if model.vision_is_frozen and not model.always_run_vision:
            # Otherwise, the vision tower runs as part of each pack's forward pass.
            tiles = torch.cat([pack.tiles.to(device, non_blocking=True) for pack in packs])
            features = tile_features(model, tiles, self.normalization).split([len(p.tiles) for p in packs])
        for number, (pack, weight) in enumerate(zip(packs, weights, strict=True)):
            inputs = pack.text_inputs(device)
            if features is None:
                inputs["pixel_values"] = pack.pixel_values(device, self.normalization)
            else:
                inputs["vision_features"] = features[number]
            token_weights = weight.float().repeat_interleave(pack.supervised).to(device, non_blocking=True)
            with self.strategy.gradient_sync(sync and number + 1 == len(packs)):
                output = self.strategy.wrapped(**inputs, token_weights=token_weights)
                self.strategy.backward(output.loss * scale)
            total += output.loss.detach()
            token_losses.append(output.token_losses.detach())
        return total, token_losses

    def validate(self) -> None:
        """Validate, report the metrics and update the best metric.

        A stop signal ends the validation and the run.
        """
        start, state = time.perf_counter(), self.state
        self.watchdog.note(f"validating after step {state.step}")
        # With sharded weights, all ranks must run the same forward passes, so a signal cannot interrupt them.
        may_leave = not self.strategy.shards_weights
        if self.validation is None:
            return
        result = self.validation.run(self.strategy.model, lambda: may_leave and self.stop.signal is not None)
        if result is None:
            logger.warning("step %d: validation interrupted", state.step)
            self.should_stop = True
            return
        metrics, seconds = named_metrics(result.metrics), time.perf_counter() - start
        if self.run.is_main:
            row = {"step": state.step, "epoch": round(state.epoch, 6), "seconds": round(seconds, 4)}
            self.validations.append(row | result.metrics)
            for sample in result.samples:
                self.samples.append({"step": state.step} | sample)
            self.trackers.log({f"eval/{k.removeprefix('eval_')}": v for k, v in metrics.items()}, state.step)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        logger.info("step %d: validation in %.0f s: %s", state.step, seconds, shown)
        if self.run.tracks_best and state.step:
            self._update_best(metrics)

    # ---- parts of a step

    def _record_weights(self, pack: Pack) -> torch.Tensor:
        """Return the loss weight of the tokens of each record in a pack, 0 for dummy samples: (R,)."""
        weights = [token_weight(n, self.run.loss_reduction) for n in pack.supervised.tolist()]
        return torch.tensor(weights, dtype=torch.float64) * pack.counts

    def _records_of(self, step: int) -> list[RecordKey]:
        """Return the keys of a step's records across all ranks."""
        return [self.data.key_of(int(index)) for index in self.sampler.step(*self.sampler.position_of(step))]

    # ---- logs, checkpoints, the best model

    def _open_ledger(self) -> None:
        if self.state.step:
            skipped = skipped_records(self.ledger.path) if self.run.is_main else []
            self.skip_budget.restore(distributed.broadcast_object(skipped))
        elif self.data.excluded and self.run.is_main:
            excluded = [record._asdict() for record in self.data.excluded]
            self.ledger.append({"step": 0, "skipped": excluded, "trained": []})

    def _log(self, record: StepRecord, console: Console, *, seconds: float, pause: float) -> bool:
        """Log a step to `metrics.jsonl` and `ledger.jsonl` and, if due, to the console and the trackers.

        Args:
            seconds: duration of the step.
            pause: seconds spent on validation, saving and waiting for rank 0 before the step.

        Returns:
            Whether rank 0 logs this step to trackers, which may be slow; the same on all ranks.
        """
        step = record.step
        is_due = self._is_due("logging") or (step == 1 and self.run.logging_first_step)
        calls_trackers = is_due and bool(self.run.report_to)
        if not self.run.is_main:
            return calls_trackers
        imbalance = self.sampler.load_imbalance(step) if self.run.world_size > 1 else None
        row = metrics_row(record, seconds, self.run.device, pause=pause, load_imbalance=imbalance)
        self.metrics.append(row)
        self.ledger.append(ledger_row(record, self.sampler.position_of(step)[0], self._records_of(step)))
        averages = console.step(row, due=is_due)
        if averages is not None:
            self.trackers.log({f"train/{name}": value for name, value in averages.items()}, step)
        return calls_trackers

    def _flush(self) -> None:
        for log in (self.metrics, self.ledger, self.validations, self.samples):
            log.flush()

    def _is_due(self, action: str) -> bool:
        """Return whether an action (`logging`, `eval` or `save`) is due after this step.

        With the strategies `steps` and `epoch`, saving is also due after the last step. So is validation, if
        `eval_delay` has passed.
        """
        run, step = self.run, self.state.step
        strategy, interval = getattr(run, f"{action}_strategy"), getattr(run, f"{action}_steps")
        if action == "eval" and run.eval_delay > (step if strategy == "steps" else self.state.epoch):
            return False
        if strategy not in ("steps", "epoch"):
            return False
        if step == self.total_steps and action != "logging":
            return True
        if strategy == "epoch":
            return step % len(self.sampler) == 0
        # Intervals below 1 are fractions of all steps.
        return step % max(1, round(interval if interval >= 1 else interval * self.total_steps)) == 0

    def _save(self, *, required: bool, saving: int) -> bool:
        """Save a checkpoint if due; return whether a save was started (the same on all ranks).

        Args:
            required: if the previous save is still running, wait for it instead of skipping this one.
            saving: number of ranks on which the previous save is still running.
        """
        is_best = self.run.tracks_best and self.state.best_step == self.state.step
        is_stopped = self.should_stop and not self._is_out_of_patience()
        if not (self._is_due("save") or is_best or is_stopped):
            return False
        if saving and not (required or is_best):
            logger.warning(
                "step %d: no checkpoint saved, because the previous one is still being written",
                self.state.step,
            )
            return False
        if self.run.is_main:
            self._flush()
        self.watchdog.note(f"saving after step {self.state.step}")
        self.checkpointer.save(self.state)
        return True

    def _update_best(self, metrics: dict[str, float]) -> None:
        """Update the best metric; stop after `early_stopping_patience` validations without improvement."""
        name = f"eval_{(self.run.metric_for_best_model or '').removeprefix('eval_')}"
        improved = self.state.update_best(metrics[name], self.run.greater_is_better)
        if not improved and self._is_out_of_patience():
            logger.info(
                "step %d: early stopping: %s has not improved for %d validations",
                self.state.step, name, self.state.evals_without_improvement,
            )  # fmt: skip
            self.should_stop = True

    def _is_out_of_patience(self) -> bool:
        patience = self.run.early_stopping_patience
        return 0 < patience <= self.state.evals_without_improvement

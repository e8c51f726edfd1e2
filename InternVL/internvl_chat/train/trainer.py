"""The optimizer step: transformers' Trainer with records, not micro-batches, as what a step is made of.

A batch of the loader is a process's whole share of a step, in packs. The loss of a step is one sum over all
its supervised tokens, divided by one sum of weights, whatever the packs and processes (see `model.loss`).
"""

import atexit
import contextlib
import itertools
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader

from internvl_chat.data.bad_records import Skipped
from internvl_chat.data.collator import Pack, PackDataset
from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.order import StepSampler
from internvl_chat.data.record_set import RecordKey
from internvl_chat.inference.tile_features import tile_features
from internvl_chat.model.flops import count_flops, peak_flops
from internvl_chat.model.loss import token_weight
from internvl_chat.model.persistent_buffers import keep_vocabulary_memory
from internvl_chat.train.arguments import RunArguments
from internvl_chat.train.callbacks import Rehearse, SetEpoch, StopWhenAsked
from internvl_chat.train.checkpoint.folder import SaveModel
from internvl_chat.train.dataloader import build_loader, count_records, end_workers, naming_ended_worker
from internvl_chat.train.distributed.fsdp import is_sharded, whole
from internvl_chat.train.monitor.nan_guard import StepGuard
from internvl_chat.train.monitor.run_log import StepLog
from internvl_chat.train.monitor.step_metrics import StepRecord, StepSums, figures_row, ledger_row
from internvl_chat.train.monitor.trackers import shield_reports
from internvl_chat.train.monitor.watchdog import Watchdog
from internvl_chat.train.optim.adamw import OWN_OPTIMIZERS, build_optimizer, group_by_decay
from internvl_chat.train.preflight.dry_run import Rehearsal
from internvl_chat.train.preflight.memory import max_memory
from internvl_chat.train.validating_trainer import ValidatingTrainer
from internvl_chat.train.validation import Validation
from internvl_chat.utils.distributed import of_all_processes
from internvl_chat.utils.errors import DataError, TrainingError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

_COMPILED_MULTIPLE = 128


class M3LLMTrainer(ValidatingTrainer):
    """Trains an `InternVLChatModel` on `TrainingData`.

    Args:
        model: with its trainable parameters chosen.
        args: of the run.
        data: the records.
        sampler: which of them each step uses.
        normalization: pixel statistics of the tiles.
        save_model_to: writes the model (or its adapters) and all that belongs to a checkpoint.
        fingerprint: what a run that resumes must have in common with this one.
        weight_precision: of `build_optimizer`.
        rehearsal: of the largest pack, before the first step.
        validation: what to validate on between steps, if anything.
    """

    def __init__(
        self,
        model: nn.Module,
        args: RunArguments,
        *,
        data: TrainingData,
        sampler: StepSampler,
        normalization: str,
        save_model_to: SaveModel,
        fingerprint: dict[str, Any],
        weight_precision: str,
        rehearsal: Rehearsal | None = None,
        validation: Validation | None = None,
    ) -> None:
        self.data, self.sampler, self.normalization = data, sampler, normalization
        self.weight_precision, self.rehearsal = weight_precision, rehearsal
        # Compiled blocks take lengths that have a divisor in common without being compiled again.
        self.packs = PackDataset(data, multiple=_COMPILED_MULTIPLE if args.compile_blocks else 1)
        self.guard, self.watchdog = StepGuard(args.max_bad_steps), Watchdog(args.hang_seconds)
        self.skip_budget = data.skip_budget()
        self.step_log = StepLog(Path(args.output_dir))
        super().__init__(
            model=model,
            args=args,
            train_dataset=data,
            save_model_to=save_model_to,
            fingerprint=fingerprint,
            validation=validation,
            callbacks=[SetEpoch(sampler), Rehearse(self), StopWhenAsked(self)],
        )
        shield_reports(self.callback_handler)
        self.model_accepts_loss_kwargs = False
        # The model computes in the dtype of its weights; autocast would only look for casts that none needs.
        self.accelerator.native_amp = False
        if args.device.type == "cpu" and args.world_size == 1 and not self.is_deepspeed_enabled:
            keep_vocabulary_memory(model)
        if is_sharded(model):
            # accelerate would wrap it for data-parallel training.
            self.accelerator.prepare_model = lambda model, **_: model
        self._flop_counter = count_flops(model)
        self._step: StepRecord | None = None
        self._step_began = time.perf_counter()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.args.count_steps(len(self.sampler))

    @property
    def has_ended(self) -> bool:
        """True once the last step of the run is done."""
        return self.state.global_step >= self.total_steps

    # ---- data

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of this process's shares; it is dealt already, so accelerate need not."""
        return build_loader(self.args, self.packs, self.sampler, keep_workers=True)

    def get_eval_dataloader(self, eval_dataset: object = None) -> DataLoader:
        """Return the loader of this process's shares of the held-out records."""
        return build_loader(self.args, self.validation.packs, self.validation.sampler, keep_workers=False)

    def get_total_train_batch_size(self, args: RunArguments) -> int:
        """Return the records of an optimizer step over all processes."""
        return args.step_records

    def num_examples(self, dataloader: DataLoader) -> int:
        """Return the records of an epoch."""
        return len(self.data)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[list[Pack]], None]:
        """Fetch the next share.

        Raises:
            DataError: one of its records cannot be used.
            TrainingError: they are not those of the plan, or a loader process was ended.
        """
        step = self.state.global_step + 1
        self.watchdog.note(f"waiting for the records of step {step}")
        with naming_ended_worker(self.args.dataloader_num_workers):
            shares, _ = super().get_batch_samples(*args, **kwargs)
        for pack in itertools.chain.from_iterable(shares):
            if isinstance(pack, DataError):
                raise pack
        if any(count_records(packs) != self._count_planned(step) for packs in shares):
            raise TrainingError(f"step {step}: the loader brought other records than were planned")
        return shares, None

    def _count_planned(self, step: int) -> Counter[RecordKey]:
        """Return this process's records of a step, as the ledger will name them."""
        draws = itertools.chain.from_iterable(self.sampler.packs(*self.sampler.place_of(step)))
        return Counter(self.data.key_of(draw.index) for draw in draws if draw.counts)

    def _get_num_items_in_batch(self, *_: Any, **__: Any) -> None:
        """Weights are settled in `training_step`; transformers has nothing to count."""
        return None

    def floating_point_ops(self, inputs: list[Pack]) -> float:
        """Return the operations of a share, for the Trainer's running total."""
        return sum(
            self._flop_counter.step(p.lengths.tolist(), p.num_supervised, len(p.tiles)) for p in inputs
        )

    # ---- the optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the AdamW of `build_optimizer`, unless `--optim` names another optimizer."""
        args, model = self.args, self.model if model is None else model
        if self.optimizer is not None or args.optim not in OWN_OPTIMIZERS:
            return super().create_optimizer(model)
        self.optimizer = build_optimizer(
            group_by_decay(model, set(self.get_decay_parameter_names(model)), args.weight_decay),
            # DeepSpeed keeps masters of its own.
            precision="bf16" if self.is_deepspeed_enabled else self.weight_precision,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            seed=args.seed,
            # On a CPU one pass is not faster, and random numbers one by one are far slower.
            compiled=args.compile_blocks and args.device.type == "cuda",
        )
        return self.optimizer

    # ---- the step

    def training_step(
        self, model: nn.Module, inputs: list[Pack], num_items_in_batch: object = None
    ) -> torch.Tensor:
        """Run forward and backward over this process's share; gradients are synchronised once.

        Returns:
            The loss of the whole step, the same on every process.
        """
        model.train()
        learning_rate = self._get_learning_rate()
        weights = [self._record_weights(pack) for pack in inputs]
        share = StepSums.of_share(
            inputs, weights, self.floating_point_ops(inputs), self.stop_request.signal is not None
        )
        names = ", ".join(f"{key.dataset} {key.index}" for pack in inputs for key in pack.keys)
        self.watchdog.note(f"in step {self.state.global_step + 1}, records {names}")
        total = share.over_processes(self._sum_over_processes)
        skipped = self._count_skipped(inputs) if total.skipped else ()
        # Where every record of a step is skipped, all sums are zero.
        weight = total.weight or 1.0
        # Gradients are averaged over the processes, hence the factor.
        weighted_sum = self._forward_backward(model, inputs, weights, self.args.world_size / weight)
        loss = self._sum_over_processes(weighted_sum.reshape(1).cpu())[0] / weight
        self.stops = total.asked_to_stop
        self._step = StepRecord(float(loss), learning_rate, total, skipped)
        return loss.float().to(self.args.device)

    def _count_skipped(self, inputs: list[Pack]) -> tuple[Skipped, ...]:
        """Return the records of a step that turned out to be unusable, on all processes.

        Raises:
            DataError: with those of earlier steps they are too many.
        """
        own = [record for pack in inputs for record in pack.skipped]
        found = of_all_processes(own, self.args.world_size)
        skipped = tuple(itertools.chain.from_iterable(found))
        self.skip_budget.spend(skipped)
        return skipped

    def _forward_backward(
        self,
        model: nn.Module,
        packs: list[Pack],
        weights: list[torch.Tensor],
        scale: float,
        synchronise: bool = True,
    ) -> torch.Tensor:
        """Run all packs forward and backward; returns the weighted sum of their token losses."""
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        features = self._vision_features(packs)
        for number, (pack, weight) in enumerate(zip(packs, weights, strict=True)):
            last = number + 1 == len(packs)
            with self._synchronised(model, last and synchronise):
                loss = self._forward(model, pack, weight, features[number] if features else None)
                self._backward(loss * scale)
            total += loss.detach()
        return total

    def start_clock(self) -> None:
        """Let the first step begin now."""
        self._step_began = time.perf_counter()

    def rehearse(self) -> None:
        """Run the largest planned pack once, forward and backward; nothing is changed by it.

        Raises:
            TrainingError: memory does not suffice.
        """
        if self.rehearsal is None:
            return
        if self.is_deepspeed_enabled:
            logger.info("the largest pack is not rehearsed: DeepSpeed would keep its gradients")
            return
        pack = self.packs[self.rehearsal.draws]
        if isinstance(pack, DataError):
            raise pack
        model, device = self.model_wrapped, self.args.device

        def forward_backward() -> None:
            # Gradients are not exchanged, but where they are spread: there `zero_grad` finds no others.
            model.train()
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                packs = [pack] * (2 if self.rehearsal.several else 1)
                weights = [torch.ones(len(pack.keys), dtype=torch.float64)] * len(packs)
                try:
                    self._forward_backward(model, packs, weights, 1.0, synchronise=is_sharded(model))
                finally:
                    model.zero_grad(set_to_none=True)

        self.rehearsal.run(
            forward_backward,
            self.accelerator.unwrap_model(self.model).recompute_layers,
            self._anywhere,
            device,
        )

    def _record_weights(self, pack: Pack) -> torch.Tensor:
        """Return the weight of each record's tokens in the loss, 0 for a record that does not count; (R,)."""
        weights = [token_weight(n, self.args.loss_reduction) for n in pack.supervised.tolist()]
        return torch.tensor(weights, dtype=torch.float64) * pack.counts

    def _vision_features(self, packs: list[Pack]) -> list[torch.Tensor] | None:
        """Run a frozen vision tower over the tiles of all packs at once; None where it runs with each pack.

        That is where it is trained, and where its weights are spread over the processes (ZeRO-3, FSDP): there
        a module runs only inside the model's own forward pass.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not model.vision_is_frozen or model.always_run_vision:
            return None
        tiles = torch.cat([pack.tiles.to(self.args.device, non_blocking=True) for pack in packs])
        features = tile_features(model, tiles, self.normalization)
        return list(features.split([len(pack.tiles) for pack in packs]))

    def _forward(
        self, model: nn.Module, pack: Pack, weight: torch.Tensor, features: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the weighted sum of a pack's token losses."""
        device = self.args.device
        inputs = pack.text_inputs(device)
        if features is None:
            inputs["pixel_values"] = pack.pixel_values(device, self.normalization)
        else:
            inputs["vision_features"] = features
        weights = weight.float().repeat_interleave(pack.supervised).to(device, non_blocking=True)
        return model(**inputs, token_weights=weights).loss

    @contextlib.contextmanager
    def _synchronised(self, model: nn.Module, last: bool) -> Any:
        """Exchange gradients with the other processes after a step's last pack only."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        if is_sharded(model):
            model.set_requires_gradient_sync(last)
            yield
        elif last or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | float:
        return whole(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:
        if grad_norm is None and is_sharded(model):
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            grad_norm = whole(torch.nn.utils.get_total_norm(gradients))
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        step, number = self._step, self.state.global_step + 1
        if step is not None:
            step.left_out = self.guard.judge(
                number, step.loss, float(norm), step.sums.supervised_tokens, lambda: self._records_of(number)
            )
            if step.left_out:
                # An optimizer leaves parameters without a gradient as they are, and so are its moments.
                self._leave_out(model)
        return norm

    def _leave_out(self, model: nn.Module) -> None:
        """Let the coming optimizer step change nothing.

        Raises:
            TrainingError: it cannot be kept from it.
        """
        if self.is_deepspeed_enabled:
            raise TrainingError("DeepSpeed has used the gradients already; go on from the last checkpoint")
        for parameter in model.parameters():
            parameter.grad = None

    def _backward(self, loss: torch.Tensor) -> None:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.accelerator.backward(loss, scale_wrt_gas=False)
        else:
            self.accelerator.backward(loss)

    # ---- records of the run

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Write the step's line, then let the Trainer log, evaluate and save."""
        if self._step is not None:
            self._write_step(self._step, grad_norm)
            self._step = None
        if self.control.should_save:
            self.step_log.bring_to_disk()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate, watched; the time that it takes belongs to no step."""
        self.watchdog.note(f"validating after step {self.state.global_step}")
        metrics = super().evaluate(*args, **kwargs)
        self.start_clock()
        return metrics

    def _write_step(self, step: StepRecord, grad_norm: Any) -> None:
        """Append to `metrics.jsonl` and `ledger.jsonl`."""
        now = time.perf_counter()
        seconds, self._step_began = now - self._step_began, now
        if not self.is_world_process_zero():
            return
        number, device = self.state.global_step, self.args.device
        figures = figures_row(
            step,
            number=number,
            epoch=self.state.epoch,
            grad_norm=None if grad_norm is None else float(grad_norm),
            seconds=seconds,
            peak_flops=peak_flops(device),
            processes=self.args.world_size,
            max_memory=max_memory(device),
        )
        epoch, _ = self.sampler.place_of(number)
        used = ledger_row(step, number=number, epoch=epoch, records=self._records_of(number))
        self.step_log.write(figures, used)

    def _records_of(self, step: int) -> list[RecordKey]:
        """Return the records of a step over all processes."""
        return [self.data.key_of(int(index)) for index in self.sampler.step(*self.sampler.place_of(step))]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does, watched."""
        # What is registered last is called first, so before Python waits for them.
        atexit.register(end_workers)
        if kwargs.get("resume_from_checkpoint"):
            earlier = [self.step_log.skipped() if self.is_world_process_zero() else []]
            if self.args.world_size > 1:
                torch.distributed.broadcast_object_list(earlier)
            self.skip_budget.recall(earlier[0])
        elif self.data.left_out and self.is_world_process_zero():
            self.step_log.write_left_out([record._asdict() for record in self.data.left_out])
        with self.watchdog:
            return super().train(*args, **kwargs)

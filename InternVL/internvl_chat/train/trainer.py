"""The optimizer step: transformers' Trainer with records, not micro-batches, as what a step is made of.

A batch of the loader is a process's whole share of a step, in packs. The loss of a step is one sum over all
its supervised tokens, divided by one sum of weights, whatever the packs and processes (see `model.loss`).
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ExportableState
from transformers.training_args import OptimizerNames

from internvl_chat.data.collator import Pack, PackDataset
from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.order import StepSampler
from internvl_chat.data.tiling import normalize_tiles
from internvl_chat.errors import DataError, TrainingError
from internvl_chat.logs import get_logger
from internvl_chat.model.flops import count_flops, peak_flops
from internvl_chat.model.loss import token_weight
from internvl_chat.train.arguments import RunArguments
from internvl_chat.train.background_save import BackgroundSaver
from internvl_chat.train.checkpoint_folder import CheckpointFiles, CheckpointFolder, SaveModel
from internvl_chat.train.kept_memory import keep_vocabulary_memory
from internvl_chat.train.optimizer import build_optimizer
from internvl_chat.train.output_folder import LEDGER, METRICS, PARTIAL
from internvl_chat.train.rehearsal import Rehearsal
from internvl_chat.train.sharding import (
    gather_optimizer,
    gather_weights,
    is_sharded,
    spread_optimizer,
    whole,
)

logger = get_logger(__name__)

# The names that transformers has for what `build_optimizer` makes.
_ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)

_COMPILED_MULTIPLE = 128

# Tiles in the frozen vision tower at a time; more would only cost memory.
_TILES_AT_ONCE = {"cpu": 8, "cuda": 64}


@dataclass
class StepRecord:
    """What a step was made of, summed over all processes."""

    loss: float
    learning_rate: float
    records: int
    tokens: int
    supervised_tokens: int
    tiles: int
    flops: float


class _SetEpoch(TrainerCallback):
    """Tells the sampler which epoch begins."""

    def __init__(self, sampler: StepSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer before it iterates the loader."""
        self.sampler.set_epoch(int(state.epoch or 0))


class _Rehearse(TrainerCallback):
    """Rehearses the largest pack when model and optimizer are in place."""

    def __init__(self, trainer: "M3LLMTrainer") -> None:
        # A circle would keep the loader's processes alive beyond the run.
        self.trainer = weakref.proxy(trainer)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer before the first step."""
        self.trainer.rehearse()


class _WaitForCopies(TrainerCallback):
    """Keeps the optimizer from changing what a checkpoint under way has yet to copy."""

    def __init__(self, saver: BackgroundSaver) -> None:
        self.saver = saver

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer when the gradients are there."""
        self.saver.wait_until_copied()


class M3LLMTrainer(Trainer):
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
    ) -> None:
        self.data, self.sampler, self.normalization = data, sampler, normalization
        self.save_model_to, self.fingerprint = save_model_to, fingerprint
        self.weight_precision, self.rehearsal = weight_precision, rehearsal
        # Compiled blocks take lengths that have a divisor in common without being compiled again.
        self.packs = PackDataset(data, multiple=_COMPILED_MULTIPLE if args.compile_blocks else 1)
        self.saver = BackgroundSaver(args.device)
        super().__init__(
            model=model,
            args=args,
            train_dataset=data,
            callbacks=[_SetEpoch(sampler), _Rehearse(self), _WaitForCopies(self.saver)],
        )
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
        self._checkpoint_root: Path | None = None
        self._said_why = False

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * len(self.sampler))

    # ---- data

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of this process's shares; it is dealt already, so accelerate need not."""
        # More loader processes than cores only get in each other's way.
        cores = max(1, (os.cpu_count() or 1) // self.args.processes_here)
        workers = min(self.args.dataloader_num_workers, cores)
        return DataLoader(
            self.packs,
            batch_sampler=self.sampler,
            collate_fn=list,
            num_workers=workers,
            pin_memory=self.args.device.type == "cuda",
            persistent_workers=workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            worker_init_fn=_one_thread,
            # Its own, so that beginning an epoch does not advance the randomness of dropout.
            generator=torch.Generator(),
        )

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
        """
        shares, _ = super().get_batch_samples(*args, **kwargs)
        for pack in itertools.chain.from_iterable(shares):
            if isinstance(pack, DataError):
                raise pack
        return shares, None

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
        if self.optimizer is not None or args.optim not in _ADAMW:
            return super().create_optimizer(model)
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[name in decayed].append(parameter)
        self.optimizer = build_optimizer(
            [
                {"params": groups[True], "weight_decay": args.weight_decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            # DeepSpeed keeps masters of its own.
            precision="bf16" if self.is_deepspeed_enabled else self.weight_precision,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            seed=args.seed,
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
        local = [
            sum(float((w * p.supervised).sum()) for w, p in zip(weights, inputs, strict=True)),
            sum(int(p.counts.sum()) for p in inputs),
            sum(p.num_tokens for p in inputs),
            sum(p.num_supervised for p in inputs),
            sum(len(p.tiles) for p in inputs),
            self.floating_point_ops(inputs),
        ]
        total = self._sum_over_processes(torch.tensor(local, dtype=torch.float64))
        # Gradients are averaged over the processes, hence the factor.
        scale = self.args.world_size / float(total[0])
        weighted_sum = self._forward_backward(model, inputs, weights, scale)
        loss = self._sum_over_processes(weighted_sum.reshape(1).cpu())[0] / total[0]
        if not math.isfinite(loss):
            records = ", ".join(f"{key.dataset} {key.index}" for pack in inputs for key in pack.keys)
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is {float(loss)}; this process's records were "
                f"{records} (data set and index from 0). Nothing of this step was kept"
            )
        self._step = StepRecord(float(loss), learning_rate, *(int(n) for n in total[1:5]), float(total[5]))
        return loss.float().to(self.args.device)

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
                weights = [torch.ones(len(pack.keys), dtype=torch.float64)]
                try:
                    self._forward_backward(model, [pack], weights, 1.0, synchronise=is_sharded(model))
                finally:
                    model.zero_grad(set_to_none=True)

        self.rehearsal.run(
            forward_backward,
            self.accelerator.unwrap_model(self.model).recompute_layers,
            self._anywhere,
            device,
        )

    def _anywhere(self, value: bool) -> bool:
        """Say whether something is true on any process."""
        return bool(self._sum_over_processes(torch.tensor([float(value)])).item())

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
        dtype = model.vision_model.embeddings.patch_embedding.weight.dtype
        with torch.no_grad():
            parts = [
                model.vision_features(normalize_tiles(part, self.normalization, dtype))
                for part in tiles.split(_TILES_AT_ONCE.get(tiles.device.type, 64))
                if len(part)
            ]
        features = torch.cat(parts) if parts else model.no_features()
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
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _backward(self, loss: torch.Tensor) -> None:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.accelerator.backward(loss, scale_wrt_gas=False)
        else:
            self.accelerator.backward(loss)

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """Sum float64 values over the processes; returns them on the CPU."""
        if self.args.world_size == 1:
            return values
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum").cpu()

    # ---- records of the run

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Write the step's line, then let the Trainer log, evaluate and save."""
        if self._step is not None:
            self._write_step(self._step, grad_norm)
            self._step = None
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _write_step(self, step: StepRecord, grad_norm: Any) -> None:
        """Append to `metrics.jsonl` and `ledger.jsonl`."""
        now = time.perf_counter()
        seconds, self._step_began = now - self._step_began, now
        if not self.is_world_process_zero():
            return
        number = self.state.global_step
        row = {
            "step": number,
            "epoch": round(self.state.epoch, 6),
            "loss": round(step.loss, 7),
            "grad_norm": None if grad_norm is None else round(float(grad_norm), 7),
            "learning_rate": step.learning_rate,
            "records": step.records,
            "tokens": step.tokens,
            "supervised_tokens": step.supervised_tokens,
            "tiles": step.tiles,
            "seconds": round(seconds, 4),
            "records_per_second": round(step.records / seconds, 3),
            "tokens_per_second": round(step.tokens / seconds, 1),
        }
        peak = peak_flops(self.args.device)
        if peak:
            row["mfu"] = round(step.flops / seconds / peak / self.args.world_size, 4)
        row["max_memory_gb"] = round(_max_memory(self.args.device) / 1e9, 3)
        folder = Path(self.args.output_dir)
        _append_line(folder / METRICS, row)
        epoch, position = divmod(number - 1, len(self.sampler))
        records = [self.data.locate(int(i)) for i in self.sampler.step(epoch, position)]
        used = [[records_of.spec.name, index] for records_of, index in records]
        _append_line(folder / LEDGER, {"step": number, "epoch": epoch, "trained": used})

    # ---- checkpoints

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
        folder = CheckpointFolder(
            Path(self.args.output_dir),
            self.state.global_step,
            self.fingerprint,
            keep=self.args.save_total_limit,
            best=self.state.best_model_checkpoint,
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
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._checkpoint_root = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
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


def _append_line(path: Path, row: dict[str, Any]) -> None:
    """Append a JSON object as one line."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _max_memory(device: torch.device) -> int:
    """Return the most memory used so far in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _one_thread(_: int) -> None:
    """Keep a loader process to one thread; there are several of them."""
    torch.set_num_threads(1)

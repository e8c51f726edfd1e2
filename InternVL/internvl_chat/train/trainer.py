"""The optimizer step: transformers' Trainer with records, not micro-batches, as what a step is made of.

A batch of the loader is a process's whole share of a step, in packs. The loss of a step is one sum over all
its supervised tokens, divided by one sum of weights, whatever the packs and processes (see `model.loss`).
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from internvl_chat.data.collator import Pack, StepCollator
from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.order import StepSampler
from internvl_chat.errors import DataError, TrainingError
from internvl_chat.logs import get_logger
from internvl_chat.model.flops import count_flops, peak_flops
from internvl_chat.model.loss import token_weight
from internvl_chat.train.arguments import RunArguments
from internvl_chat.train.fingerprint import write_fingerprint
from internvl_chat.train.output_folder import LEDGER, METRICS, PARTIAL

logger = get_logger(__name__)

SaveModel = Callable[[Path, dict[str, torch.Tensor] | None], None]


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
    ) -> None:
        self.data, self.sampler, self.normalization = data, sampler, normalization
        self.save_model_to, self.fingerprint = save_model_to, fingerprint
        super().__init__(model=model, args=args, train_dataset=data, callbacks=[_SetEpoch(sampler)])
        self.model_accepts_loss_kwargs = False
        self._flop_counter = count_flops(model)
        self._step: StepRecord | None = None
        self._step_began = time.perf_counter()
        self._checkpoint_root: Path | None = None

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
        cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        workers = min(self.args.dataloader_num_workers, cores)
        return DataLoader(
            self.data,
            batch_sampler=self.sampler,
            collate_fn=StepCollator(self.args.records_per_pack),
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
        for share in shares:
            if isinstance(share, DataError):
                raise share
        return shares, None

    def _get_num_items_in_batch(self, *_: Any, **__: Any) -> None:
        """Weights are settled in `training_step`; transformers has nothing to count."""
        return None

    def floating_point_ops(self, inputs: list[Pack]) -> float:
        """Return the operations of a share, for the Trainer's running total."""
        return sum(
            self._flop_counter.step(p.cu_seq_lens.diff().tolist(), p.num_supervised, len(p.tiles))
            for p in inputs
        )

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
        weighted_sum = 0.0
        for number, (pack, weight) in enumerate(zip(inputs, weights, strict=True), 1):
            with self._synchronised(model, number == len(inputs)):
                loss = self._forward(model, pack, weight)
                self._backward(loss * scale)
            weighted_sum = weighted_sum + loss.detach().double()
        loss = self._sum_over_processes(weighted_sum.reshape(1).cpu())[0] / total[0]
        if not math.isfinite(loss):
            records = ", ".join(f"{key.dataset} {key.index}" for pack in inputs for key in pack.keys)
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is {float(loss)}; this process's records were "
                f"{records} (data set and index from 0). Nothing of this step was kept"
            )
        self._step = StepRecord(float(loss), learning_rate, *(int(n) for n in total[1:5]), float(total[5]))
        return loss.float().to(self.args.device)

    def _record_weights(self, pack: Pack) -> torch.Tensor:
        """Return the weight of each record's tokens in the loss, 0 for a record that does not count; (R,)."""
        weights = [token_weight(n, self.args.loss_reduction) for n in pack.supervised.tolist()]
        return torch.tensor(weights, dtype=torch.float64) * pack.counts

    def _forward(self, model: nn.Module, pack: Pack, weight: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of a pack's token losses."""
        device = self.args.device
        inputs = pack.model_inputs(device, self.normalization)
        with self.compute_loss_context_manager():
            return model(
                **inputs,
                token_weights=weight.float().repeat_interleave(pack.supervised).to(device, non_blocking=True),
            ).loss

    @contextlib.contextmanager
    def _synchronised(self, model: nn.Module, last: bool) -> Any:
        """Exchange gradients with the other processes after a step's last pack only."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        if last or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

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
        self._step_began = time.perf_counter()

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

    def _get_output_dir(self, trial: object) -> str:
        return str(self._checkpoint_root or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Write a checkpoint beside the others and give it its name when it is whole."""
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self._checkpoint_root = folder / PARTIAL
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._checkpoint_root = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_fingerprint(folder / PARTIAL / name, self.fingerprint)
            (folder / PARTIAL / name).replace(folder / name)
            (folder / PARTIAL).rmdir()
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()

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

"""Checkpoints of a run: written by all ranks in a thread while training goes on, published when complete.

A checkpoint is written under `.partial` and renamed at the end. It holds the model as the finished run will
(`model_files`), `optimizer/` (`optimizer_state`) or `deepspeed/`, `trainer_state.json`, the run's
fingerprint and a manifest with the hash of every file.
"""

import contextlib
import json
import os
import shutil
import threading
import time
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch import distributed as dist

from internvl_chat.train.checkpoint.fingerprint import write_fingerprint
from internvl_chat.train.checkpoint.manifest import FileEntry, drop_from_cache, write_manifest
from internvl_chat.train.checkpoint.optimizer_state import (
    OptimizerWriter,
    load_optimizer,
    named_state,
    save_optimizer,
    share_of_rank,
)
from internvl_chat.train.checkpoint.run_folder import FORMER, PARTIAL, checkpoint_step, list_checkpoints
from internvl_chat.train.checkpoint.staging import HostBuffers
from internvl_chat.train.checkpoint.state import STATE_FILE, TrainState, read_state_file
from internvl_chat.train.checkpoint.weights import WeightGatherer, local_part
from internvl_chat.train.distributed.strategy import Strategy
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import M3LLMError, TrainingError, UsageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

WriteModel = Callable[[Path, dict[str, Tensor]], None]

OPTIMIZER = "optimizer"
DEEPSPEED = "deepspeed"
_TAG = "state"

# On a CPU the thread rests this many times longer than it works, so that no step takes much longer.
_REST = 4.0
_GPU_THREADS = 4


@dataclass(frozen=True)
class _Job:
    """What one save writes.

    Attributes:
        state: of the run.
        text: of `trainer_state.json`.
        optimizer: the tensors that this rank writes, as they are in training.
        tensors: this rank's parts of optimizer and weights, as they are to be written.
        weights: all of them where the strategy gathers them itself.
        error: why this rank can not take part.
    """

    state: TrainState
    text: str = ""
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] | None = None
    error: Exception | None = None


class Checkpointer:
    """Saves a run, in the background if asked for; as a context it ends when the save under way does.

    All ranks construct it and call its methods at the same step. An error on any rank is logged, leaves the
    earlier checkpoints, and does not stop training.

    Args:
        output: folder of the run.
        strategy: has the model, the optimizer and the scheduler.
        write_model: writes the model, its weights given, and all that belongs to it into a folder.
        fingerprint: what a run that resumes must have in common with this one.
        device: of this rank.
        keep: most checkpoints of the run, the newest and the best among them; None for all.
        model_only: leave out what a run resumes from.
        background: write while training goes on. DeepSpeed always writes in the foreground.
    """

    def __init__(
        self,
        output: Path,
        strategy: Strategy,
        write_model: WriteModel,
        *,
        fingerprint: dict[str, Any],
        device: torch.device,
        keep: int | None,
        model_only: bool,
        background: bool,
    ) -> None:
        self._output, self._strategy, self._write_model = output, strategy, write_model
        self._fingerprint, self._keep, self._model_only = fingerprint, keep, model_only
        self._is_deepspeed, self._is_main = strategy.name == "deepspeed", distributed.rank() == 0
        self._background = background and not self._is_deepspeed
        self._threads = 1 if device.type == "cpu" else _GPU_THREADS
        self._group = distributed.new_host_group()  # of the thread alone
        self._buffers, self._weights = HostBuffers(device), WeightGatherer(strategy.model, self._group)
        self._thread: threading.Thread | None = None
        self._is_awaited = threading.Event()
        self._is_awaited.set()

    @property
    def busy(self) -> bool:
        """Whether this rank's save is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, state: TrainState) -> None:
        """Save a checkpoint of the steps done; returns when the copies for it have begun."""
        self.wait()
        state = replace(state)
        try:
            job, in_background = self._prepare(state)
        except Exception as error:
            job, in_background = _Job(state, error=error), False
        if not in_background:
            self._write(job)
            return
        self._is_awaited.clear()
        # Not a daemon: a process that ends waits for it.
        self._thread = threading.Thread(target=self._write_in_background, args=(job,), name="checkpoint")
        self._thread.start()

    def before_optimizer_step(self) -> None:
        """Let the optimizer, which changes the tensors of a save under way, run after they are copied."""
        self._buffers.block_device()

    def wait(self) -> None:
        """Wait until the save under way, if any, is written; its errors have been logged."""
        self._is_awaited.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def save_model(self, folder: Path) -> None:
        """Write the model as it is now, on rank 0; a collective.

        Raises:
            OSError: it cannot be written; on rank 0 only, as is `SafetensorError`.
        """
        self.wait()
        weights = self._strategy.full_weights()
        if self._is_main:
            self._write_model(folder, weights)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()
        if self._is_main:
            with contextlib.suppress(OSError):
                (self._output / PARTIAL).rmdir()

    def _prepare(self, state: TrainState) -> tuple[_Job, bool]:
        """Return what is to be written, copied if it can be written in the background."""
        strategy, values = self._strategy, state.to_json()
        self._buffers.follow_training()
        if self._is_deepspeed:
            return _Job(state, json.dumps(values), weights=strategy.full_weights()), False
        local, optimizer = self._weights.prepare(), {}
        if not self._model_only:
            tensors, rest = named_state(strategy.model, strategy.optimizer)
            optimizer = share_of_rank(tensors, self._weights.nbytes)
            local |= {key: local_part(tensor) for key, tensor in optimizer.items()}
            values |= {"optimizer": rest, "scheduler": strategy.scheduler.state_dict()}
        in_background = self._background and self._buffers.have_room(local, self._weights.new_bytes)
        copies = self._buffers.copy(local) if in_background else local
        return _Job(state, json.dumps(values), optimizer, copies), in_background

    def _write_in_background(self, job: _Job) -> None:
        try:
            self._write(job)
        except Exception as error:
            # The others are gone: this rank is about to fail as well.
            logger.error("checkpoint-%d was not written: %s", job.state.step, error)

    def _write(self, job: _Job) -> None:
        """Write and publish a checkpoint; a collective that fails on all ranks if it does on one."""
        partial = self._output / PARTIAL / f"checkpoint-{job.state.step}"
        error, entries = job.error, {}
        try:
            self._agree(error)
            with self._buffers.stream():
                entries = self._write_files(partial, job)
        except Exception as failure:
            error = failure
            if not isinstance(error, OSError | SafetensorError | M3LLMError):
                logger.error("%s:", partial, exc_info=error)
        try:
            hashed = self._agree(error, entries)
            if self._is_main:
                self._publish(partial, job.state, dict(ChainMap(*hashed)))
        except Exception as failure:
            if self._is_main:
                self._give_up(partial, failure)
        if self._group is not None:
            dist.barrier(self._group)

    def _agree(self, error: Exception | None, value: Any = None) -> list[Any]:
        """Return the values of all ranks.

        Raises:
            TrainingError: names the first rank that has an error; a rank with one raises that.
        """
        found = [(None if error is None else str(error) or repr(error), value)]
        if self._group is not None:
            own, found = found[0], found * distributed.world_size()
            dist.all_gather_object(found, own, group=self._group)
        if error is not None:
            raise error
        for rank, (problem, _) in enumerate(found):
            if problem is not None:
                raise TrainingError(f"rank {rank}: {problem}")
        return [value for _, value in found]

    def _write_files(self, partial: Path, job: _Job) -> dict[str, FileEntry]:
        """Write this rank's files; returns the entries of those that were hashed meanwhile."""
        self._buffers.synchronize()
        weights = self._weights.gather(job.tensors) if job.weights is None else job.weights
        entries = {}
        if self._is_deepspeed and not self._model_only:
            self._strategy.engine.save_checkpoint(
                str(partial / DEEPSPEED), tag=_TAG, save_latest=False, exclude_frozen_parameters=True
            )
        elif not self._model_only:
            writer = OptimizerWriter(partial / OPTIMIZER, self._threads, self._pause)
            save_optimizer(job.optimizer, job.tensors, writer, self._group)
            entries = {f"{OPTIMIZER}/{name}": entry for name, entry in writer.entries.items()}
        if self._is_main:
            began = time.perf_counter()
            partial.mkdir(parents=True, exist_ok=True)
            self._write_model(partial, weights)
            self._pause(time.perf_counter() - began)
            (partial / STATE_FILE).write_text(job.text + "\n", encoding="utf-8")
            write_fingerprint(partial, self._fingerprint)
        return entries

    def _publish(self, partial: Path, state: TrainState, entries: dict[str, FileEntry]) -> None:
        """Add the manifest, bring everything to the disk, rename the folder, and delete older ones."""
        write_manifest(partial, entries, threads=self._threads, pause=self._pause)
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        final, former = self._output / partial.name, partial.with_name(partial.name + FORMER)
        if final.exists():
            # Saved after the step, and again after the validation at the end of the epoch.
            shutil.rmtree(former, ignore_errors=True)
            final.replace(former)
        partial.replace(final)
        shutil.rmtree(former, ignore_errors=True)
        _sync(self._output)
        checkpoints = list_checkpoints(self._output)
        surplus = len(checkpoints) - self._keep if self._keep else 0
        old = [path for path in checkpoints[:-1] if checkpoint_step(path) != state.best_step]
        for path in old[: max(surplus, 0)]:
            shutil.rmtree(path, ignore_errors=True)

    def _give_up(self, partial: Path, error: Exception) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        older = [path.name for path in list_checkpoints(self._output)]
        logger.error(
            "%s was not written: %s (%.1f GB are free there); %s, and training goes on",
            self._output / partial.name,
            error,
            shutil.disk_usage(self._output).free / 1e9,
            f"{older[-1]} stays the newest" if older else "there is no older one",
        )

    def _pause(self, seconds: float) -> None:
        """Rest after so many seconds of work, if it took them from training and nobody waits."""
        if self._threads == 1:
            self._is_awaited.wait(_REST * seconds)


def _sync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor) if path.is_dir() else drop_from_cache(descriptor)
    finally:
        os.close(descriptor)


def load_training_state(checkpoint: Path, strategy: Strategy) -> TrainState:
    """Load optimizer and scheduler of a checkpoint that any number of ranks has written; a collective.

    The model is loaded from the same checkpoint when it is made.

    Raises:
        UsageError: the checkpoint holds a model only.
        TrainingError: it is of another optimizer or model.
    """
    saved = read_state_file(checkpoint)
    if strategy.name == "deepspeed" and (checkpoint / DEEPSPEED).is_dir():
        folder = str(checkpoint / DEEPSPEED)
        loaded, _ = strategy.engine.load_checkpoint(folder, tag=_TAG, load_module_strict=False)
        if loaded is None:
            raise TrainingError(f"{folder}: DeepSpeed cannot load this state")
    elif "optimizer" in saved:
        folder = checkpoint / OPTIMIZER
        load_optimizer(folder, strategy.model, strategy.optimizer, saved["optimizer"])
        strategy.scheduler.load_state_dict(saved["scheduler"])
    else:
        raise UsageError(f"{checkpoint}: holds no optimizer state to resume from (--save_only_model)")
    return TrainState.from_json(saved)

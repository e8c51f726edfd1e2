"""Save checkpoints: each rank writes in a background thread while training continues.

A checkpoint is written under `.partial` and moved to the output folder when it is complete. It contains:
- the model files (see `model_files`),
- the optimizer state (`optimizer/` or `deepspeed/`) and the training progress (`trainer_state.json`),
- the fingerprint of the run, and a manifest with the hash of every file.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import threading
from collections import ChainMap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar, cast

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from internvl_chat.train.checkpoint.best import find_best
from internvl_chat.train.checkpoint.fingerprint import FINGERPRINT
from internvl_chat.train.checkpoint.manifest import write_manifest
from internvl_chat.train.checkpoint.optimizer_state import (
    load_optimizer,
    named_state,
    save_optimizer,
    tensors_to_write,
)
from internvl_chat.train.checkpoint.run_folder import PARTIAL, list_checkpoints
from internvl_chat.train.checkpoint.staging import HostBuffers
from internvl_chat.train.checkpoint.state import STATE_FILE, TrainState, read_state_file
from internvl_chat.train.checkpoint.weights import WeightGatherer
from internvl_chat.train.distributed.deepspeed import DeepSpeedStrategy, save_engine
from internvl_chat.train.distributed.strategy import Strategy, local_shard
from internvl_chat.train.optim.factory import move_schedule
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import M3LLMError, TrainingError
from internvl_chat.utils.files import write_json
from internvl_chat.utils.hashed_file import FileEntry, drop_from_cache
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

T = TypeVar("T")
WriteModel = Callable[[Path, dict[str, Tensor]], dict[str, FileEntry]]
WriteFiles = Callable[[Path], dict[str, FileEntry]]

OPTIMIZER = "optimizer"
DEEPSPEED = "deepspeed"
_TAG = "state"
# Optimizer options that come from the flags of this run, not from the checkpoint.
_OPTIONS = ("lr", "initial_lr", "betas", "eps", "weight_decay")

# On a CPU, the background thread competes with training for cores. With this niceness, it gets a third of a
# normal share.
_NICENESS = 5
_GPU_THREADS = 4


class Checkpointer:
    """Saves checkpoints; as a context manager, waits for the current save at exit.

    Call the constructor and all methods on all ranks at the same step. If saving fails on any rank, the error
    is logged, earlier checkpoints stay intact, and training continues.

    Args:
        write_model: function from `checkpoint_writer`.
        keep: maximum number of checkpoints, including the newest and the best; None to keep all.
        model_only: do not save the optimizer state.
        background: write while training continues. DeepSpeed always writes in the foreground.

    Attributes:
        failure: why the last save failed; None on all ranks if it succeeded. Call `wait` before reading it.
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
        self._deepspeed = cast(DeepSpeedStrategy, strategy) if strategy.name == "deepspeed" else None
        self._is_main = distributed.rank() == 0
        self._background = background and self._deepspeed is None
        self._device, self._threads = device, 1 if device.type == "cpu" else _GPU_THREADS
        self._group = distributed.new_host_group()  # used by one thread at a time
        self._buffers, self._weights = HostBuffers(device), WeightGatherer(strategy.model, self._group)
        self._thread: threading.Thread | None = None
        self.failure: str | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing a checkpoint."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, state: TrainState) -> None:
        """Save a checkpoint; a background save returns as soon as the copies to host memory are launched."""
        self.wait()
        try:
            write_files, in_background = self._prepare(state)
        except Exception as error:
            write_files, in_background = partial(_fail, error), False
        write = partial(self._write, state.step, write_files)
        if not in_background:
            write()
            return
        # Not a daemon thread, so that the process waits for it at exit.
        self._thread = threading.Thread(target=self._run_thread, args=(write,), name="checkpoint")
        self._thread.start()

    def _run_thread(self, write: Callable[[], None]) -> None:
        # On Linux, niceness applies to a thread and the threads it starts; elsewhere, to the whole process.
        if self._device.type == "cpu" and sys.platform == "linux":
            thread = threading.get_native_id()
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)
        write()

    def before_optimizer_step(self) -> None:
        """Make the GPU finish copying the tensors of the current save before the optimizer changes them."""
        self._buffers.block_current_stream()

    def wait(self) -> None:
        """Wait for the current save, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def save_model(self, folder: Path) -> None:
        """Write the current model on rank 0. Collective: call on all ranks.

        Raises:
            OSError: rank 0 cannot write the model.
        """
        self.wait()
        weights = (
            self._deepspeed.full_weights()
            if self._deepspeed
            else self._weights.gather(self._weights.prepare())
        )
        if self._is_main:
            self._write_model(folder, weights)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        if self._is_main:
            with contextlib.suppress(OSError):
                (self._output / PARTIAL).rmdir()

    def _prepare(self, state: TrainState) -> tuple[WriteFiles, bool]:
        """Copy the state; return a function that writes it, and whether to run it in the background."""
        strategy, values = self._strategy, state.to_json()
        self._buffers.wait_for_training()
        if self._deepspeed:
            write = partial(self._write_deepspeed, self._deepspeed.engine)
            return partial(write, json.dumps(values), self._deepspeed.full_weights()), False
        local, optimizer = self._weights.prepare(), {}
        if not self._model_only:
            tensors, rest = named_state(strategy.model, strategy.optimizer)
            optimizer = tensors_to_write(tensors, self._weights.nbytes)
            local |= {key: local_shard(tensor) for key, tensor in optimizer.items()}
            values |= {"optimizer": rest, "scheduler": strategy.scheduler.state_dict()}
        in_background = self._background and self._buffers.fit(local)
        copies = self._buffers.copy(local) if in_background else local
        text = json.dumps(values, default=_number)
        return partial(self._write_files, text, optimizer, copies), in_background

    def _write(self, step: int, write_files: WriteFiles) -> None:
        """Write and publish a checkpoint. Collective: it fails on all ranks or on none."""
        folder = self._output / PARTIAL / f"checkpoint-{step}"
        try:
            hashed = self._run_stage(lambda: write_files(folder))
            entries = dict(ChainMap(*hashed))
            self._run_stage(lambda: self._publish(folder, entries) if self._is_main else None)
            self.failure = None
        except Exception as error:
            self.failure = str(error)
            if self._is_main:
                self.failure = self._discard(folder, error)

    def _run_stage(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on this rank; return the results of all ranks. Collective: call on all ranks.

        Raises:
            AgreedError: `work` failed on at least one rank.
        """
        result, error = None, None
        try:
            result = work()
        except distributed.AgreedError:
            raise  # the other ranks have this error, too
        except Exception as failure:
            error = failure
            if not isinstance(error, OSError | M3LLMError):
                logger.error("cannot write the checkpoint:", exc_info=error)
        return distributed.agree(error, result, group=self._group)

    def _write_files(
        self, text: str, optimizer: dict[str, Tensor], copies: dict[str, Tensor], folder: Path
    ) -> dict[str, FileEntry]:
        """Write this rank's files; return the manifest entries of those that were hashed while written.

        Args:
            text: content of `trainer_state.json`.
            optimizer: live optimizer tensors that this rank writes.
            copies: local shards of the optimizer state and the weights; copies in host memory if the save
                runs in the background.
        """
        distributed.set_device(self._device)
        with self._buffers.stream():
            self._buffers.synchronize()
            distributed.agree(None, group=self._group)
            weights = self._weights.gather(copies)
            entries = {}
            if not self._model_only:
                written = save_optimizer(
                    folder / OPTIMIZER, optimizer, copies, threads=self._threads, group=self._group
                )
                entries = {f"{OPTIMIZER}/{name}": entry for name, entry in written.items()}
            return entries | self._write_model_files(text, weights, folder)

    def _write_deepspeed(
        self, engine: Any, text: str, weights: dict[str, Tensor], folder: Path
    ) -> dict[str, FileEntry]:
        """Write this rank's files; return the manifest entries of the model files (on rank 0)."""

        def write() -> dict[str, FileEntry]:
            (folder / DEEPSPEED / _TAG).mkdir(parents=True, exist_ok=True)
            return self._write_model_files(text, weights, folder)

        if self._model_only:
            return self._write_model_files(text, weights, folder)
        # Fail on all ranks if rank 0 fails; otherwise the others would wait for it inside DeepSpeed.
        entries, *_ = self._run_stage(write)
        save_engine(engine, folder / DEEPSPEED, _TAG)
        return entries

    def _write_model_files(self, text: str, weights: dict[str, Tensor], folder: Path) -> dict[str, FileEntry]:
        """Write model, training progress and fingerprint on rank 0; return manifest entries of the model."""
        if not self._is_main:
            return {}
        folder.mkdir(parents=True, exist_ok=True)
        entries = self._write_model(folder, weights)
        (folder / STATE_FILE).write_text(text + "\n", encoding="utf-8")
        write_json(folder / FINGERPRINT, self._fingerprint)
        return entries

    def _publish(self, folder: Path, entries: dict[str, FileEntry]) -> None:
        """Write the manifest, sync all files, move the folder into place, and delete surplus checkpoints."""
        write_manifest(folder, entries, threads=self._threads)
        for path in [*folder.rglob("*"), folder]:
            _sync(path)
        # Fails if the checkpoint exists; the loop saves each step once.
        folder.replace(self._output / folder.name)
        _sync(self._output)
        checkpoints, best = list_checkpoints(self._output), find_best(self._output)
        surplus = len(checkpoints) - self._keep if self._keep else 0
        old = [path for path in checkpoints[:-1] if path != best]
        for path in old[: max(surplus, 0)]:
            shutil.rmtree(path, ignore_errors=True)

    def _discard(self, folder: Path, error: Exception) -> str:
        """Delete an incomplete checkpoint; log and return why it could not be written."""
        shutil.rmtree(folder, ignore_errors=True)
        newest, free = "unknown", "unknown"
        with contextlib.suppress(OSError):  # the disk itself may be gone
            free = f"{shutil.disk_usage(self._output).free / 1e9:.1f} GB"
            newest = next((path.name for path in reversed(list_checkpoints(self._output))), "none")
        failure = (
            f"{self._output / folder.name} was not written: {error} (free space: {free}); "
            f"the newest checkpoint is {newest}"
        )
        logger.error("%s", failure)
        return failure


def _number(value: Any) -> float:
    """Convert a one-element tensor to a number for JSON, because torchao's learning rates are tensors."""
    if isinstance(value, Tensor):
        return value.item()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _fail(error: Exception, _: Path) -> NoReturn:
    raise error


def _sync(path: Path) -> None:
    """Sync a file or directory to disk; a file is also dropped from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor) if path.is_dir() else drop_from_cache(descriptor)
    finally:
        os.close(descriptor)


def has_optimizer_state(checkpoint: Path) -> bool:
    """Return whether a checkpoint contains optimizer state (saved without `--save_only_model`)."""
    return (checkpoint / DEEPSPEED).is_dir() or "optimizer" in read_state_file(checkpoint)


def load_training_state(checkpoint: Path, strategy: Strategy) -> TrainState:
    """Load the optimizer state of a checkpoint, if it has any; return the training progress.

    The weights are loaded by `load_for_training`. The learning rate follows the schedule of this run. Except
    with DeepSpeed, the number of ranks may differ from that of the run that saved the state.

    Collective: call on all ranks.

    Raises:
        TrainingError: the state cannot be read, or does not match the optimizer or model of this run.
    """
    saved = read_state_file(checkpoint)
    state = TrainState.from_json(saved)
    options = [{key: group[key] for key in _OPTIONS if key in group} for group in _groups(strategy)]
    if strategy.name == "deepspeed" and (checkpoint / DEEPSPEED).is_dir():
        folder = checkpoint / DEEPSPEED
        engine = cast(DeepSpeedStrategy, strategy).engine
        loaded, _ = engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
        if loaded is None:
            raise TrainingError(f"{folder}: DeepSpeed cannot load this state")
    elif "optimizer" in saved:
        load_optimizer(checkpoint / OPTIMIZER, strategy.model, strategy.optimizer, saved["optimizer"])
    for group, values in zip(_groups(strategy), options, strict=True):
        group.update(values)
    if isinstance(strategy.scheduler, LambdaLR):  # DeepSpeed's own schedulers load their state
        _report_change(move_schedule(strategy.scheduler, state.step), state.step + 1, saved)
    return state


def _groups(strategy: Strategy) -> list[dict[str, Any]]:
    return strategy.optimizer.param_groups


def _report_change(rate: float, step: int, saved: dict[str, Any]) -> None:
    """Warn if the learning rate of the next step differs from the one in the checkpoint."""
    before = saved.get("scheduler", {}).get("_last_lr", [rate])[0]
    if not math.isclose(rate, before, rel_tol=1e-9):
        logger.warning(
            "learning rate at step %d: %g (%g in the schedule of the checkpoint)", step, rate, before
        )

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
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch import distributed as dist

from internvl_chat.train.checkpoint.best import find_best
from internvl_chat.train.checkpoint.fingerprint import write_fingerprint
from internvl_chat.train.checkpoint.manifest import write_manifest
from internvl_chat.train.checkpoint.optimizer_state import (
    load_optimizer,
    named_state,
    save_optimizer,
    share_of_rank,
)
from internvl_chat.train.checkpoint.run_folder import FORMER, PARTIAL, list_checkpoints
from internvl_chat.train.checkpoint.staging import HostBuffers
from internvl_chat.train.checkpoint.state import STATE_FILE, TrainState, read_state_file
from internvl_chat.train.checkpoint.weights import WeightGatherer, local_part
from internvl_chat.train.distributed.deepspeed import save_engine
from internvl_chat.train.distributed.strategy import Strategy
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import M3LLMError, TrainingError, UsageError
from internvl_chat.utils.hashed_file import FileEntry, drop_from_cache
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

WriteModel = Callable[[Path, dict[str, Tensor]], dict[str, FileEntry]]
WriteFiles = Callable[[Path], dict[str, FileEntry]]

OPTIMIZER = "optimizer"
DEEPSPEED = "deepspeed"
_TAG = "state"

# On a CPU the thread rests this many times longer than it works, so that no step takes much longer.
_REST = 4.0
_GPU_THREADS = 4


class Checkpointer:
    """Saves a run, in the background if asked for; as a context it ends when the save under way does.

    All ranks construct it and call its methods at the same step. An error on any rank is logged, leaves the
    earlier checkpoints, and does not stop training.

    Args:
        output: folder of the run.
        strategy: has the model, the optimizer and the scheduler.
        write_model: writes the model, its weights given, and all that belongs to it into a folder; returns
            the entries of the files that it has hashed.
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
        self._device, self._rests = device, device.type == "cpu"
        self._threads = 1 if self._rests else _GPU_THREADS
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
        write_files, in_background, error = None, False, None
        try:
            write_files, in_background = self._prepare(state)
        except Exception as failure:
            error = failure
        write = partial(self._write, state.step, write_files, error)
        if not in_background:
            write()
            return
        self._is_awaited.clear()
        # Not a daemon: a process that ends waits for it.
        self._thread = threading.Thread(target=write, name="checkpoint")
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
            OSError: it cannot be written; on rank 0 only.
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

    def _prepare(self, state: TrainState) -> tuple[WriteFiles, bool]:
        """Copy the state; returns what writes it, and whether that can be in the background."""
        strategy, values = self._strategy, state.to_json()
        self._buffers.follow_training()
        if self._is_deepspeed:
            weights = strategy.full_weights()
            return partial(self._write_deepspeed, json.dumps(values), weights), False
        local, optimizer = self._weights.prepare(), {}
        if not self._model_only:
            tensors, rest = named_state(strategy.model, strategy.optimizer)
            optimizer = share_of_rank(tensors, self._weights.nbytes)
            local |= {key: local_part(tensor) for key, tensor in optimizer.items()}
            values |= {"optimizer": rest, "scheduler": strategy.scheduler.state_dict()}
        in_background = self._background and self._buffers.have_room(local)
        copies = self._buffers.copy(local) if in_background else local
        return partial(self._write_files, json.dumps(values), optimizer, copies), in_background

    def _write(self, step: int, write_files: WriteFiles | None, error: Exception | None) -> None:
        """Write and publish a checkpoint; a collective that fails on all ranks if it does on one."""
        distributed.set_device(self._device)
        partial_folder, entries = self._output / PARTIAL / f"checkpoint-{step}", {}
        try:
            self._agree(error)
            with self._buffers.stream():
                entries = write_files(partial_folder)
        except Exception as failure:
            error = failure
            if not isinstance(error, OSError | M3LLMError):
                logger.error("%s:", partial_folder, exc_info=error)
        try:
            hashed = self._agree(error, entries)
            if self._is_main:
                self._publish(partial_folder, dict(ChainMap(*hashed)))
        except Exception as failure:
            if self._is_main:
                self._give_up(partial_folder, failure)
        # Where it fails another rank has ended, and training is about to fail as well.
        with contextlib.suppress(RuntimeError):
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

    def _write_files(
        self, text: str, optimizer: dict[str, Tensor], copies: dict[str, Tensor], folder: Path
    ) -> dict[str, FileEntry]:
        """Write this rank's files; returns the entries of those that were hashed meanwhile.

        `text` is of `trainer_state.json`, `optimizer` has the live tensors that this rank writes, and
        `copies` its parts of optimizer and weights.
        """
        self._buffers.synchronize()
        weights = self._weights.gather(copies)
        entries = {}
        if not self._model_only:
            options = {"threads": self._threads, "pause": self._pause, "group": self._group}
            written = save_optimizer(folder / OPTIMIZER, optimizer, copies, **options)
            entries = {f"{OPTIMIZER}/{name}": entry for name, entry in written.items()}
        return entries | self._write_model_files(text, weights, folder)

    def _write_deepspeed(self, text: str, weights: dict[str, Tensor], folder: Path) -> dict[str, FileEntry]:
        """Write this rank's files; no rank waits within DeepSpeed for a rank 0 that has failed."""
        entries, error = {}, None
        try:
            entries = self._write_model_files(text, weights, folder)
        except Exception as failure:
            error = failure
        self._agree(error)
        if not self._model_only:
            save_engine(self._strategy.engine, folder / DEEPSPEED, _TAG)
        return entries

    def _write_model_files(self, text: str, weights: dict[str, Tensor], folder: Path) -> dict[str, FileEntry]:
        """Write what does not depend on the layout, on rank 0; returns what was hashed meanwhile."""
        if not self._is_main:
            return {}
        began = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        entries = self._write_model(folder, weights)
        self._pause(time.perf_counter() - began)
        (folder / STATE_FILE).write_text(text + "\n", encoding="utf-8")
        write_fingerprint(folder, self._fingerprint)
        return entries

    def _publish(self, folder: Path, entries: dict[str, FileEntry]) -> None:
        """Add the manifest, sync everything to the disk, rename the folder, and delete older checkpoints."""
        write_manifest(folder, entries, threads=self._threads, pause=self._pause)
        for path in [*folder.rglob("*"), folder]:
            _sync(path)
        final, former = self._output / folder.name, folder.with_name(folder.name + FORMER)
        if final.exists():
            # Saved after the step, and again after the validation at the end of the epoch.
            shutil.rmtree(former, ignore_errors=True)
            final.replace(former)
        folder.replace(final)
        shutil.rmtree(former, ignore_errors=True)
        _sync(self._output)
        checkpoints, best = list_checkpoints(self._output), find_best(self._output)
        surplus = len(checkpoints) - self._keep if self._keep else 0
        old = [path for path in checkpoints[:-1] if path != best]
        for path in old[: max(surplus, 0)]:
            shutil.rmtree(path, ignore_errors=True)

    def _give_up(self, folder: Path, error: Exception) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        older = [path.name for path in list_checkpoints(self._output)]
        logger.error(
            "%s was not written: %s (%.1f GB are free there); %s, and training goes on",
            self._output / folder.name,
            error,
            shutil.disk_usage(self._output).free / 1e9,
            f"{older[-1]} stays the newest" if older else "there is no older one",
        )

    def _pause(self, seconds: float) -> None:
        """Rest after so many seconds of work, if it took them from training and nobody waits."""
        if self._rests:
            self._is_awaited.wait(_REST * seconds)


def _sync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor) if path.is_dir() else drop_from_cache(descriptor)
    finally:
        os.close(descriptor)


def check_resumable(checkpoint: Path) -> None:
    """Check that a checkpoint holds more than a model.

    Raises:
        UsageError: there is no optimizer state.
    """
    if not (checkpoint / DEEPSPEED).is_dir() and "optimizer" not in read_state_file(checkpoint):
        raise UsageError(f"{checkpoint}: holds no optimizer state to resume from (--save_only_model)")


def load_training_state(checkpoint: Path, strategy: Strategy) -> TrainState:
    """Load optimizer and scheduler of a checkpoint that any number of ranks has written; a collective.

    The model is loaded from the same checkpoint when it is made.

    Raises:
        TrainingError: the state is of another optimizer or model.
    """
    saved = read_state_file(checkpoint)
    if strategy.name == "deepspeed" and (checkpoint / DEEPSPEED).is_dir():
        folder = str(checkpoint / DEEPSPEED)
        loaded, _ = strategy.engine.load_checkpoint(folder, tag=_TAG, load_module_strict=False)
        if loaded is None:
            raise TrainingError(f"{folder}: DeepSpeed cannot load this state")
    else:
        folder = checkpoint / OPTIMIZER
        load_optimizer(folder, strategy.model, strategy.optimizer, saved["optimizer"])
        strategy.scheduler.load_state_dict(saved["scheduler"])
    return TrainState.from_json(saved)

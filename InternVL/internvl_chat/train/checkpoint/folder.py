"""The folder of a checkpoint, written beside the others under `.partial` and named when it is whole.

Names and formats of the files are those that transformers resumes from.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from internvl_chat.train.checkpoint.fingerprint import write_fingerprint
from internvl_chat.train.checkpoint.manifest import write_manifest
from internvl_chat.train.checkpoint.quiet_file import QuietFile
from internvl_chat.train.checkpoint.run_folder import FORMER, PARTIAL, list_checkpoints
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)


SaveModel = Callable[[Path, dict[str, torch.Tensor] | None], None]


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint in the making.

    Attributes:
        output: folder of the run.
        step: optimizer steps done.
        fingerprint: what a run that resumes must have in common.
        keep: most checkpoints of the run; None for all.
        best: a checkpoint that is never deleted.
    """

    output: Path
    step: int
    fingerprint: dict[str, Any]
    keep: int | None
    best: str | None

    @property
    def partial(self) -> Path:
        """Where it is written."""
        return self.output / PARTIAL / self.final.name

    @property
    def final(self) -> Path:
        """Where it is once it is whole."""
        return self.output / f"checkpoint-{self.step}"

    def publish(self) -> None:
        """Add fingerprint and manifest, bring all to the disk, name the folder, and delete older ones."""
        write_fingerprint(self.partial, self.fingerprint)
        write_manifest(self.partial)
        for path in [*self.partial.rglob("*"), self.partial]:
            _bring_to_disk(path)
        if self.final.exists():
            # Saved after the step, and once more after the validation at the end of the epoch.
            former = self.partial.with_name(self.final.name + FORMER)
            shutil.rmtree(former, ignore_errors=True)
            self.final.replace(former)
        self.partial.replace(self.final)
        shutil.rmtree(self.partial.with_name(self.final.name + FORMER), ignore_errors=True)
        _bring_to_disk(self.output)
        rotate_checkpoints(str(self.output), self.keep, self.best)

    @contextlib.contextmanager
    def failures(self) -> Iterator[list[Exception]]:
        """Give a list that gets what fails; then nothing is left of this checkpoint, and training goes on."""
        failed: list[Exception] = []
        try:
            yield failed
        except Exception as error:
            failed.append(error)
            shutil.rmtree(self.partial, ignore_errors=True)
            older = [path.name for path in list_checkpoints(self.output)]
            stays = f"{older[-1]} stays the newest" if older else "there is no older one"
            logger.error(
                "%s was not written: %s (%.1f GB are free there); %s, and training goes on",
                self.final, error, shutil.disk_usage(self.output).free / 1e9, stays,
            )  # fmt: skip


@dataclass(frozen=True)
class CheckpointFiles:
    """Writes what a checkpoint holds; the small values in it are as they were at the end of the step.

    Attributes:
        folder: where to.
        save_model_to: writes the model and what belongs to it.
        scheduler: state of the learning rate's scheduler; None to write the model only.
        state: of the trainer.
        pause: of `QuietFile`.
    """

    folder: CheckpointFolder
    save_model_to: SaveModel
    scheduler: dict[str, Any] | None
    state: TrainerState
    pause: Callable[[float], None]

    def write(self, tensors: dict[str, Any]) -> None:
        """Write all files, or report why that failed and leave nothing.

        Args:
            tensors: `weights`, and the `optimizer`'s state.
        """
        partial = self.folder.partial
        with self.folder.failures():
            partial.mkdir(parents=True, exist_ok=True)
            if self.scheduler is not None:
                with _without_checksum(), QuietFile(partial / OPTIMIZER_NAME, self.pause) as file:
                    torch.save(tensors["optimizer"], file)
                torch.save(self.scheduler, partial / SCHEDULER_NAME)
            self.save_model_to(partial, tensors["weights"])
            # As TrainerState.save_to_json, whose indented form takes seconds once the log is long.
            text = json.dumps(vars(self.state), sort_keys=True)
            (partial / TRAINER_STATE_NAME).write_text(text + "\n", encoding="utf-8")
            self.folder.publish()


@contextlib.contextmanager
def _without_checksum() -> Iterator[None]:
    """Let `torch.save` leave out what takes five times the processor time of all else, and nobody reads."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _bring_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, would outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

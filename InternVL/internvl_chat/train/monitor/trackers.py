"""Experiment trackers from accelerate, such as W&B and TensorBoard. A failing tracker never ends a run."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType, clear_environment

from internvl_chat.utils.distributed import rank
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

_MAX_FAILURES = 3
_PROJECT = "m3llm"
# Environment variables with the project name. For mlflow and clearml, accelerate reads them itself.
_PROJECT_VARIABLES = {
    "wandb": "WANDB_PROJECT",
    "comet_ml": "COMET_PROJECT_NAME",
    "swanlab": "SWANLAB_PROJECT",
}
# Tracker -> option of accelerate's tracker class that sets the run name.
_RUN_NAME_OPTIONS = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name",
                     "clearml": "task_name"}  # fmt: skip


def available_trackers() -> list[str]:
    """Return the names of the trackers whose package is installed."""
    installed, known = set(map(str, get_available_trackers())), LoggerType.list()
    return [name for name in LOGGER_TYPE_TO_CLASS if name in installed or name not in known]


def tracker_problems(names: Sequence[str]) -> Iterator[str]:
    """Yield an error message for each name in `--report_to` that is unknown or not installed."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            yield f"--report_to {name}: unknown; use none or {', '.join(LOGGER_TYPE_TO_CLASS)}"
        elif name not in available_trackers():
            yield f"--report_to {name}: not installed (pip install {name.replace('_', '-')})"


class Trackers:
    """Trackers of a run. Failures are logged; after three failures, a tracker is dropped."""

    def __init__(self, trackers: Sequence[GeneralTracker]) -> None:
        self._failures = dict.fromkeys(trackers, 0)

    @classmethod
    def start(
        cls, names: Sequence[str], *, run_name: str | None, folder: Path | str, config: Mapping[str, Any]
    ) -> "Trackers":
        """Start trackers by name, on rank 0 only.

        Args:
            names: names from `available_trackers`.
            run_name: name of the run; None to use the name of its folder.
        """
        started = []
        for name in names if rank() == 0 else ():
            try:
                started.append(_start(name, run_name or Path(folder).name, Path(folder), config))
            except Exception as error:
                logger.warning("%s cannot be started (%s: %s)", name, type(error).__name__, error)
        return cls(started)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log the numeric values of a step."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._call("log", numbers, step=step)

    def finish(self) -> None:
        """Finish all trackers."""
        self._call("finish")

    def _call(self, method: str, *args: Any, **options: Any) -> None:
        for tracker, failures in list(self._failures.items()):
            try:
                getattr(tracker, method)(*args, **options)
            except Exception as error:
                self._failures[tracker] = failures + 1
                end = ""
                if failures + 1 == _MAX_FAILURES:
                    del self._failures[tracker]
                    end = " without this tracker"
                logger.warning(
                    "%s failed (%s: %s); training continues%s", tracker.name, type(error).__name__, error, end
                )


def _start(name: str, run_name: str, folder: Path, config: Mapping[str, Any]) -> GeneralTracker:
    # accelerate's trackers need its global state. With an empty environment, accelerate does not create a
    # process group, select a device or set the number of threads.
    with clear_environment():
        PartialState(cpu=True)
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    if tracker_class.requires_logging_directory:
        logging_dir = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(folder / "runs")
        tracker = tracker_class(run_name, logging_dir)
    else:
        project = os.environ.get(_PROJECT_VARIABLES.get(name, ""), _PROJECT)
        options = {_RUN_NAME_OPTIONS[name]: run_name} if name in _RUN_NAME_OPTIONS else {}
        tracker = tracker_class(project, **options)
    tracker.start()
    tracker.store_init_configuration(dict(_flatten(config)))
    return tracker


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, value) pairs of a nested dict, with slash-separated names and other types as text."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value if isinstance(value, bool | int | float | str) else str(value)

"""Trackers log numbers on rank 0; a failing tracker does not end the run and is dropped."""

import math
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from helpers import HANG_SECONDS

from internvl_chat.train.monitor.trackers import Trackers, available_trackers, tracker_problems

STARTED = []


class Fake(GeneralTracker):
    """Records its calls; fails in the methods listed in `failing`."""

    name = "fake"
    requires_logging_directory = False
    failing: tuple[str, ...] = ()
    error: type[BaseException] = ConnectionError

    def __init__(self, run_name, **options):
        super().__init__()
        self.arguments, self.calls = (run_name, options), []
        self.call("__init__")

    def call(self, method, *arguments):
        self.calls.append((method, *arguments))
        if method in self.failing:
            raise self.error("the server is away")

    @property
    def tracker(self):
        return self

    def start(self):
        STARTED.append(self)
        self.call("start")

    def store_init_configuration(self, values):
        self.call("store_init_configuration", values)

    def log(self, values, step=None, **_):
        self.call("log", values, step)

    def finish(self):
        self.call("finish")


@pytest.fixture
def fake(monkeypatch):
    """Register a fake tracker in accelerate and replace W&B with it."""
    STARTED.clear()
    cls = type("Fake", (Fake,), {})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "fake", cls)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", cls)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return cls


def start(*names, run_name="lora-1", folder="out", **config):
    return Trackers.start(names, run_name=run_name, folder=folder, config=config)


def test_numbers_and_configuration_are_logged(fake):
    trackers = start("fake", model={"attn": "auto", "lora": {"rank": 16}}, seed=3, packing=True, path=None)
    trackers.log({"loss": 1.5, "step": 2, "norm": math.inf, "skipped_because": "the loss is nan"}, 2)
    trackers.finish()
    (tracker,) = STARTED
    flat = {"model/attn": "auto", "model/lora/rank": 16, "seed": 3, "packing": True, "path": "None"}
    assert tracker.calls == [
        ("__init__",),
        ("start",),
        ("store_init_configuration", flat),
        ("log", {"loss": 1.5, "step": 2, "norm": math.inf}, 2),
        ("finish",),
    ]


@pytest.mark.parametrize(("variable", "project"), [(None, "m3llm"), ("figures", "figures")])
def test_wandb_gets_project_and_run_name(fake, monkeypatch, variable, project):
    if variable:
        monkeypatch.setenv("WANDB_PROJECT", variable)
    start("wandb")
    start("wandb", run_name=None, folder="work_dirs/full-2")
    assert [one.arguments for one in STARTED] == [
        (project, {"name": "lora-1"}),
        (project, {"name": "full-2"}),
    ]


@pytest.mark.parametrize("method", ["__init__", "start", "store_init_configuration"])
def test_a_tracker_that_cannot_start_is_reported(fake, caplog, method):
    fake.failing = (method,)
    trackers = start("fake")
    trackers.log({"loss": 1.0}, 1)
    trackers.finish()
    assert "fake cannot be started (ConnectionError: the server is away)" in caplog.text
    assert not any(call[0] in ("log", "finish") for one in STARTED for call in one.calls)


def test_after_three_failures_a_tracker_is_dropped(fake, caplog):
    fake.failing = ("log",)
    trackers = start("fake", "fake")
    STARTED[1].failing = ()
    for step in range(5):
        trackers.log({"loss": 1.0}, step)
    trackers.finish()
    assert [len([call for call in one.calls if call[0] == "log"]) for one in STARTED] == [3, 5]
    assert ("finish",) not in STARTED[0].calls and ("finish",) in STARTED[1].calls
    assert caplog.text.count("fake failed (ConnectionError: the server is away); training continues") == 3
    assert caplog.text.count("training continues without this tracker") == 1


def test_a_tracker_that_cannot_finish_is_reported(fake, caplog):
    fake.failing = ("finish",)
    start("fake").finish()
    assert "fake failed (ConnectionError: the server is away)" in caplog.text


def test_keyboard_interrupts_are_not_failures(fake):
    fake.failing, fake.error = ("log",), KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        start("fake").log({"loss": 1.0}, 1)


def test_other_ranks_start_nothing(fake, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    start("fake").log({"loss": 1.0}, 1)
    assert not STARTED


def test_unknown_and_missing_trackers(monkeypatch):
    monkeypatch.setattr("internvl_chat.train.monitor.trackers.get_available_trackers", lambda: ["wandb"])
    unknown, missing = tracker_problems(["carrier-pigeon", "comet_ml", "wandb"])
    assert unknown.startswith("--report_to carrier-pigeon: unknown; use none or ") and "wandb" in unknown
    assert missing == "--report_to comet_ml: not installed (pip install comet-ml)"


def test_available_trackers_match_accelerate(fake):
    assert set(available_trackers()) == {str(name) for name in get_available_trackers()} | {"fake"}


PROCESS = """
import os, torch
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from internvl_chat.train.monitor.trackers import Trackers

class Fake(GeneralTracker):
    name, requires_logging_directory, tracker = "fake", False, None
    def __init__(self, run_name):
        super().__init__()

LOGGER_TYPE_TO_CLASS["fake"] = Fake
before = dict(os.environ), torch.get_num_threads()
Trackers.start(["fake"], run_name=None, folder="out", config={}).log({"loss": 1.0}, 1)
assert (dict(os.environ), torch.get_num_threads()) == before
assert not torch.distributed.is_initialized() and PartialState().is_main_process
"""


def test_accelerate_does_not_configure_the_process():
    """accelerate sets up no process group, threads or environment variables on rank 0 of two."""
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere"}
    environment.pop("OMP_NUM_THREADS", None)
    result = subprocess.run(
        [sys.executable, "-c", PROCESS], env=environment, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert result.returncode == 0, result.stderr
    assert "cannot be started" not in result.stderr


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_writes_into_the_folder_of_the_run(tmp_path, monkeypatch, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    trackers = start("tensorboard", folder=tmp_path, model={"attn": None}, seed=3)
    for step in (1, 2):
        trackers.log({"train/loss": 0.5 * step}, step)
    trackers.finish()
    assert not caplog.records
    events = EventAccumulator(str(tmp_path / "runs/lora-1")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("train/loss")] == [(1, 0.5), (2, 1.0)]


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_without_a_network(tmp_path, monkeypatch, caplog):
    """The real package, disabled by its environment variable."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trackers = start("wandb", seed=3)
    trackers.log({"train/loss": 0.5}, 1)
    trackers.finish()
    assert not [record for record in caplog.records if record.name.startswith("internvl_chat")]

"""A reporting service that fails does not end the run, and is left alone in the end."""

import pytest
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from internvl_chat.train.monitor.trackers import ShieldedCallback, shield_reports


class Service(TrainerCallback):
    def __init__(self):
        self.calls = []

    def on_log(self, args, state, control, logs=None, **_):
        self.calls.append(logs)
        if logs is None:
            raise ConnectionError("the server is away")
        return control


def test_events_are_passed_on_with_their_answers():
    service = Service()
    shielded = ShieldedCallback(service)
    assert shielded.on_log("args", "state", "control", logs={"loss": 1}) == "control"
    assert service.calls == [{"loss": 1}]
    assert shielded.on_epoch_end("args", "state", "control") is None


def test_failures_are_told_and_after_three_it_is_left_alone(caplog):
    service = Service()
    shielded = ShieldedCallback(service)
    for _ in range(5):
        assert shielded.on_log("args", "state", "control") is None
    assert len(service.calls) == 3
    assert caplog.text.count("Service failed (ConnectionError: the server is away); training goes on") == 3
    assert caplog.text.count("it gets no more reports") == 1


def test_keyboard_interrupts_are_no_failures():
    class Interrupted(TrainerCallback):
        def on_log(self, *_, **__):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ShieldedCallback(Interrupted()).on_log(None, None, None)


def test_services_are_shielded_and_nothing_else():
    flow, service = DefaultFlowCallback(), TensorBoardCallback.__new__(TensorBoardCallback)
    handler = CallbackHandler([], None, None, None, None)
    handler.callbacks = [flow, service]
    shield_reports(handler)
    assert handler.callbacks[0] is flow
    assert isinstance(handler.callbacks[1], ShieldedCallback) and handler.callbacks[1].callback is service


def test_every_event_of_transformers_is_known():
    events = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    assert events and all(
        getattr(ShieldedCallback, name) is not getattr(TrainerCallback, name) for name in events
    )

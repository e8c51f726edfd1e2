"""Process groups: which device and which timeout they have."""

from datetime import timedelta

import pytest
import torch
from torch import distributed as dist

from internvl_chat.utils import distributed

TIMEOUT = timedelta(seconds=77)


@pytest.fixture
def world(monkeypatch):
    """A process group of one rank, as `init_process_group` makes it for several."""
    init = dist.init_process_group
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda *args, **kwargs: init(*args, **kwargs, store=dist.HashStore(), rank=0, world_size=1),
    )
    distributed.init_process_group(torch.device("cpu"), TIMEOUT)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_the_gpu_is_current_before_the_group_is_made(monkeypatch, ranks):
    calls = []
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("device", device)))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **kwargs: calls.append(("group", kwargs)))
    device = torch.device("cuda", 3)
    distributed.init_process_group(device, TIMEOUT)
    expected = [("device", device), ("group", {"timeout": TIMEOUT, "device_id": device})]
    assert calls == expected[: int(ranks)]


def test_only_collectives_of_a_step_have_its_timeout(world, monkeypatch):
    groups = []

    def record(function):
        def recorded(*args, group=None, **kwargs):
            groups.append(group)
            return function(*args, group=group, **kwargs)

        return recorded

    monkeypatch.setattr(dist, "all_reduce", record(dist.all_reduce))
    monkeypatch.setattr(dist, "all_gather_object", record(dist.all_gather_object))
    for in_step in (True, False):
        assert distributed.all_reduce_sum(torch.ones(1), in_step=in_step).item() == 1
        assert distributed.all_gather_object("x", in_step=in_step) == ["x"]
    cpu = torch.device("cpu")
    timeouts = [group._get_backend(cpu).options._timeout for group in groups]
    assert timeouts == [TIMEOUT, TIMEOUT, timedelta(days=2), timedelta(days=2)]

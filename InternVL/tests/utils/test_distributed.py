"""Process groups and collectives with one and two ranks."""

import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from internvl_chat.utils import distributed
from internvl_chat.utils.errors import TrainingError, UsageError


def refuse(rank: int) -> None:
    raise UsageError(["one", f"rank {rank}"])


def check_collectives() -> None:
    rank, size = distributed.rank(), distributed.world_size()
    assert distributed.all_gather_object({"rank": rank}) == [{"rank": n} for n in range(size)]
    assert distributed.broadcast_object(f"rank {rank}") == "rank 0"
    assert distributed.run_on_rank_0(lambda: f"rank {rank}") == "rank 0"
    with pytest.raises(UsageError) as caught:
        distributed.run_on_rank_0(lambda: refuse(rank))
    assert caught.value.problems == ["one", "rank 0"]
    with pytest.raises(KeyError if rank == 0 else TrainingError):  # a bug; the other ranks do not wait
        distributed.run_on_rank_0({}.popitem)
    values = torch.tensor([1.0, float(rank)])
    assert distributed.all_reduce_sum(values).tolist() == [size, sum(range(size))]
    assert values.tolist() == [1, rank]
    assert distributed.any_rank(rank == size - 1)
    assert not distributed.any_rank(False)
    distributed.barrier()


def check_shared_folder(folder: Path) -> None:
    """Without LOCAL_WORLD_SIZE, each rank counts as a node."""
    assert distributed.is_shared(folder / "out")
    distributed.barrier()
    assert not (folder / "out").exists()
    own = folder / f"disk of rank {distributed.rank()}"
    assert not distributed.is_shared(own)
    (folder / "file").touch()
    with pytest.raises(UsageError, match="file/out: cannot be written to: Not a directory"):
        distributed.is_shared(folder / "file/out")


def run_rank(rank: int, size: int, port: int, folder: Path) -> None:
    patch = pytest.MonkeyPatch()
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}.items():
        patch.setenv(name, str(value))
    patch.setenv("MASTER_ADDR", "127.0.0.1")
    distributed.init_process_group(torch.device("cpu"), timedelta(minutes=5))
    check_collectives()
    check_shared_folder(folder)
    distributed.destroy_process_group()
    assert not torch.distributed.is_initialized()


def test_single_rank(tmp_path):
    distributed.init_process_group(torch.device("cpu"), timedelta(minutes=5))
    assert not torch.distributed.is_initialized()
    assert distributed.host_group() is distributed.new_host_group() is None
    check_collectives()
    assert distributed.is_shared(tmp_path / "out") and not (tmp_path / "out").exists()
    distributed.destroy_process_group()


def test_two_ranks(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(run_rank, (2, port, tmp_path), nprocs=2, start_method="fork")


def test_shards_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.shard(range(5)) == range(5)
    shards = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        shards.append(list(distributed.shard(range(7))))
    assert shards == [[0, 3, 6], [1, 4], [2, 5]]


TIMEOUT = timedelta(seconds=77)


@pytest.fixture
def world(monkeypatch):
    """Process group of one rank, created in the same way as for multiple ranks."""
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

"""Tests of the collectives, with one rank and with two."""

import socket
from datetime import timedelta

import pytest
import torch
from torch import multiprocessing

from internvl_chat.utils import distributed


def check_collectives() -> None:
    rank, size = distributed.rank(), distributed.world_size()
    assert distributed.all_gather_object({"rank": rank}) == [{"rank": n} for n in range(size)]
    assert distributed.broadcast_object(f"rank {rank}") == "rank 0"
    assert distributed.broadcast_object(rank, source=size - 1) == size - 1
    values = torch.tensor([1.0, float(rank)])
    assert distributed.all_reduce_sum(values).tolist() == [size, sum(range(size))]
    assert values.tolist() == [1, rank]
    assert distributed.any_rank(rank == size - 1)
    assert not distributed.any_rank(False)
    distributed.barrier()


def run_rank(rank: int, size: int, port: int) -> None:
    patch = pytest.MonkeyPatch()
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}.items():
        patch.setenv(name, str(value))
    patch.setenv("MASTER_ADDR", "127.0.0.1")
    distributed.init_process_group(torch.device("cpu"), timedelta(minutes=5))
    check_collectives()
    distributed.destroy_process_group()
    assert not torch.distributed.is_initialized()


def test_single_rank():
    distributed.init_process_group(torch.device("cpu"), timedelta(minutes=5))
    assert not torch.distributed.is_initialized()
    assert distributed.host_group() is distributed.new_host_group() is None
    check_collectives()
    distributed.destroy_process_group()


def test_two_ranks():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(run_rank, (2, port), nprocs=2, start_method="fork")


def test_shards_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.shard(range(5)) == range(5)
    shards = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        shards.append(list(distributed.shard(range(7))))
    assert shards == [[0, 3, 6], [1, 4], [2, 5]]

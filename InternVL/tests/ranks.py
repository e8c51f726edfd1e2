"""Run functions and the training script on multiple ranks, forked from a process with all imports.

Most of the run time of a small rank would be spent on imports. The tests of the launchers use torchrun.
"""

import multiprocessing
import os
import pickle
import queue
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from helpers import HANG_SECONDS

from internvl_chat.utils import distributed

PRELOADED = ("internvl_chat.train.internvl_chat_finetune", "torch.distributed.fsdp")


def run_ranks(
    world_size: int, function: Callable, *arguments: Any, process_group: bool = True, nodes: int = 1
) -> list:
    """Call a function on multiple ranks and return their results; if a rank fails, the others are killed.

    Args:
        process_group: create the process group before the call.
        nodes: number of nodes to simulate; the ranks are divided evenly among them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    answers, port = context.Queue(), _free_port()
    processes = [
        context.Process(
            target=_run_rank,
            args=(rank, world_size, world_size // nodes, port, answers, process_group, function, arguments),
        )
        for rank in range(world_size)
    ]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # inherited by the server when it starts
    for process in processes:
        process.start()
    results, began = {}, time.monotonic()
    try:
        while len(results) < world_size:
            is_over = any(p.exitcode for p in processes) or time.monotonic() - began > HANG_SECONDS
            try:
                rank, result, error = answers.get(timeout=1)
            except queue.Empty:
                assert not is_over, f"only the ranks {sorted(results)} of {world_size} have answered"
                continue
            assert error is None, f"rank {rank}:\n{error}"
            results[rank] = pickle.loads(result)
    finally:
        for process in processes:
            process.join(5 if len(results) == world_size else 0)
            process.kill()
    return [results[rank] for rank in range(world_size)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run_rank(rank, world_size, node_size, port, answers, process_group, function, arguments):
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank % node_size),
        "LOCAL_WORLD_SIZE": str(node_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        if process_group:
            distributed.init_process_group(torch.device("cpu"), timedelta(seconds=HANG_SECONDS))
        # Tensors would be sent as handles, which the parent cannot open after this process has exited.
        answers.put((rank, pickle.dumps(function(*arguments)), None))
        distributed.destroy_process_group()
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))


def run_training(
    *argv: str, ranks: int = 1, nodes: int = 1, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run the training script on new processes; return the highest exit code and the output of all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        codes = run_ranks(
            ranks, _train, argv, folder, dict(environment or {}), process_group=False, nodes=nodes
        )
        outputs = [
            "".join(Path(folder, f"{rank}.{name}").read_text() for rank in range(ranks))
            for name in ("out", "err")
        ]
    return subprocess.CompletedProcess(argv, max(codes), *outputs)


def _train(argv, folder, environment):
    """Run the training script on this rank, with its output in files; return the exit code."""
    os.environ |= environment
    from internvl_chat.train.internvl_chat_finetune import main

    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        with Path(folder, f"{distributed.rank()}.{name}").open("wb") as file:
            os.dup2(file.fileno(), {"out": 1, "err": 2}[name])
    try:
        return main(list(argv))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()

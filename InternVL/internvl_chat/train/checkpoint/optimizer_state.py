"""Optimizer state on disk, for any number of ranks, sharded or not.

Each rank writes its shards of the tensors, named "<parameter>/<state>", as safetensors files in the layout of
`torch.distributed.checkpoint` (DCP), and reads the slices that it needs. No pickle is written or read.
"""

import contextlib
import json
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from internvl_chat.model.io.weights import write_file
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import TrainingError
from internvl_chat.utils.hashed_file import FileEntry, Pause

# It is right that a single process has no process group.
warnings.filterwarnings("ignore", "torch.distributed is disabled", module=r"torch\.distributed\.checkpoint")


def named_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's tensors by "<parameter>/<state>", and everything else for a JSON file."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {
        f"{names[parameter]}/{name}": value
        for parameter, values in optimizer.state.items()
        for name, value in values.items()
    }
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    values = {key: value for key, value in state.items() if key not in tensors}
    return tensors, {"param_groups": groups, "values": values}


def share_of_rank(tensors: Mapping[str, Tensor], main_bytes: int) -> dict[str, Tensor]:
    """Return what this rank writes: its shards, and its share by bytes of the tensors that all ranks hold.

    Args:
        tensors: of `named_state`.
        main_bytes: that rank 0 writes besides.
    """
    load = [main_bytes] + [0] * (distributed.world_size() - 1)
    own = {key: tensor for key, tensor in tensors.items() if isinstance(tensor, DTensor)}
    for key in sorted(tensors.keys() - own.keys(), key=lambda key: (-tensors[key].nbytes, key)):
        rank = load.index(min(load))
        load[rank] += tensors[key].nbytes
        if rank == distributed.rank():
            own[key] = tensors[key]
    return own


class _StagedPlanner(dcp.DefaultSavePlanner):
    """Plans a save from the live tensors, and writes copies of this rank's parts."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._copies[index.fqn]


class _Writer(dcp.HuggingFaceStorageWriter):
    """Writes and hashes safetensors files, one a thread."""

    def __init__(self, folder: Path, threads: int, pause: Pause) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._folder, self._threads, self._pause = folder, threads, pause
        self.entries: dict[str, FileEntry] = {}

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        threads = min(self._threads, len(plan.items))
        with ThreadPoolExecutor(self._threads) as pool:
            files = [plan.items[number::threads] for number in range(threads)]
            written = list(pool.map(self._write_file, count(), files, repeat(planner)))
        future: Future[list[WriteResult]] = Future()
        future.set_result(list(chain.from_iterable(written)))
        return future

    def _write_file(
        self, number: int, items: list[dcp.WriteItem], planner: dcp.SavePlanner
    ) -> list[WriteResult]:
        tensors = {item.index.fqn: planner.resolve_data(item) for item in items}
        offsets = {i.index.fqn: {"saved_offsets": list(i.tensor_data.chunk.offsets)} for i in items}
        name = f"rank-{distributed.rank():05d}-{number:02d}.safetensors"
        self.entries[name] = write_file(
            tensors,
            self._folder / name,
            metadata={"DCP_SHARDING_INFO": json.dumps(offsets)},
            pause=self._pause,
        )
        return [WriteResult(item.index, tensors[item.index.fqn].nbytes, None) for item in items]


def save_optimizer(
    folder: Path,
    tensors: Mapping[str, Tensor],
    copies: Mapping[str, Tensor],
    *,
    threads: int,
    pause: Pause,
    group: dist.ProcessGroup | None,
) -> dict[str, FileEntry]:
    """Write this rank's part; returns its files. A collective that fails on every rank if it does on one.

    Args:
        folder: is made if need be.
        tensors: of `share_of_rank`.
        copies: this rank's part of each, as it is to be written.
        threads: that write at the same time, a file each.
        pause: as for `HashedFile`.
        group: of all ranks, for this alone.

    Raises:
        OSError: a file cannot be written; with several ranks this is a `TrainingError`.
    """
    writer = _Writer(folder, threads, pause)
    with _first_failure():
        dcp.save(dict(tensors), storage_writer=writer, planner=_StagedPlanner(copies), process_group=group)
    return writer.entries


@torch.no_grad()
def load_optimizer(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]
) -> None:
    """Load what was saved by any number of ranks; a collective.

    Args:
        folder: of the files.
        model: names the parameters.
        optimizer: gets the state, each rank its shards.
        saved: the second result of `named_state`.

    Raises:
        TrainingError: the files cannot be read, or are of another optimizer or model.
    """
    parameters = dict(model.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    own_names = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    if own_names != [group["params"] for group in saved["param_groups"]]:
        raise TrainingError(f"{folder}: is the state of other parameters than those of this run")
    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors = {}
    try:
        metadata = reader.read_metadata()
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{folder}: cannot be read: {error}") from None
    for key, stored in metadata.state_dict_metadata.items():
        parameter, dtype = parameters[key.rpartition("/")[0]], stored.properties.dtype
        # Shaped as the parameter it is sharded as the parameter; anything else is the same on every rank.
        like = parameter if stored.size == parameter.shape else torch.empty(stored.size)
        tensors[key] = torch.empty_like(like, dtype=dtype)
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    with _first_failure():
        dcp.load(tensors, storage_reader=reader, planner=planner, process_group=distributed.host_group())
    numbers = {name: number for number, name in enumerate(chain.from_iterable(own_names))}
    state: dict[int, dict[str, Any]] = defaultdict(dict)
    for key, value in {**saved["values"], **tensors}.items():
        name, _, entry = key.rpartition("/")
        state[numbers[name]][entry] = value
    groups = [
        {k: tuple(v) if isinstance(v, list) else v for k, v in g.items()} for g in saved["param_groups"]
    ]
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups]
    optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
    # torch casts state to the dtype of the weight.
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        loaded = optimizer.state[parameters[name]]
        if entry in loaded and loaded[entry].dtype != value.dtype:
            loaded[entry] = value.to(loaded[entry].device)


@contextlib.contextmanager
def _first_failure() -> Iterator[None]:
    """Turn what DCP raises on every rank into the error of the rank that failed."""
    try:
        yield
    except dcp.CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if distributed.world_size() == 1:
            raise cause from None
        raise TrainingError(f"rank {rank}: {cause}") from cause

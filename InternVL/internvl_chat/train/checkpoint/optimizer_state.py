"""Save and load sharded or replicated optimizer state; any number of ranks can load it.

Each rank writes its shards as safetensors files in the format of `torch.distributed.checkpoint` (DCP) and
reads only the slices it needs. Tensors are named "<parameter>/<state>". torchao's quantized state tensors are
stored as several plain tensors, named "<parameter>/<state>.<part>". Pickle is not used.
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
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from internvl_chat.model.io.weights import write_file
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import TrainingError
from internvl_chat.utils.hashed_file import FileEntry

# DCP warns if there is no process group, as in a single-rank run.
warnings.filterwarnings("ignore", "torch.distributed is disabled", module=r"torch\.distributed\.checkpoint")


def named_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state tensors of an optimizer, keyed by "<parameter>/<state>", and all other state.

    The other state can be stored as JSON: parameter groups with parameter names, and non-tensor values.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state = {
        f"{names[parameter]}/{name}": value
        for parameter, values in optimizer.state.items()
        for name, value in values.items()
    }
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        tensors |= _parts(key, value) if isinstance(value, Tensor) else {}
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    values = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    return tensors, {"param_groups": groups, "values": values}


def _parts(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the plain tensors of which a quantized tensor consists; return other tensors unchanged."""
    if isinstance(tensor, DTensor) or not hasattr(tensor, "__tensor_flatten__"):
        return {key: tensor}
    names, _ = tensor.__tensor_flatten__()
    return {f"{key}.{name}": getattr(tensor, name) for name in names}


def _assemble(
    tensors: dict[str, Tensor], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Combine the parts of quantized tensors; inverse of `_parts` for all tensors."""
    parts = {key: tensor for key, tensor in tensors.items() if "." in key.rpartition("/")[2]}
    if not parts:
        return tensors
    _create_state(optimizer)
    combined = {key: tensor for key, tensor in tensors.items() if key not in parts}
    for key, part in parts.items():
        state, _, field = key.rpartition(".")
        name, _, entry = state.rpartition("/")
        combined[state] = optimizer.state[parameters[name]][entry]
        getattr(combined[state], field).copy_(part)
    return combined


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer create its state, with a step whose learning rate and gradients are zero."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"].fill_(0.0)
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"].fill_(rate)


def tensors_to_write(tensors: Mapping[str, Tensor], main_bytes: int) -> dict[str, Tensor]:
    """Return the tensors that this rank writes: all sharded ones and its share of the replicated ones.

    Args:
        main_bytes: size in bytes of the other data that rank 0 writes, for load balancing.
    """
    load = [main_bytes] + [0] * (distributed.world_size() - 1)
    assigned: dict[str, Tensor] = {key: t for key, t in tensors.items() if isinstance(t, DTensor)}
    for key in sorted(tensors.keys() - assigned.keys(), key=lambda key: (-tensors[key].nbytes, key)):
        rank = load.index(min(load))
        load[rank] += tensors[key].nbytes
        if rank == distributed.rank():
            assigned[key] = tensors[key]
    return assigned


class _StagedPlanner(dcp.DefaultSavePlanner):
    """Save planner that plans with the live tensors, but writes copies of their local shards."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._copies[index.fqn]


class _Writer(dcp.HuggingFaceStorageWriter):
    """Storage writer that uses several threads, each of which writes and hashes one safetensors file."""

    def __init__(self, folder: Path, threads: int) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._folder, self._threads = folder, threads
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
        tensors, offsets = {}, {}
        for item in items:
            tensor, data = planner.resolve_data(item), item.tensor_data
            if not isinstance(tensor, Tensor) or data is None:
                raise TypeError(f"{item.index.fqn} is not a tensor")
            tensors[item.index.fqn] = tensor
            offsets[item.index.fqn] = {"saved_offsets": list(data.chunk.offsets)}
        name = f"rank-{distributed.rank():05d}-{number:02d}.safetensors"
        self.entries[name] = write_file(
            tensors,
            self._folder / name,
            metadata={"DCP_SHARDING_INFO": json.dumps(offsets)},
        )
        return [WriteResult(item.index, tensors[item.index.fqn].nbytes, None) for item in items]


def save_optimizer(
    folder: Path,
    tensors: Mapping[str, Tensor],
    copies: Mapping[str, Tensor],
    *,
    threads: int,
    group: dist.ProcessGroup | None,
) -> dict[str, FileEntry]:
    """Write this rank's tensors; return the size and hash of each file, keyed by file name.

    Collective: call on all ranks. It fails on all ranks or on none.

    Args:
        tensors: this rank's live tensors, from `tensors_to_write`.
        copies: local shards of these tensors; copies in host memory if training continues meanwhile.
        threads: number of threads; each writes one file.
        group: process group of all ranks that no other thread uses; None in a single-rank run.

    Raises:
        OSError: a file cannot be written (single-rank run).
        TrainingError: a file cannot be written on at least one rank (multi-rank run).
    """
    writer = _Writer(folder, threads)
    with _unwrap_failure():
        dcp.save(dict(tensors), storage_writer=writer, planner=_StagedPlanner(copies), process_group=group)
    return writer.entries


@torch.no_grad()
def load_optimizer(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]
) -> None:
    """Load optimizer state that was saved by any number of ranks. Collective: call on all ranks.

    Args:
        model: model whose parameter names identify the state.
        optimizer: optimizer that receives the state; each rank loads its shards.
        saved: non-tensor state (second result of `named_state` when it was saved).

    Raises:
        TrainingError: the files cannot be read, or the saved parameter groups differ from this run's.
    """
    parameters = dict(model.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    group_names = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    if group_names != [group["params"] for group in saved["param_groups"]]:
        raise TrainingError(f"{folder}: the saved parameter groups differ from those of this run")
    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Tensor] = {}
    try:
        metadata = reader.read_metadata()
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{folder}: cannot be read: {error}") from None
    for key, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            raise TrainingError(f"{folder}: {key} is not a tensor")
        parameter, dtype = parameters[key.rpartition("/")[0]], stored.properties.dtype
        # A tensor with the shape of its parameter is sharded like the parameter; all others are replicated.
        like = parameter if stored.size == parameter.shape else torch.empty(stored.size)
        tensors[key] = torch.empty_like(like, dtype=dtype)
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    with _unwrap_failure():
        dcp.load(tensors, storage_reader=reader, planner=planner, process_group=distributed.host_group())
    tensors = _assemble(tensors, parameters, optimizer)
    numbers = {name: number for number, name in enumerate(chain.from_iterable(group_names))}
    state: dict[int, dict[str, Any]] = defaultdict(dict)
    for key, value in {**saved["values"], **tensors}.items():
        name, _, entry = key.rpartition("/")
        state[numbers[name]][entry] = value
    groups = [
        {k: tuple(v) if isinstance(v, list) else v for k, v in g.items()} for g in saved["param_groups"]
    ]
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups]
    optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
    # `load_state_dict` casts the state to the parameter dtype; restore the saved dtype.
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        loaded = optimizer.state[parameters[name]]
        if entry in loaded and loaded[entry].dtype != value.dtype:
            loaded[entry] = value.to(loaded[entry].device)


@contextlib.contextmanager
def _unwrap_failure() -> Iterator[None]:
    """Replace DCP's exception, which all ranks raise, with the error of the first failing rank."""
    try:
        yield
    except dcp.CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if distributed.world_size() == 1:
            raise cause from None
        raise TrainingError(f"rank {rank}: {cause}") from cause

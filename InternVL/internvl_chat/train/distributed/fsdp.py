"""Weights, gradients and optimizer state spread over the processes by torch's FSDP2, layer by layer."""

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from internvl_chat.model.modeling import InternVLChatModel

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: InternVLChatModel, device: torch.device) -> None:
    """Move a model to its device and spread its weights over all processes, in place.

    The layers of both towers are gathered one by one while they run; everything else together.
    """
    model.to(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in [*model.vision_model.encoder.layers, *model.language_model.get_decoder().layers]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.always_run_vision = True


def is_sharded(model: nn.Module) -> bool:
    """Say whether `shard` has spread the model."""
    return isinstance(model, FSDPModule)


def whole(tensor: Any) -> Any:
    """Return a sharded tensor gathered on every process, anything else as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all weights on the CPU of the main process; an empty dictionary elsewhere."""
    return get_model_state_dict(model, options=_WHOLE)


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the whole optimizer state by parameter names, on the CPU of the main process."""
    return get_optimizer_state_dict(model, optimizer, options=_WHOLE)


def spread_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `gather_optimizer` returned, or the state of a run that was not sharded, on every process."""
    state = _by_name(model, optimizer, state)
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def _by_name(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with the parameters' names for their numbers, if it has numbers."""
    saved = [key for group in state["param_groups"] for key in group["params"]]
    if not all(isinstance(key, int) for key in saved):
        return state
    names = {parameter: name for name, parameter in model.named_parameters()}
    own = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    name_of = dict(zip(saved, own, strict=True))
    groups = [{**g, "params": [name_of[key] for key in g["params"]]} for g in state["param_groups"]]
    return {"state": {name_of[key]: kept for key, kept in state["state"].items()}, "param_groups": groups}

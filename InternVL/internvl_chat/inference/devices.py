"""Place a model on one device or distribute its layers across multiple GPUs."""

import torch
from torch import nn

from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils.distributed import local_rank, world_size
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

AUTO = "auto"

DeviceMap = dict[str, str | int | torch.device]


def find_device(name: str | torch.device | None) -> torch.device:
    """Return the device with this name; None selects this rank's GPU, or the CPU if there are no GPUs.

    Raises:
        UsageError: the device does not exist.
    """
    if name is None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", local_rank() % gpus) if gpus else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: unknown device; use cpu, cuda:0 or {AUTO}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        available = f"cuda:0 to cuda:{gpus - 1}" if gpus else "cpu"
        raise UsageError(f"--device {name}: there is no such GPU; use {available}")
    return device


def default_dtype(device: str | torch.device | None) -> torch.dtype:
    """Return the dtype of a model on a device: float32 on a CPU, bfloat16 on a GPU."""
    first = find_device(None if device == AUTO else device)
    return torch.float32 if first.type == "cpu" else torch.bfloat16


def place(model: InternVLChatModel, device: str | torch.device | None) -> InternVLChatModel:
    """Move a model to a device, or distribute it across all GPUs of this node (`auto`).

    Raises:
        UsageError: the device does not exist, or `auto` is used with multiple ranks.
    """
    if device != AUTO:
        return model.to(find_device(device))
    if world_size() > 1:
        raise UsageError(
            f"--device {AUTO} distributes the model across all GPUs, but torchrun starts one rank per GPU; "
            "use only one of the two"
        )
    if torch.cuda.device_count() < 2:
        return model.to(find_device(None))
    return distribute(model, balanced_map(model, torch.cuda.device_count()))


def distribute(model: InternVLChatModel, device_map: DeviceMap) -> InternVLChatModel:
    """Distribute the modules of a model across devices; accelerate moves the activations between them.

    Args:
        device_map: device of each module, as returned by `balanced_map`.
    """
    from accelerate import dispatch_model

    devices = ", ".join(sorted({str(device) for device in device_map.values()}))
    logger.info("the model is distributed across %s", devices)
    return dispatch_model(model, device_map=device_map, force_hooks=True)


def balanced_map(model: InternVLChatModel, devices: int) -> DeviceMap:
    """Return a device map that splits the model between decoder layers into parts of about equal size.

    The first device gets the vision tower, the projector and the word embeddings. The last device gets the
    final norm and the head, but a head tied to the embeddings stays with them.

    Args:
        model: model to split.
        devices: number of devices.
    """
    llm = model.language_model
    decoder = llm.get_decoder()
    names = {module: name for name, module in model.named_modules()}
    layers = list(decoder.layers)
    first = [model.vision_model, model.mlp1, llm.get_input_embeddings(), decoder.rotary_emb]
    last = [decoder.norm, llm.get_output_embeddings()]
    if llm.get_output_embeddings().weight is llm.get_input_embeddings().weight:
        first, last = [*first, last.pop()], last
    sizes = [_bytes(*first), *map(_bytes, layers), _bytes(*last)]
    total, before, device_of = sum(sizes), 0, []
    for size in sizes:
        device_of.append(min(int((before + size / 2) / total * devices), devices - 1))
        before += size
    device_map: DeviceMap = {names[module]: 0 for module in first}
    device_map |= {names[layer]: device for layer, device in zip(layers, device_of[1:-1], strict=True)}
    return device_map | {names[module]: devices - 1 for module in last}


def _bytes(*modules: nn.Module) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())

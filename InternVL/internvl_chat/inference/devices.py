"""Placing a model on one device, or spreading it over several."""

import torch
from torch import nn

from internvl_chat.inference.parallel import process_count, process_device
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

SPREAD = "auto"

DeviceMap = dict[str, str | int | torch.device]


def find_device(name: str | torch.device | None) -> torch.device:
    """Return the named device, by default this process's GPU if there is one.

    Raises:
        UsageError: there is no such device here.
    """
    if name is None:
        return process_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: unknown; use cpu, cuda:0 or {SPREAD}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        instead = f"cuda:0 to cuda:{found - 1}" if found else "cpu"
        raise UsageError(f"--device {name}: there is no such GPU here; use {instead}")
    return device


def place(model: InternVLChatModel, device: str | torch.device | None) -> InternVLChatModel:
    """Move a model to a device, or spread it over all GPUs of this machine (`auto`).

    Raises:
        UsageError: there is no such device, or several processes would each take all GPUs.
    """
    if device != SPREAD:
        return model.to(find_device(device))
    if process_count() > 1:
        raise UsageError(
            f"--device {SPREAD} spreads the model over all GPUs, and torchrun starts a process for each; "
            "use one of them"
        )
    if torch.cuda.device_count() < 2:
        return model.to(process_device())
    return spread(model, balanced_map(model, torch.cuda.device_count()))


def spread(model: InternVLChatModel, device_map: DeviceMap) -> InternVLChatModel:
    """Put the parts of a model on the devices that a map names; accelerate carries tensors between them.

    Args:
        model: on the CPU.
        device_map: a device for each module, as returned by `balanced_map`.
    """
    from accelerate import dispatch_model

    logger.info("the model is spread over %s", ", ".join(sorted({str(d) for d in device_map.values()})))
    return dispatch_model(model, device_map=device_map, force_hooks=True)


def balanced_map(model: InternVLChatModel, devices: int) -> DeviceMap:
    """Distribute a model's decoder layers so that each device gets about the same number of bytes.

    Vision tower, projector and word embeddings go to the first device, where the inputs are made; the head
    goes to the last.

    Args:
        model: the model to distribute.
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
    total, passed, device_of = sum(sizes), 0, []
    for size in sizes:
        device_of.append(min(int((passed + size / 2) / total * devices), devices - 1))
        passed += size
    device_map: DeviceMap = {names[module]: 0 for module in first}
    device_map |= {names[layer]: device for layer, device in zip(layers, device_of[1:-1], strict=True)}
    return device_map | {names[module]: devices - 1 for module in last}


def _bytes(*modules: nn.Module) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())

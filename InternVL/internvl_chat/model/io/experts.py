"""Convert the expert weights of a mixture of experts between checkpoint files and transformers' model.

Files have three matrices per expert. The model has two tensors per layer, which stack the matrices of all
experts:

    mlp.experts.0.gate_proj.weight, mlp.experts.0.up_proj.weight, ...  ->  mlp.experts.gate_up_proj
    mlp.experts.0.down_proj.weight, ...                                ->  mlp.experts.down_proj

Shapes: E experts, C hidden size, I MLP width of an expert.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch

from internvl_chat.model.io.weights import Weights
from internvl_chat.utils.errors import ModelError

_IN_FILES = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_IN_MODEL = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
# Tensor in the model -> matrices in files, which are concatenated in this order.
_KINDS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def stack_experts(weights: Weights) -> Weights:
    """Return the weights of a checkpoint with the experts stacked, as in transformers' model.

    Other weights, including experts that are already stacked, are unchanged.

    Raises:
        ModelError: an expert lacks one of its matrices.
    """
    out: Weights = {}
    experts: defaultdict[str, dict[tuple[int, str], Callable[[], torch.Tensor]]] = defaultdict(dict)
    for name, read in weights.items():
        match = _IN_FILES.fullmatch(name)
        if match:
            experts[match[1]][int(match[2]), match[3]] = read
        else:
            out[name] = read
    for layer, parts in experts.items():
        numbers = range(1 + max(number for number, _ in parts))
        for stacked, kinds in _KINDS.items():
            try:
                matrices = [[parts[number, kind] for kind in kinds] for number in numbers]
            except KeyError as error:
                number, kind = error.args[0]
                raise ModelError(f"the weight {layer}.{number}.{kind}.weight is missing") from None
            out[f"{layer}.{stacked}"] = partial(_stack, matrices)
    return out


def split_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the model's tensors with the experts split, as in checkpoint files; inverse of `stack_experts`.

    The results are views.
    """
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        match = _IN_MODEL.fullmatch(name)
        if not match:
            out[name] = tensor
            continue
        kinds = _KINDS[match[2]]
        for number, expert in enumerate(tensor):
            for kind, part in zip(kinds, expert.chunk(len(kinds)), strict=True):
                out[f"{match[1]}.{number}.{kind}.weight"] = part
    return out


def _stack(experts: Sequence[Sequence[Callable[[], torch.Tensor]]]) -> torch.Tensor:
    """Read the matrices of the E experts, concatenate those of each expert, and stack the results.

    The shape is (E, 2 I, C) for gate and up, and (E, C, I) for down.
    """
    return torch.stack([torch.cat([read() for read in parts]) for parts in experts])

"""Activations of a pack, from what autograd saves in one decoder layer and in the vision tower."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from internvl_chat.model.kernels.apply import has_supervised_head
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel

# Record lengths for which a layer is measured; two show what grows with the square of the length.
_PROBES = (256, 512)


class PackSize(NamedTuple):
    """What of a pack takes memory; `squares` is the sum of the squared record lengths. Numbers or arrays."""

    tokens: Any
    supervised: Any
    tiles: Any
    squares: Any = 0


@dataclass(frozen=True)
class Activations:
    """Bytes that a pack needs beside the weights.

    Attributes:
        layers: decoder layers.
        layer_token, layer_square: of a decoder layer, per token and per squared record length.
        input_token: of the input of a layer, which is all that a checkpointed one keeps, per token.
        supervised: logits and hidden state of a supervised token.
        tile, checkpointed_tile: features of a tile, and the activations of a trained vision tower.
    """

    layers: int
    layer_token: float
    layer_square: float
    input_token: float
    supervised: float
    tile: float
    checkpointed_tile: float

    def of(self, pack: PackSize, checkpointed: int) -> dict[str, Any]:
        """Return the bytes of a pack by component, with so many checkpointed layers."""
        layer = self.layer_token * pack.tokens + self.layer_square * pack.squares
        # Backward recomputes one checkpointed layer at a time, and has gradients of one layer's activations.
        in_memory = self.layers - checkpointed + (checkpointed > 0) + 1
        return {
            "activations": in_memory * layer + checkpointed * self.input_token * pack.tokens,
            "logits": self.supervised * pack.supervised,
            "vision": (self.checkpointed_tile if checkpointed else self.tile) * pack.tiles,
        }


def measure_activations(model: InternVLChatModel, device: torch.device) -> Activations:
    """Measure a model on its training device; its kernels may not run where the model is now."""
    llm = model.language_model
    itemsize, hidden = model.mlp1[0].weight.element_size(), llm.config.hidden_size
    logits = llm.config.vocab_size * (2 * itemsize + 3 * 4)
    if has_supervised_head(model):
        # The gradient replaces the logits, and is kept only for a trained head.
        logits = llm.config.vocab_size * itemsize if llm.get_output_embeddings().weight.requires_grad else 0
    features, tower = 4 * model.config.tokens_per_tile * hidden * itemsize, _vision_bytes(model, device)
    return Activations(
        len(llm.get_decoder().layers),
        *_layer_bytes(model, device),
        input_token=hidden * itemsize,
        supervised=logits + 2 * hidden * itemsize,
        tile=features + tower[0],
        checkpointed_tile=features + tower[1],
    )


def _layer_bytes(model: InternVLChatModel, device: torch.device) -> tuple[float, float]:
    """Return the activations of a decoder layer per token and per squared record length."""
    decoder = model.language_model.get_decoder()
    layer = _on_device(decoder.layers[0], device)
    dtype, saved = next(layer.parameters()).dtype, []
    for tokens in _PROBES:
        x = torch.zeros(1, tokens, decoder.config.hidden_size, dtype=dtype, device=device, requires_grad=True)
        positions = torch.arange(tokens, device=device).unsqueeze(0)
        # As in a packed row of one record.
        bounds = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        inputs = {"attention_mask": None, "position_ids": positions}
        inputs["position_embeddings"] = decoder.rotary_emb(x, positions)
        inputs |= {f"cu_seq_lens_{name}": bounds for name in "qk"}
        inputs |= {f"max_length_{name}": tokens for name in "qk"}
        saved.append(saved_bytes(layer, partial(layer, x, **inputs)) / tokens)
    square = max(0.0, (saved[1] - saved[0]) / (_PROBES[1] - _PROBES[0]))
    return saved[0] - square * _PROBES[0], square


def _vision_bytes(model: InternVLChatModel, device: torch.device) -> tuple[float, float]:
    """Return the activations of the vision tower per tile, without and with checkpointed blocks."""
    if model.vision_is_frozen:
        return 0.0, 0.0
    tower, config = _on_device(model.vision_model, device), model.vision_model.config
    tile = torch.zeros(1, 3, config.image_size, config.image_size, dtype=model.pixel_dtype, device=device)
    saved, layers = saved_bytes(tower, partial(tower, tile)), config.num_hidden_layers
    inputs = layers * (config.grid**2 + 1) * config.hidden_size * model.pixel_dtype.itemsize
    return saved, inputs + saved / layers


def _on_device(module: nn.Module, device: torch.device) -> nn.Module:
    """Return a module that is on the device, or a copy there of one that is not."""
    return module if next(module.parameters()).device == device else copy.deepcopy(module).to(device)


def saved_bytes(module: nn.Module, call: Callable[[], Any]) -> int:
    """Return the bytes that autograd saves in a call, without the module's own parameters."""
    saved: set[torch.UntypedStorage] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(tensor.untyped_storage())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    gpus = {p.device for p in module.parameters() if p.is_cuda}
    with torch.random.fork_rng(gpus), torch.enable_grad(), hooks:
        call()
    return sum(storage.nbytes() for storage in saved - {p.untyped_storage() for p in module.parameters()})

"""How much memory a step needs, and what follows: which layers are recomputed, how weights are stepped.

Everything is counted in bytes on one device. What a decoder layer keeps for its backward pass is not guessed:
one layer is run on a few tokens and what autograd saves is counted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import nn

from internvl_chat.data.dataset import Draw
from internvl_chat.data.length_cache import Lengths
from internvl_chat.data.order import StepSampler
from internvl_chat.model.lean import is_lean
from internvl_chat.model.modeling import InternVLChatModel
from internvl_chat.train.optim.adamw import bytes_per_parameter
from internvl_chat.utils.distributed import of_all_processes

# Share of a device that a plan may fill; allocators round up and fragment.
_USABLE = 0.92
# Tokens of the records by which a layer is probed; two lengths tell what grows with the square.
_PROBES = (256, 512)


@dataclass(frozen=True)
class PackSize:
    """What of a pack takes memory.

    Attributes:
        tokens: of all records.
        supervised: tokens.
        tiles: of all records.
        squares: sum of the squares of the records' tokens.
    """

    tokens: int
    supervised: int
    tiles: int
    squares: int = 0


@dataclass(frozen=True)
class MemoryModel:
    """What a process needs, in bytes.

    Attributes:
        weights: all weights.
        gradients: of the trained weights.
        trained: gradients and optimizer state, by weight precision.
        layers: decoder layers.
        layer_token: what a layer keeps for a token.
        input_token: what a recomputed layer keeps for a token.
        supervised: logits of a supervised token, their gradient and what is in work.
        tile: features of a tile, and what a vision tower that is trained keeps for it.
        recomputed_tile: the same where any layer is recomputed.
        layer_square: what a layer keeps for the square of a record's tokens: attention weights, where no
            kernel does without.
    """

    weights: int
    gradients: int
    trained: dict[str, int]
    layers: int
    layer_token: float
    input_token: float
    supervised: float
    tile: float
    recomputed_tile: float
    layer_square: float = 0.0

    def optimizer_state(self, precision: str) -> int:
        """Return what the first optimizer step adds to weights and gradients."""
        return max(0, self.trained[precision] - self.gradients)

    def needed(self, pack: PackSize, precision: str, recomputed: int) -> float:
        """Return what the step of a pack needs when `recomputed` layers keep their inputs only."""
        layer = self.layer_token * pack.tokens + self.layer_square * pack.squares
        # A layer that is recomputed keeps all for as long as it is in work.
        activations = (self.layers - recomputed + bool(recomputed)) * layer
        activations += recomputed * self.input_token * pack.tokens
        tile = self.recomputed_tile if recomputed else self.tile
        inputs_and_head = self.supervised * pack.supervised + tile * pack.tiles
        return self.weights + self.trained[precision] + activations + inputs_and_head


@dataclass(frozen=True)
class MemoryPlan:
    """What was chosen.

    Attributes:
        weight_precision: of the optimizer.
        recomputed_layers: decoder layers that keep their inputs only.
    """

    weight_precision: str
    recomputed_layers: int


def capacity(device: torch.device, processes: int = 1) -> int:
    """Return the memory of a GPU, or what one of so many processes may use of the machine's, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available // processes + psutil.Process().memory_info().rss


def max_memory(device: torch.device) -> int:
    """Return the most memory used so far in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def choose(
    model: MemoryModel, pack: PackSize, available: float, *, precision: str, grad_checkpoint: str
) -> MemoryPlan:
    """Choose what fits: float32 masters before stochastic rounding, and as few recomputed layers as possible.

    Args:
        model: of the process.
        pack: the largest that is planned.
        available: bytes of the device.
        precision: asked for; `auto` leaves the choice.
        grad_checkpoint: `True` recomputes all layers, `False` none, `auto` leaves the choice.
    """
    counts = {"True": [model.layers], "False": [0]}.get(grad_checkpoint, range(model.layers + 1))
    usable = _USABLE * available
    for candidate in ("master", "stochastic") if precision == "auto" else (precision,):
        for recomputed in counts:
            if model.needed(pack, candidate, recomputed) <= usable:
                return MemoryPlan(candidate, recomputed)
    return MemoryPlan("stochastic" if precision == "auto" else precision, counts[-1])


def measure_memory(model: InternVLChatModel, *, shards: dict[str, int]) -> MemoryModel:
    """Count what a model needs; its trainable parameters must have been chosen.

    Args:
        model: on any device.
        shards: over how many processes `weights` and `state` (gradients and optimizer) are spread.
    """
    llm, config = model.language_model, model.language_model.config
    layer = llm.get_decoder().layers[0]
    itemsize = next(layer.parameters()).element_size()
    hidden = config.hidden_size
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    extra = {
        precision: sum(
            p.numel() * (bytes_per_parameter(precision, p.dtype) - p.element_size()) for p in trained
        )
        for precision in ("master", "stochastic", "bf16")
    }
    layer_token, layer_square = _layer_bytes(model)
    head_is_trained = llm.get_output_embeddings().weight.requires_grad
    if is_lean(model.language_model):
        # The gradient takes the place of the logits, and only a trained head has to wait for it.
        logits = config.vocab_size * itemsize if head_is_trained else 0
    else:
        logits = config.vocab_size * (2 * itemsize + 3 * 4)
    features = 4 * model.config.tokens_per_tile * hidden * itemsize
    tile, recomputed_tile = _vision_bytes(model)
    return MemoryModel(
        weights=weights // shards["weights"],
        gradients=sum(p.numel() * p.element_size() for p in trained) // shards["state"],
        trained={precision: size // shards["state"] for precision, size in extra.items()},
        layers=len(llm.get_decoder().layers),
        layer_token=layer_token,
        layer_square=layer_square,
        input_token=hidden * itemsize,
        supervised=logits + 2 * hidden * itemsize,
        tile=features + tile,
        recomputed_tile=features + recomputed_tile,
    )


def _layer_bytes(model: InternVLChatModel) -> tuple[float, float]:
    """Return the bytes that a decoder layer keeps for a token, and for the square of a record's tokens."""
    decoder = model.language_model.get_decoder()
    layer, weight = decoder.layers[0], next(decoder.layers[0].parameters())
    kept = []
    for tokens in _PROBES:
        x = torch.zeros(1, tokens, model.language_model.config.hidden_size, dtype=weight.dtype)
        x = x.to(weight.device).requires_grad_()
        inputs = {"attention_mask": None, "position_ids": torch.arange(tokens, device=x.device).unsqueeze(0)}
        inputs["position_embeddings"] = decoder.rotary_emb(x, inputs["position_ids"])
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            kept.append(saved_bytes(layer, partial(layer, x, **inputs)) / tokens)
    square = max(0.0, (kept[1] - kept[0]) / (_PROBES[1] - _PROBES[0]))
    return kept[0] - square * _PROBES[0], square


def _vision_bytes(model: InternVLChatModel) -> tuple[float, float]:
    """Return the bytes that the vision tower keeps of a tile, and those where its blocks are recomputed."""
    tower = model.vision_model
    if model.vision_is_frozen:
        return 0.0, 0.0
    weight, config = next(tower.parameters()), tower.config
    tile = torch.zeros(1, 3, config.image_size, config.image_size, dtype=weight.dtype, device=weight.device)
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        kept = saved_bytes(tower, partial(tower, tile))
    layers = config.num_hidden_layers
    inputs = layers * (config.grid**2 + 1) * config.hidden_size * weight.element_size()
    return kept, inputs + kept / layers


def saved_bytes(module: nn.Module, call: Callable[[], Any]) -> int:
    """Return the bytes that autograd keeps of a call, the module's own weights left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(storages.values())


def largest_anywhere(pack: PackSize, model: MemoryModel, processes: int) -> PackSize:
    """Return the largest of all processes' packs, so that all of them choose alike."""
    return max(of_all_processes(pack, processes), key=lambda pack: model.needed(pack, "bf16", 0))


class LargestPack(NamedTuple):
    """The pack that needs most memory on a process.

    Attributes:
        size: what it holds.
        draws: its records.
        packs: the most packs of one step, whichever they are.
    """

    size: PackSize
    draws: list[Draw]
    packs: int


def largest_pack(sampler: StepSampler, lengths: Lengths, model: MemoryModel, steps: int) -> LargestPack:
    """Return the pack of the run's `steps`, in whatever epoch, that needs most memory on this process."""
    squares = lengths.tokens.astype(np.int64) ** 2
    needs = model.layers * (model.layer_token * lengths.tokens + model.layer_square * squares)
    needs += model.supervised * lengths.supervised + model.tile * lengths.tiles
    need, largest, most = -1.0, [], 0
    for step in range(1, steps + 1):
        packs = sampler.packs(*sampler.place_of(step))
        most = max(most, len(packs))
        for draws in packs:
            needed = sum(needs[draw.index] for draw in draws)
            if needed > need:
                need, largest = needed, draws
    records = [draw.index for draw in largest]
    columns = (lengths.tokens, lengths.supervised, lengths.tiles, squares)
    return LargestPack(PackSize(*(int(column[records].sum()) for column in columns)), largest, most)

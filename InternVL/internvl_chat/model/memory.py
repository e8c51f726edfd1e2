"""Estimate training memory in bytes: activations per pack, and weights, gradients and optimizer per rank.

To measure activations, one decoder layer and the vision tower are run, and the sizes of the tensors that
autograd saves are added up.
"""

import contextlib
import copy
import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from internvl_chat.model.kernels.apply import has_supervised_head
from internvl_chat.model.lora.injection import lora_layers
from internvl_chat.model.lora.quantization import quantization_bytes
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel

# Record lengths in tokens at which a layer is measured. Two lengths separate the linear and quadratic terms.
_PROBE_LENGTHS = (256, 512)
# DeepSpeed's default limits on the number of parameters that ZeRO-3 gathers.
_ZERO3_GATHERED = {"max_live_parameters": 1e9, "prefetch_bucket_size": 5e7}

# Components whose memory does not depend on the pack.
COMPONENTS = ("weights", "gradients", "optimizer state", "optimizer scratch", "communication buffers")


class PackSize(NamedTuple):
    """Counts that determine a pack's memory: numbers for one pack, or arrays with one entry per pack.

    Attributes:
        squares: sum of the squared record lengths.
    """

    tokens: Any
    supervised: Any
    tiles: Any
    squares: Any = 0


@dataclass(frozen=True)
class Activations:
    """Activation memory in bytes, per token, supervised token and tile of a pack.

    Attributes:
        layers: number of decoder layers.
        layer_token: activations of a decoder layer, per token.
        layer_square: activations of a decoder layer, per squared record length.
        input_token: input of a decoder layer, per token; a checkpointed layer saves only its input.
        supervised: logits and hidden states, per supervised token.
        tile: image features and activations of a trained vision tower, per tile.
        checkpointed_tile: the same as `tile`, with activation checkpointing.
        small_last_layer: whether the last layer's MLP runs at supervised positions only.
    """

    layers: int
    layer_token: float
    layer_square: float
    input_token: float
    supervised: float
    tile: float
    checkpointed_tile: float
    small_last_layer: bool = False

    def for_pack(self, pack: PackSize, checkpointed: int) -> dict[str, Any]:
        """Return a pack's activation memory in bytes, keyed by component.

        Args:
            pack: size of the pack.
            checkpointed: number of decoder layers with activation checkpointing.
        """
        layer = self.layer_token * pack.tokens + self.layer_square * pack.squares
        # The backward pass recomputes one checkpointed layer at a time and keeps the activation gradients of
        # one layer. A small last layer has few of them, and its activations are freed before those of the
        # other layers are computed.
        gradients = 0 if self.small_last_layer and not checkpointed else 1
        in_memory = self.layers - checkpointed + (checkpointed > 0) + gradients
        return {
            "activations": in_memory * layer + checkpointed * self.input_token * pack.tokens,
            "logits": self.supervised * pack.supervised,
            "vision": (self.checkpointed_tile if checkpointed else self.tile) * pack.tiles,
        }


def saves_linear_inputs(zero: Mapping[str, Any]) -> bool:
    """Return whether linear layers with frozen weights save their inputs for backward.

    ZeRO-3 replaces `torch.nn.functional.linear` with `LinearFunctionForZeroStage3`, which saves the input of
    every layer (`Init` in deepspeed/runtime/zero/partition_parameters.py; `setup_context` in linear.py).
    Other layouts save inputs only for the gradients of weights.

    Args:
        zero: `zero_optimization` section of the DeepSpeed configuration; empty without DeepSpeed.
    """
    return int(zero.get("stage", 0)) == 3 and bool(zero.get("memory_efficient_linear", True))


def measure_activations(
    model: InternVLChatModel, device: torch.device, *, linear_inputs: bool = False
) -> Activations:
    """Return the sizes of a model's activations, measured on the training device.

    If the model is on a different device, copies of the measured modules are used.

    Args:
        model: model, after `set_trainable` and `apply_kernels`.
        device: training device.
        linear_inputs: see `saves_linear_inputs`.
    """
    llm = model.language_model
    itemsize, hidden = model.projector_weight.element_size(), llm.config.hidden_size
    logits = llm.config.vocab_size * (2 * itemsize + 3 * 4)
    if has_supervised_head(model):
        # The gradient replaces the logits and is saved only if the head is trained.
        logits = llm.config.vocab_size * itemsize if llm.get_output_embeddings().weight.requires_grad else 0
    features = 4 * model.config.tokens_per_tile * hidden * itemsize
    tower, checkpointed_tower = _vision_bytes(model, device, linear_inputs)
    return Activations(
        len(llm.get_decoder().layers),
        *_layer_bytes(model, device, linear_inputs),
        input_token=hidden * itemsize,
        supervised=logits + 2 * hidden * itemsize,
        tile=features + tower,
        checkpointed_tile=features + checkpointed_tower,
        small_last_layer=has_supervised_head(model),
    )


def _layer_bytes(model: InternVLChatModel, device: torch.device, linear_inputs: bool) -> tuple[float, float]:
    """Return the activation bytes of a decoder layer per token and per squared record length."""
    decoder = model.language_model.get_decoder()
    layer = _on_device(decoder.layers[0], device)
    dtype, saved = model.projector_weight.dtype, []
    for tokens in _PROBE_LENGTHS:
        x = torch.zeros(1, tokens, decoder.config.hidden_size, dtype=dtype, device=device, requires_grad=True)
        positions = torch.arange(tokens, device=device).unsqueeze(0)
        # A packed row with one record.
        bounds = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        inputs: dict[str, Any] = {"attention_mask": None, "position_ids": positions}
        # Only the sizes of cosine and sine matter. RoPE with dynamic scaling fails on the meta device.
        rotary = (1, tokens, 2 * decoder.rotary_emb.inv_freq.numel())
        inputs["position_embeddings"] = (x.new_zeros(rotary), x.new_zeros(rotary))
        inputs |= {f"cu_seq_lens_{name}": bounds for name in "qk"}
        inputs |= {f"max_length_{name}": tokens for name in "qk"}
        call = partial(layer, x, **inputs)
        saved.append(saved_bytes(layer, call, linear_inputs=linear_inputs) / tokens)
    square = max(0.0, (saved[1] - saved[0]) / (_PROBE_LENGTHS[1] - _PROBE_LENGTHS[0]))
    return saved[0] - square * _PROBE_LENGTHS[0], square


def _vision_bytes(model: InternVLChatModel, device: torch.device, linear_inputs: bool) -> tuple[float, float]:
    """Return the activation bytes of the vision tower per tile, without and with activation checkpointing."""
    if model.vision_is_frozen:
        return 0.0, 0.0
    tower, config = _on_device(model.vision_model, device), model.vision_model.config
    tile = torch.zeros(1, 3, config.image_size, config.image_size, dtype=model.pixel_dtype, device=device)
    saved = saved_bytes(tower, partial(tower, tile), linear_inputs=linear_inputs)
    layers = config.num_hidden_layers
    inputs = layers * (config.grid**2 + 1) * config.hidden_size * model.pixel_dtype.itemsize
    return saved, inputs + saved / layers


def _on_device(module: nn.Module, device: torch.device) -> nn.Module:
    """Return the module itself if it is on the device, otherwise a copy on the device.

    A copy from the meta device has uninitialized weights.
    """
    source = next(itertools.chain(module.parameters(), module.buffers())).device
    if source == device:
        return module
    moved = copy.deepcopy(module)
    return moved.to_empty(device=device) if source.type == "meta" else moved.to(device)


def saved_bytes(module: nn.Module, call: Callable[[], Any], *, linear_inputs: bool = False) -> int:
    """Return the bytes that autograd saves for backward during a call, excluding the module's parameters.

    Tensors that are freed before the call ends, such as those of DoRA's weight norms, are not counted.

    Args:
        module: module that `call` runs.
        call: function that runs the forward pass.
        linear_inputs: also count the inputs of linear layers whose weights are frozen.
    """
    saved: list[weakref.ref[torch.Tensor]] = []
    inputs: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(weakref.ref(tensor))
        return tensor  # the graph keeps this object alive as long as it needs the tensor

    def keep_input(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs.extend(x for x in args if x.requires_grad)  # without gradients, nothing is saved

    with contextlib.ExitStack() as stack:
        for linear in module.modules() if linear_inputs else ():
            if isinstance(linear, nn.Linear):
                stack.callback(linear.register_forward_pre_hook(keep_input).remove)
        gpus = {p.device for p in module.parameters() if p.is_cuda}
        stack.enter_context(torch.random.fork_rng(gpus))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        output = call()
    tensors = [*inputs, *(tensor for ref in saved if (tensor := ref()) is not None)]
    storages = {tensor.untyped_storage() for tensor in tensors}
    del output
    return sum(storage.nbytes() for storage in storages - {p.untyped_storage() for p in module.parameters()})


def parallel_memory(
    model: InternVLChatModel,
    parallel: str,
    world_size: int,
    *,
    optimizer_state: int,
    optimizer_scratch: int,
    several_packs: bool,
    zero: Mapping[str, Any],
    offload: bool = False,
    lazy_pages: bool = False,
) -> dict[str, int]:
    """Return the memory per rank in bytes, without activations, keyed by component (see `COMPONENTS`).

    Args:
        model: model, after `set_trainable`.
        parallel: `single`, `ddp`, `fsdp` or `deepspeed`.
        world_size: number of ranks.
        optimizer_state: bytes of the unsharded optimizer state; ignored with DeepSpeed.
        optimizer_scratch: temporary bytes of an optimizer step; ignored with DeepSpeed.
        several_packs: whether gradients are accumulated over multiple packs per step.
        zero: `zero_optimization` section of the DeepSpeed configuration.
        offload: whether FSDP2 keeps its shards, gradients and optimizer state in host memory.
        lazy_pages: whether allocated memory takes up space only once it is written, as on a CPU.
    """
    trained, ranks, buffers = [p for p in model.parameters() if p.requires_grad], world_size, 0
    weights = _size(model.parameters()) + quantization_bytes(model) + _dora_bytes(model)
    gradients = _size(trained)
    if parallel == "ddp":
        # With one pack per step, DDP copies one gradient at a time into a bucket and replaces it with a view,
        # so only one is in memory twice. With gradient accumulation, all packs except the last accumulate
        # outside the buckets.
        buffers = gradients if several_packs else max(p.nbytes for p in trained)
    elif parallel == "fsdp":
        layers = model.blocks
        inside = {p for layer in layers for p in layer.parameters()}
        root = [p for p in model.parameters() if p not in inside]
        # The root module stays unsharded for the entire pass. A layer's gradients stay unsharded until they
        # are reduced, in the last pack of a step. There are buffers for three layers: one in use, one being
        # gathered and one being reduced.
        unreduced = max(_size(p for p in layer.parameters() if p.requires_grad) for layer in layers)
        reduced = gradients // ranks + _size(p for p in root if p.requires_grad)
        gradients = unreduced + (gradients if several_packs else reduced)
        weights, optimizer_state = weights // ranks + _size(root), optimizer_state // ranks
        buffers = 3 * max(_size(layer.parameters()) for layer in layers)
        if offload:
            # The gradients of each pack are reduced and accumulated in host memory.
            weights, optimizer_state, optimizer_scratch = _size(root), 0, 0
            gradients = unreduced + _size(p for p in root if p.requires_grad)
    elif parallel == "deepspeed":
        return _deepspeed_memory(model, trained, ranks, zero, several_packs, lazy_pages)
    sizes = (weights, gradients, optimizer_state, optimizer_scratch, buffers)
    return dict(zip(COMPONENTS, sizes, strict=True))


def offloaded_memory(
    model: InternVLChatModel,
    parallel: str,
    world_size: int,
    *,
    optimizer_state: int,
    zero: Mapping[str, Any],
    offload: bool,
) -> int:
    """Return the host memory per rank, in bytes, for the state that a layout offloads.

    See `parallel_memory` for the arguments.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    weights, size = _size(model.parameters()), 0
    if parallel == "fsdp" and offload:
        size = weights + _size(trained) + optimizer_state
    elif parallel == "deepspeed":
        if _offload_device(zero, "optimizer") == "cpu":
            # Masters, moments and gradients in float32.
            size += 16 * sum(p.numel() for p in trained)
        if _offload_device(zero, "param") == "cpu":
            size += weights
    return size // world_size


def _offload_device(zero: Mapping[str, Any], state: str) -> str:
    """Return the device to which ZeRO offloads `optimizer` or `param`: `none`, `cpu` or `nvme`."""
    return (zero.get(f"offload_{state}") or {}).get("device", "none")


def _deepspeed_memory(
    model: InternVLChatModel,
    trained: list[nn.Parameter],
    ranks: int,
    zero: Mapping[str, Any],
    several_packs: bool,
    lazy_pages: bool,
) -> dict[str, int]:
    stage, numel = int(zero.get("stage", 0)), sum(p.numel() for p in trained)

    def shard(size: int, first_stage: int) -> int:
        return size // (ranks if stage >= first_stage else 1)

    def elements(name: str, default: float) -> int:
        value = zero.get(name, default)
        return model.config.hidden_size**2 if value == "auto" else int(float(value))

    weights = shard(_size(model.parameters()), 3) + quantization_bytes(model) + _dora_bytes(model)
    gradients = shard(_size(trained), 2)
    # DeepSpeed keeps float32 master weights and moments and casts the gradients to float32 for the update.
    state, scratch = shard(12 * numel, 1), shard(4 * numel, 1)
    largest, bucket = max(trained, key=torch.Tensor.numel), elements("reduce_bucket_size", 5e8)
    if stage >= 2 and largest.numel() > bucket:
        gradients += largest.nbytes  # it is reduced without a bucket
    # Each bucket is allocated at its full size, even if the gradients are smaller.
    itemsize = model.projector_weight.element_size()  # DeepSpeed casts float32 adapters to bf16
    buffers = (2 if zero.get("overlap_comm", stage == 3) else 1) * bucket
    if lazy_pages:
        # Buckets are written only as far as there are gradients.
        buffers = min(buffers, numel)
        if stage < 3:
            # Each backward pass allocates and frees the buckets (`setup_buckets`, `_release_ipg_buffers` in
            # deepspeed/runtime/zero/stage_1_and_2.py). It fills them while it frees the activations. The
            # gradients are views of the buckets, unless they are accumulated.
            scratch, buffers = scratch + itemsize * buffers, 0
            if not several_packs:
                scratch, gradients = scratch + gradients, 0
    if stage == 3:
        gathered = sum(elements(f"stage3_{name}", n) for name, n in _ZERO3_GATHERED.items())
        buffers += min(gathered, sum(p.numel() for p in model.parameters()))
    buffers *= itemsize
    if _offload_device(zero, "optimizer") != "none":
        state = scratch = 0
    if _offload_device(zero, "param") != "none":
        weights = 0
    return dict(zip(COMPONENTS, (weights, gradients, state, scratch, buffers), strict=True))


def _dora_bytes(model: InternVLChatModel) -> int:
    """Return the temporary bytes for the DoRA norms of the largest layer, which peft computes in float32."""
    layers = [layer for layer in lora_layers(model).values() if layer.lora_variant]
    sizes = [(int(layer.in_features or 0), int(layer.out_features or 0)) for layer in layers]
    # An identity matrix of the input size, and four matrices of the size of the weights.
    return max((4 * inputs * (inputs + 4 * outputs) for inputs, outputs in sizes), default=0)


def _size(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.nbytes for p in parameters)

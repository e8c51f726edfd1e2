"""4-bit base weights for QLoRA: NF4 with double quantization, through bitsandbytes.

Only the linear layers of the decoder are quantized, the layers that `use_llm_lora` adapts. Embeddings, head,
projector and vision tower keep their dtype: they are small or sensitive to rounding.

Weights are rounded to bfloat16 first, so that the 4-bit codes do not depend on the dtype of a run.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from internvl_chat.model.lora.injection import DECODER_TARGETS, llm_targets, lora_layers
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils.errors import ModelError, UsageError

NF4 = "nf4"
MISSING = "the package bitsandbytes is not installed (pip install 'm3llm[quantization]')"


def quantize_decoder(model: InternVLChatModel) -> None:
    """Replace the decoder's linear layers with 4-bit layers; parameter names do not change.

    The weights are quantized on a GPU if there is one, then moved back to their device.

    Args:
        model: model without adapters; on the meta device, the result has sizes but no values.

    Raises:
        UsageError: bitsandbytes is not installed.
        ModelError: the model has adapters, or the architecture is not supported.
    """
    if lora_layers(model):
        raise ModelError("only a model without adapters can be quantized; merge the adapters first")
    require_bitsandbytes()
    targets = llm_targets(model.language_model)
    for name, layer in list(model.language_model.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith(targets):
            parent, _, child = name.rpartition(".")
            setattr(model.language_model.get_submodule(parent), child, _quantized(layer))


def _quantized(layer: nn.Linear) -> nn.Linear:
    """Return a 4-bit copy of a layer."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = layer.weight.detach()
    quantized = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=weight.dtype,
        quant_type=NF4,
        device=torch.device("meta"),
    )
    codes, state = _quantize(weight)
    parameter: Any = Params4bit(
        codes,
        quant_state=state,
        quant_type=NF4,
        blocksize=state.blocksize,
        bnb_quantized=True,
    )
    quantized.weight = parameter.to(weight.device)
    quantized.bias = layer.bias
    # In evaluation mode, bitsandbytes would use bf16 products on some CPUs and repack the weights in a layout
    # without a backward pass.
    quantized.support_avx512bf16_for_cpu = False
    return quantized


def _quantize(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Quantize a weight, on a GPU if there is one; return the codes and bitsandbytes' `QuantState`."""
    from bitsandbytes.functional import quantize_4bit

    if weight.is_meta:  # bitsandbytes caches a table on the device of its first call: not the meta device
        quantize_4bit(torch.zeros(1, 64), quant_type=NF4, compress_statistics=True)
    # On a CPU, quantizing an 8B model takes many minutes.
    device = torch.device("cuda") if torch.cuda.is_available() and not weight.is_meta else weight.device
    rounded = weight.to(device, torch.bfloat16).to(weight.dtype)
    return quantize_4bit(rounded, quant_type=NF4, compress_statistics=True)


def is_quantized_weight(name: str) -> bool:
    """Return whether `quantize_decoder` quantizes the weight with this name.

    >>> is_quantized_weight("language_model.model.layers.0.mlp.up_proj.weight")
    True
    >>> is_quantized_weight("language_model.lm_head.weight")
    False
    """
    layer, _, kind = name.rpartition(".")
    return kind == "weight" and name.startswith("language_model.") and layer.endswith(DECODER_TARGETS)


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """Quantize a weight and convert it back; return the float32 values."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*_quantize(weight.float())).to(weight.device)


def parameter_count(parameter: torch.Tensor) -> int:
    """Return the number of weights in a parameter; a 4-bit parameter packs two into each byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def quantization_bytes(model: nn.Module) -> int:
    """Return the bytes that 4-bit weights need in addition to their codes; 0 without 4-bit weights.

    These are the scales of the blocks and, during a pass, one layer's weights in the dtype of the model.
    """
    states = [state for p in model.parameters() if (state := getattr(p, "quant_state", None)) is not None]
    scales = sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    return scales + max((state.shape.numel() * state.dtype.itemsize for state in states), default=0)


def require_bitsandbytes() -> None:
    """Check that bitsandbytes is installed.

    Raises:
        UsageError: it is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise UsageError(f"4-bit weights: {MISSING}")

"""Enable the optional kernels, which save time or memory without changing parameters or results.

The model also works without them.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from internvl_chat.model.kernels.cpu.persistent_buffers import use_persistent_buffers
from internvl_chat.model.kernels.supervised_head import LastLayer, SupervisedHead
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel

# Model types with pre-norm decoder layers, RMSNorm, and a linear head with unscaled logits.
_SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


def apply_kernels(
    model: InternVLChatModel, device: torch.device, *, liger: bool = False, persistent_buffers: bool = False
) -> None:
    """Replace language-model modules with faster ones that share their parameters.

    Parameter names do not change. Language models whose type is not in `_SUPPORTED` get only Liger's kernels.

    Args:
        model: model on any device, after `set_trainable`.
        device: device on which the model will run.
        liger: use Liger's kernels for RMSNorm, SwiGLU and RoPE (NVIDIA GPUs only).
        persistent_buffers: reuse vocabulary-sized buffers across steps (single-rank CPU training only).
    """
    llm = model.language_model
    if liger:
        # Liger's SwiGLU would replace the experts of a mixture of experts, which run in grouped products.
        kernels = {"rope": True, "swiglu": llm.config.model_type != "qwen3_moe", "rms_norm": True}
        # The cross-entropy is computed by SupervisedHead.
        apply_liger_kernel(llm, kernels | {"cross_entropy": False, "fused_linear_cross_entropy": False})
    if llm.config.model_type not in _SUPPORTED:
        return
    if device.type == "cuda" and not liger:
        fuse_norms(llm)
    supervise_positions(model)
    if persistent_buffers:
        use_persistent_buffers(llm)


def fuse_norms(module: nn.Module) -> None:
    """Replace transformers' RMSNorm modules with torch's fused RMSNorm.

    For the fused norm, autograd saves only the input and one scalar per token. For the original, it also
    saves two copies of the input, one in float32. The fused norm cuts the activation memory of an 8B model by
    about a fifth.
    """
    for parent in list(module.modules()):
        for name, norm in parent.named_children():
            if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
                weight = norm.get_parameter("weight")
                fused = nn.RMSNorm(weight.shape, cast(float, norm.variance_epsilon), device="meta")
                fused.weight = weight
                setattr(parent, name, fused)


def supervise_positions(model: InternVLChatModel) -> None:
    """Compute the last MLP, the final norm, the head and the losses at supervised positions only.

    Models whose head has a bias or an adapter are left unchanged.
    """
    llm = model.language_model
    head = llm.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return
    supervised = SupervisedHead(head.in_features, head.out_features, bias=False, device="meta")
    supervised.weight = head.weight
    llm.set_output_embeddings(supervised)
    layers = llm.get_decoder().layers
    layers[-1] = LastLayer(layers[-1])
    model.loss_function = supervised_losses


def supervised_losses(
    llm: PreTrainedModel, inputs: dict[str, Any], positions: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Return the same losses as `next_token_losses`, for a model with `LastLayer` and `SupervisedHead`."""
    hidden = llm.get_decoder()(**inputs, output_positions=positions).last_hidden_state[0]
    return llm.get_output_embeddings()(hidden, targets)


def has_supervised_head(model: InternVLChatModel) -> bool:
    """Return whether the last MLP and the head run at supervised positions only."""
    return model.loss_function is supervised_losses

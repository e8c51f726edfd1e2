"""Switch on the optional fast paths: the same parameters, names and results in less time or memory.

The model is complete without them.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from internvl_chat.model.kernels.cpu.persistent_buffers import use_persistent_buffers
from internvl_chat.model.kernels.supervised_head import LastLayer, SupervisedHead
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel

# Model types with pre-norm decoder layers, RMSNorm, and a linear head whose logits are not scaled.
_SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


def apply_kernels(
    model: InternVLChatModel, device: torch.device, *, liger: bool = False, persistent_buffers: bool = False
) -> None:
    """Replace modules of the language model by faster ones that share their parameters.

    Args:
        model: a model whose trainable parameters have been chosen, on any device.
        liger: use Liger's kernels for RMSNorm, SwiGLU and RoPE (NVIDIA GPUs).
        persistent_buffers: keep vocabulary-sized buffers from step to step (a single rank on a CPU).
    """
    llm = model.language_model
    if liger:
        kernels = {"rope": True, "swiglu": True, "rms_norm": True}
        # SupervisedHead computes the losses.
        apply_liger_kernel(llm, kernels | {"cross_entropy": False, "fused_linear_cross_entropy": False})
    if llm.config.model_type not in _SUPPORTED:
        return
    if device.type == "cuda" and not liger:
        fuse_norms(llm)
    supervise_positions(model)
    if persistent_buffers:
        use_persistent_buffers(llm)


def fuse_norms(module: nn.Module) -> None:
    """Replace transformers' RMSNorms by torch's fused one.

    Autograd then saves the input and one number per token, instead of two more copies of the input, one of
    them in float32. This saves about a fifth of the activations of an 8B model.
    """
    for parent in list(module.modules()):
        for name, norm in parent.named_children():
            if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
                weight = norm.get_parameter("weight")
                fused = nn.RMSNorm(weight.shape, cast(float, norm.variance_epsilon), device="meta")
                fused.weight = weight
                setattr(parent, name, fused)


def supervise_positions(model: InternVLChatModel) -> None:
    """Run the last MLP, the final norm, the head and the losses at labeled positions only.

    A head with a bias or an adapter is not replaced.
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
    """Compute the losses of `next_token_losses` with `LastLayer` and `SupervisedHead`."""
    hidden = llm.get_decoder()(**inputs, output_positions=positions).last_hidden_state[0]
    return llm.get_output_embeddings()(hidden, targets)


def has_supervised_head(model: InternVLChatModel) -> bool:
    """Return whether the last MLP and the head run at labeled positions only."""
    return model.loss_function is supervised_losses

"""Compute the token losses of packed records with teacher forcing."""

import torch

from internvl_chat.data.batching.collator import Pack
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel


@torch.no_grad()
def pack_losses(model: InternVLChatModel, pack: Pack, normalization: str) -> list[torch.Tensor]:
    """Return the losses of the supervised tokens, one tensor per record, in float32 on the CPU.

    Args:
        model: model in evaluation mode.
        normalization: one of `NORMALIZATIONS`.
    """
    device = next(model.parameters()).device
    pixels = pack.pixel_values(device, normalization, model.pixel_dtype)
    losses = model(**pack.text_inputs(device), pixel_values=pixels).token_losses.cpu()
    return list(losses.split(pack.supervised.tolist()))

"""The adapted linear layer: peft's, with its arithmetic in the dtype of the activations.

peft casts every input of an adapter to the adapter's float32 and back, which costs more than the adapter.
In float32 both compute the same.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import nn

from internvl_chat.model.kernels.cpu.dropout import drop


class LoraLinear(Linear):
    """W x + s B A dropout(x), where A and B are kept in float32 and used in the dtype of x."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., I) -> (..., O)."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        special = args or kwargs or self.disable_adapters or self.merged or self.lora_variant
        if special or len(names) != 1 or x.ndim < 2:
            return super().forward(x, *args, **kwargs)
        (name,) = names
        base = self.base_layer(x)
        drops = self.training and self._drops(name)
        dropped, factor = drop(x, self.lora_dropout[name].p) if drops else (x, 1.0)
        down = F.linear(dropped, self.lora_A[name].weight.to(x.dtype))
        up = self.lora_B[name].weight.to(x.dtype).t()
        flat = torch.addmm(base.flatten(0, -2), down.flatten(0, -2), up, alpha=factor * self.scaling[name])
        return flat.view_as(base)

    def _drops(self, name: str) -> bool:
        return isinstance(self.lora_dropout[name], nn.Dropout)

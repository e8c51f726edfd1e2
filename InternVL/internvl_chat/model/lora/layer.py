"""peft's LoRA layer, computed in the dtype of the activations.

peft casts the input of each adapter to float32 and its output back, which takes longer than the adapter
itself. For float32 inputs, the result is the same as peft's. DoRA layers run peft's own computation.

Shapes: I input features, O output features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import nn

from internvl_chat.model.kernels.cpu.dropout import drop


class LoraLinear(Linear):
    """W x + s B A dropout(x), where A and B are stored in float32 and used in the dtype of x.

    The base layer may have 4-bit weights.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., I) -> (..., O)."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        special_case = args or kwargs or self.disable_adapters or self.merged or self.lora_variant
        if special_case or len(names) != 1 or x.ndim < 2:
            return super().forward(x, *args, **kwargs)
        (name,) = names
        base = self.base_layer(x)
        dropout = self.lora_dropout[name]
        dropped, factor = x, 1.0
        if self.training and isinstance(dropout, nn.Dropout):
            dropped, factor = drop(x, dropout.p)
        down = F.linear(dropped, self.lora_A[name].get_parameter("weight").to(x.dtype))
        up = self.lora_B[name].get_parameter("weight").to(x.dtype).t()
        flat = torch.addmm(base.flatten(0, -2), down.flatten(0, -2), up, alpha=factor * self.scaling[name])
        return flat.view_as(base)

"""The InternViT vision tower, with the reference's parameter names.

Shapes: N tiles, S pixels per side, P = (S / patch size)^2 patches, C features, H heads, D = C / H.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from internvl_chat.model.attention import bidirectional_attention
from internvl_chat.model.configuration import InternVisionConfig


def _norm(config: InternVisionConfig) -> nn.Module:
    """Return the normalization layer selected by `norm_type`."""
    cls = LlamaRMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
    return cls(config.hidden_size, eps=config.layer_norm_eps)


def _drop_path(rate: float) -> nn.Module:
    """Return timm's DropPath (stochastic depth), or the identity at rate 0 to avoid importing timm."""
    if rate == 0:
        return nn.Identity()
    from timm.layers import DropPath

    return DropPath(rate)


class InternVisionEmbeddings(nn.Module):
    """Patch embeddings with a class token and learned position embeddings."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.grid = config.grid
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + config.grid**2, width))

    def positions(self, height: int, width: int) -> torch.Tensor:
        """Return the position embeddings of a patch grid, interpolated if it differs from `self.grid`."""
        if (height, width) == (self.grid, self.grid):
            return self.position_embedding
        cls, patches = self.position_embedding[:, :1], self.position_embedding[:, 1:]
        return torch.cat([cls, _resize_grid(patches, self.grid, height, width)], dim=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) -> (N, 1 + P, C)."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # (N, C, h, w)
        height, width = patches.shape[-2:]
        patches = patches.flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(len(patches), 1, -1).to(patches.dtype)
        return torch.cat([cls, patches], dim=1) + self.positions(height, width).to(patches.dtype)


def _resize_grid(patches: torch.Tensor, grid: int, height: int, width: int) -> torch.Tensor:
    """Interpolate the position embeddings of a square grid, (1, grid^2, C) -> (1, height * width, C)."""
    image = patches.float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(height, width), mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2).to(patches.dtype)


class InternAttention(nn.Module):
    """Self-attention within a tile, optionally with normalized queries and keys."""

    def __init__(self, config: InternVisionConfig, attn: str) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.attn, self.dropout = config.num_attention_heads, attn, config.attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(config.dropout)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if config.qk_normalization:
            self.q_norm = LlamaRMSNorm(width, eps=config.layer_norm_eps)
            self.k_norm = LlamaRMSNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1 + P, C) -> (N, 1 + P, C)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        # (N, H, 1 + P, D)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = bidirectional_attention(q, k, v, name=self.attn, dropout=self.dropout if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(-2)))


class InternMLP(nn.Module):
    """Two-layer MLP of a transformer block."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1 + P, C) -> (N, 1 + P, C)."""
        return self.fc2(self.act(self.fc1(x)))


class InternVisionEncoderLayer(nn.Module):
    """Pre-norm transformer block with layer scale and stochastic depth."""

    def __init__(self, config: InternVisionConfig, attn: str, drop_path_rate: float) -> None:
        super().__init__()
        self.attn, self.mlp = InternAttention(config, attn), InternMLP(config)
        self.norm1, self.norm2 = _norm(config), _norm(config)
        scale = config.initializer_factor * torch.ones(config.hidden_size)
        self.ls1, self.ls2 = nn.Parameter(scale), nn.Parameter(scale.clone())
        self.drop_path1, self.drop_path2 = _drop_path(drop_path_rate), _drop_path(drop_path_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1 + P, C) -> (N, 1 + P, C)."""
        x = x + self.drop_path1(self.attn(self.norm1(x)) * self.ls1)
        return x + self.drop_path2(self.mlp(self.norm2(x)) * self.ls2)


class InternVisionEncoder(nn.Module):
    """Transformer blocks; the stochastic depth rate increases linearly from 0 to the configured rate."""

    def __init__(self, config: InternVisionConfig, attn: str) -> None:
        super().__init__()
        depth = config.num_hidden_layers
        rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.layers = nn.ModuleList([InternVisionEncoderLayer(config, attn, rate) for rate in rates])


class InternVisionModel(nn.Module):
    """InternViT vision tower.

    Args:
        attn: attention implementation, as returned by `resolve_attention`.
    """

    def __init__(self, config: InternVisionConfig, attn: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config, attn)

    def forward(self, pixel_values: torch.Tensor, select_layer: int = -1) -> torch.Tensor:
        """Return the hidden state at `select_layer`, class token first; later layers do not run.

        Args:
            pixel_values: normalized tiles (N, 3, S, S).
            select_layer: index of the hidden state; 0 for the embeddings, -1 for the last layer's output.

        Returns:
            (N, 1 + P, C).
        """
        x = self.embeddings(pixel_values)
        for layer in self.encoder.layers[: self.layers_before(select_layer)]:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x

    def layers_before(self, select_layer: int) -> int:
        """Return the number of layers that compute the hidden state `select_layer` (see `forward`)."""
        return select_layer if select_layer >= 0 else len(self.encoder.layers) + 1 + select_layer

    @torch.no_grad()
    def resize_positions(self, image_size: int) -> None:
        """Interpolate the position embeddings for a different tile size in pixels, as in the reference."""
        grid = image_size // self.config.patch_size
        self.config.image_size = image_size
        embeddings = self.embeddings
        if grid != embeddings.grid:
            trained = embeddings.position_embedding.requires_grad
            embeddings.position_embedding = nn.Parameter(
                embeddings.positions(grid, grid), requires_grad=trained
            )
            embeddings.grid = grid

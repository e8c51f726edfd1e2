"""Attention for packed records and for image tiles, and selection of its implementation.

Shapes: B rows, H query heads, K key/value heads, L tokens, D features per head, S = number of segments + 1.
"""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from internvl_chat.constants import ATTENTION_NAMES
from internvl_chat.model.kernels.cpu.blocked_attention import blocked_attention
from internvl_chat.utils.errors import ModelError, UsageError

# Name of `varlen_attention` in transformers' registry.
VARLEN = "varlen"

_SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def pinned_sdpa(device: torch.device) -> AbstractContextManager[object]:
    """Return a context that excludes cuDNN's kernel from SDPA on a GPU.

    It leaves the flash, efficient and math kernels, in order of preference. cuDNN needs about 30 ms to plan
    each new shape (number of tiles, key length). On other devices, the context does nothing.
    """
    return sdpa_kernel(_SDPA_BACKENDS, set_priority=True) if device.type == "cuda" else nullcontext()


def resolve_attention(name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """Return the attention implementation for a device: one of `ATTENTION_NAMES` except `auto`.

    `auto` selects flash-attn if it is installed and supports the GPU and dtype, otherwise `varlen`. `varlen`
    uses torch's own flash kernel if the GPU supports it, otherwise SDPA for one record at a time.

    Args:
        name: one of `ATTENTION_NAMES`.

    Raises:
        UsageError: the name is unknown, or the device, dtype or installation does not support it.
    """
    if name not in ATTENTION_NAMES:
        raise UsageError(f"--attn {name!r} is unknown; choose one of {', '.join(ATTENTION_NAMES)}")
    obstacle = _flash_attention_obstacle(device, dtype)
    if name == "auto":
        return VARLEN if obstacle else "flash_attention_2"
    if name == "flash_attention_2" and obstacle:
        raise UsageError(f"--attn flash_attention_2 {obstacle}; use --attn auto")
    return name


def _flash_attention_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why the flash-attn package cannot be used; None if it can."""
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, but this run is on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return "supports half precision only, but this run uses float32"
    if find_spec("flash_attn") is None:
        return "needs the package flash-attn (pip install 'm3llm[flash]')"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs compute capability 8.0 or higher, but this GPU has {major}.{minor}"
    return None


# The segment boundaries vary from pack to pack, so they cannot be part of a compiled graph.
@torch.compiler.disable
def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Compute attention within each segment of a packed row, in transformers' calling convention.

    Args:
        query: (B, H, L, D); B is 1 with `cu_seq_lens_q`.
        key: (B, K, L, D).
        value: (B, K, L, D).
        attention_mask: must be None; segments are the only mask.
        scaling: scaling factor of the attention scores (default: 1 / sqrt(D)).
        dropout: attention dropout probability.
        cu_seq_lens_q: (S,) int32, start of each segment and end of the last; None if each row is a segment.
        max_length_q: length of the longest segment in tokens.
        is_causal: whether attention is causal (default: the layer's `is_causal`, or True).
        sliding_window: number of tokens that a token attends to, including itself.
        softcap: must be None; not supported.
        s_aux: must be None; attention sinks are not supported.

    Returns:
        (B, L, H, D), and None in place of the attention weights.
    """
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        raise ValueError(
            "varlen attention supports neither padding masks nor a KV cache; load the model with attn='sdpa'"
        )
    if softcap is not None or s_aux is not None:
        raise ModelError(
            "varlen attention supports neither soft capping nor attention sinks; use --attn eager"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if cu_seq_lens_q is not None and max_length_q is not None and _has_flash_kernel(query, dropout):
        window = ((sliding_window or 0) - 1, 0 if causal else -1)
        out = _flash_varlen(query, key, value, cu_seq_lens_q, max_length_q, window, scaling)
        return out.transpose(1, 2).contiguous(), None
    lengths = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    if causal and sliding_window is None and len(query) == 1 and _prefers_blocks(query, dropout):
        out = blocked_attention(query, key, value, lengths, scaling)
        return out.transpose(1, 2).contiguous(), None
    segments = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outs = [_sdpa(q, k, v, causal, sliding_window, dropout, scaling) for q, k, v in segments]
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Run SDPA on one segment: (B, H, L, D), (B, K, L, D), (B, K, L, D) -> (B, H, L, D)."""
    key, value = (_repeat_heads(x, query.shape[1]) for x in (key, value))
    length = query.shape[2]
    mask = None
    if window is not None and window < length:
        mask, causal = _band(length, window, causal, query.device), False
    with pinned_sdpa(query.device):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling
        )


def _prefers_blocks(query: torch.Tensor, dropout: float) -> bool:
    """Return whether to use blocked attention: on a CPU in bfloat16, it is up to twice as fast as SDPA."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and dropout == 0


def _band(length: int, window: int, causal: bool, device: torch.device) -> torch.Tensor:
    """Return the sliding-window mask, (L, L) bool."""
    distance = torch.arange(length, device=device).unsqueeze(1) - torch.arange(length, device=device)
    near = distance < window
    return near & (distance >= 0) if causal else near & (distance > -window)


def _repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat the key/value heads to match the query heads: (B, K, L, D) -> (B, H, L, D)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _has_flash_kernel(query: torch.Tensor, dropout: float) -> bool:
    """Return whether torch's own variable-length flash kernel supports these inputs.

    The meta device represents a GPU that supports it, so that memory can be planned without a GPU.
    """
    return (
        (query.is_cuda or query.is_meta)
        and query.dtype in (torch.bfloat16, torch.float16)
        and dropout == 0.0
        and (query.is_meta or torch.cuda.get_device_capability(query.device)[0] >= 8)
        and find_spec("torch.nn.attention.varlen") is not None
    )


def _flash_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int,
    window: tuple[int, int],
    scaling: float | None,
) -> torch.Tensor:
    """Run torch's variable-length flash attention on one packed row.

    Args:
        query: (1, H, L, D).
        key: (1, K, L, D).
        value: (1, K, L, D).
        cu_seq_lens: (S,) int32, segment boundaries.
        max_length: length of the longest segment in tokens.
        window: number of visible tokens to the left and to the right; -1 for all.
        scaling: scaling factor of the attention scores.

    Returns:
        (1, H, L, D).
    """
    from torch.nn.attention.varlen import varlen_attn

    shared: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    if not shared:
        key, value = (_repeat_heads(x, query.shape[1]) for x in (key, value))
    q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))  # (L, H, D)
    out: Any = varlen_attn(
        q, k, v, cu_seq_lens, cu_seq_lens, max_length, max_length, window_size=window, scale=scaling, **shared
    )
    return out.transpose(0, 1).unsqueeze(0)


AttentionInterface.register(VARLEN, varlen_attention)


def bidirectional_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, name: str, dropout: float = 0.0
) -> torch.Tensor:
    """Compute full (bidirectional) attention within each row, for the vision tower.

    Args:
        query: (B, H, L, D).
        key: (B, H, L, D).
        value: (B, H, L, D).
        name: attention implementation, as returned by `resolve_attention`; `varlen` uses SDPA here.
        dropout: attention dropout probability.

    Returns:
        (B, H, L, D).
    """
    if name == "eager":
        weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
        return F.dropout(weights, dropout, training=dropout > 0) @ value
    if name == "flash_attention_2" and query.dtype in (torch.bfloat16, torch.float16):
        from flash_attn import flash_attn_func

        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, L, H, D)
        return flash_attn_func(q, k, v, dropout_p=dropout).transpose(1, 2)
    if _prefers_blocks(query, dropout):
        tiles = zip(query * query.shape[-1] ** -0.5, key.transpose(-2, -1), value, strict=True)
        return torch.stack([(q @ k).softmax(dim=-1) @ v for q, k, v in tiles])
    # Pinned here, not around the tower, so that activation checkpointing recomputes with the same kernel.
    with pinned_sdpa(query.device):
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)

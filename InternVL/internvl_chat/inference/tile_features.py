"""Compute vision features in batches of tiles to limit memory use.

Shapes: N tiles, S pixels per side, K tokens per tile, F vision features per token.
"""

import torch

from internvl_chat.data.encode.tiling import normalize_tiles
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel

# Tiles per batch; larger batches are not faster.
_BATCH_SIZE = {"cpu": 8, "cuda": 64}


@torch.no_grad()
def tile_features(model: InternVLChatModel, tiles: torch.Tensor, normalization: str) -> torch.Tensor:
    """Return the vision features of tiles, without gradients.

    Args:
        model: model on the same device as the tiles.
        tiles: (N, S, S, 3) uint8; N may be 0.
        normalization: one of `NORMALIZATIONS`.

    Returns:
        (N, K, F).
    """
    if not len(tiles):
        return model.empty_features()
    parts = tiles.split(_BATCH_SIZE.get(tiles.device.type, _BATCH_SIZE["cuda"]))
    return torch.cat(
        [model.vision_features(normalize_tiles(part, normalization, model.pixel_dtype)) for part in parts]
    )

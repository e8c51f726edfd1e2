"""Vision features of tiles, a bounded number of tiles at a time."""

import torch

from internvl_chat.data.encode.tiling import normalize_tiles
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel

# Larger batches cost memory and save no time.
_TILES_AT_ONCE = {"cpu": 8, "cuda": 64}


@torch.no_grad()
def tile_features(model: InternVLChatModel, tiles: torch.Tensor, normalization: str) -> torch.Tensor:
    """Return the vision features of tiles, without gradients.

    Args:
        model: on the device of the tiles.
        tiles: (N, S, S, 3) uint8; N may be 0.
        normalization: name of the pixel statistics.

    Returns:
        (N, K, F).
    """
    if not len(tiles):
        return model.no_features()
    parts = tiles.split(_TILES_AT_ONCE.get(tiles.device.type, _TILES_AT_ONCE["cuda"]))
    return torch.cat(
        [model.vision_features(normalize_tiles(part, normalization, model.pixel_dtype)) for part in parts]
    )

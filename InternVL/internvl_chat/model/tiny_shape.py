"""The sizes of a small model, apart from what builds it, so that `--help` need not load torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TinyShape:
    """Sizes of a small model; the defaults train in minutes on two CPU cores.

    Attributes:
        image_size: side of a tile in pixels, a multiple of 28.
        vision_width: features of the vision tower.
        vision_layers: its blocks.
        vision_heads: its heads.
        width: features of the language model.
        layers: its blocks.
        heads: its query heads.
        kv_heads: its key/value heads.
    """

    image_size: int = 112
    vision_width: int = 96
    vision_layers: int = 2
    vision_heads: int = 4
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2

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

    def problems(self) -> list[str]:
        """Return what does not fit together, one sentence each."""
        found = []
        if self.width % self.heads or (self.width // self.heads) % 2:
            found.append(f"--width {self.width} must be an even multiple of --heads {self.heads}")
        if self.heads % self.kv_heads:
            found.append(f"--heads {self.heads} must be a multiple of --kv_heads {self.kv_heads}")
        if self.vision_width % self.vision_heads:
            found.append(
                f"--vision_width {self.vision_width} must be a multiple of --vision_heads {self.vision_heads}"
            )
        if self.image_size % 28:
            found.append(f"--image_size {self.image_size} must be a multiple of 28")
        return found

"""How text and images become model inputs: saved with every checkpoint, so that nothing drifts apart."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_chat.data.encode.conversation import SYSTEM_TEXTS
from internvl_chat.data.encode.tiling import NORMALIZATIONS
from internvl_chat.utils.errors import ModelError

PREPROCESSING_FILE = "preprocessing.json"
# The number of grids to compare grows with the cube of it.
MOST_TILES = 100


@dataclass(frozen=True)
class Preprocessing:
    """Everything that shapes the inputs but the tokenizer.

    Attributes:
        template: name of the conversation style.
        system_text: what the system message says where a record has none.
        tile_size: side of a tile in pixels.
        tokens_per_tile: language-model tokens of a tile.
        min_dynamic_patch: fewest tiles of an image.
        max_dynamic_patch: most tiles of a record; several images share them.
        dynamic_image_size: cut images into tiles; else one tile an image.
        use_thumbnail: append the whole image to several tiles.
        pad2square: pad instead of squeezing an image that is one tile.
        normalize_type: pixel statistics, a key of `NORMALIZATIONS`.
        max_seq_length: most tokens of a record.
    """

    template: str = "internvl2_5"
    system_text: str = SYSTEM_TEXTS["internvl2_5"]
    tile_size: int = 448
    tokens_per_tile: int = 256
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 12
    dynamic_image_size: bool = True
    use_thumbnail: bool = True
    pad2square: bool = False
    normalize_type: str = "imagenet"
    max_seq_length: int = 8192

    def __post_init__(self) -> None:
        if self.normalize_type not in NORMALIZATIONS:
            raise ModelError(
                f"normalize_type {self.normalize_type!r} is unknown; known are {', '.join(NORMALIZATIONS)}"
            )
        if not 1 <= self.min_dynamic_patch <= self.max_dynamic_patch:
            raise ModelError(
                f"min_dynamic_patch {self.min_dynamic_patch} must be from 1 to max_dynamic_patch "
                f"{self.max_dynamic_patch}"
            )
        if self.max_dynamic_patch > MOST_TILES:
            raise ModelError(f"max_dynamic_patch {self.max_dynamic_patch} must be at most {MOST_TILES}")

    @classmethod
    def from_folder(cls, folder: Path, model_config: Any) -> "Preprocessing":
        """Read a checkpoint's `preprocessing.json`, or derive it from the model's configuration.

        Args:
            folder: the checkpoint.
            model_config: an `InternVLChatConfig`, used where there is no such file.

        Raises:
            ModelError: the file is malformed or does not fit the model.
        """
        file = folder / PREPROCESSING_FILE
        if not file.is_file():
            return cls.from_model_config(model_config)
        loaded = cls.read(file)
        if loaded.tile_size != model_config.image_size:
            raise ModelError(
                f"{file}: tiles of {loaded.tile_size} pixels, but the model takes {model_config.image_size}"
            )
        if loaded.tokens_per_tile != model_config.tokens_per_tile:
            raise ModelError(
                f"{file}: {loaded.tokens_per_tile} tokens a tile, but the model makes "
                f"{model_config.tokens_per_tile}"
            )
        return loaded

    @classmethod
    def read(cls, file: Path) -> "Preprocessing":
        """Read a `preprocessing.json`.

        Raises:
            ModelError: it is malformed.
        """
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, ModelError) as error:
            raise ModelError(f"{file}: malformed: {error}") from None

    @classmethod
    def from_model_config(cls, model_config: Any) -> "Preprocessing":
        """Derive the settings from an `InternVLChatConfig`."""
        template = model_config.template or cls.template
        if template not in SYSTEM_TEXTS:
            raise ModelError(
                f"the conversation style {template!r} is unknown; known are {', '.join(SYSTEM_TEXTS)}"
            )
        return cls(
            template=template,
            system_text=SYSTEM_TEXTS[template],
            tile_size=model_config.image_size,
            tokens_per_tile=model_config.tokens_per_tile,
            min_dynamic_patch=model_config.min_dynamic_patch,
            max_dynamic_patch=model_config.max_dynamic_patch,
            dynamic_image_size=model_config.dynamic_image_size,
            use_thumbnail=model_config.use_thumbnail,
            pad2square=model_config.pad2square,
        )

    def save(self, folder: Path) -> None:
        """Write `preprocessing.json`."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        (folder / PREPROCESSING_FILE).write_text(text + "\n", encoding="utf-8")

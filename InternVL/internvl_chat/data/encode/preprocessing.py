"""Preprocessing options for text and images, saved with every checkpoint as `preprocessing.json`."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_chat.constants import BACKGROUNDS, MAX_TILES, NORMALIZATIONS, SYSTEM_TEXTS
from internvl_chat.data.encode.hf_image_options import read_image_options
from internvl_chat.data.sources.image_content import ImageOptions
from internvl_chat.utils.errors import ModelError
from internvl_chat.utils.files import write_json

PREPROCESSING_FILE = "preprocessing.json"
_KINDS: dict[Any, str] = {bool: "true or false", int: "an integer", str: "text"}


@dataclass(frozen=True)
class Preprocessing:
    """All options that determine the model's inputs, except the tokenizer.

    Attributes:
        template: name of the conversation template.
        system_text: system message of records without one.
        tile_size: side of a tile in pixels.
        tokens_per_tile: number of language-model tokens per tile.
        min_dynamic_patch: minimum number of tiles per image, not counting the thumbnail.
        max_dynamic_patch: maximum number of tiles per record, shared by its images; thumbnails do not count.
        dynamic_image_size: split images into tiles; otherwise each image is one tile.
        use_thumbnail: append a thumbnail tile to images that are split into more than one tile.
        pad2square: pad single-tile images to a square instead of changing their aspect ratio.
        normalize_type: pixel mean and standard deviation, a key of `NORMALIZATIONS`.
        max_seq_length: maximum number of tokens per record.
        image_background: color behind transparent pixels; `none` drops the transparency.
        exif_transpose: apply the rotation stored as EXIF orientation.
        escape_control_tokens: tokenize control tokens such as `<|im_end|>` in messages as plain text.
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
    image_background: str = "none"
    exif_transpose: bool = False
    escape_control_tokens: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type
            if type(value) is not kind:
                raise ModelError(f"{field.name} must be {_KINDS[kind]}, found {value!r}")
        if self.normalize_type not in NORMALIZATIONS:
            raise ModelError(
                f"unknown normalize_type {self.normalize_type!r}; choose one of {', '.join(NORMALIZATIONS)}"
            )
        if self.image_background not in BACKGROUNDS:
            raise ModelError(
                f"unknown image_background {self.image_background!r}; choose one of {', '.join(BACKGROUNDS)}"
            )
        if not 1 <= self.min_dynamic_patch <= self.max_dynamic_patch:
            raise ModelError(
                f"min_dynamic_patch {self.min_dynamic_patch} must be from 1 to max_dynamic_patch "
                f"{self.max_dynamic_patch}"
            )
        if self.max_dynamic_patch > MAX_TILES:
            raise ModelError(f"max_dynamic_patch {self.max_dynamic_patch} must be at most {MAX_TILES}")

    @classmethod
    def from_folder(
        cls, folder: Path, model_config: Any, *, max_dynamic_patch: int | None = None
    ) -> "Preprocessing":
        """Read a checkpoint's options.

        They are read from `preprocessing.json`. Without this file, they are derived from the model's
        configuration and, if present, transformers' processor files.

        Args:
            folder: the checkpoint.
            model_config: an `InternVLChatConfig`.
            max_dynamic_patch: overrides the checkpoint's tile limit; None to keep it.

        Raises:
            ModelError: a file is malformed or does not match the model.
        """
        stored = stored_options(folder)
        if stored is None:
            return cls.from_model_config(model_config).with_tile_limit(max_dynamic_patch)
        file, values = stored
        for name, model_name in (("tile_size", "image_size"), ("tokens_per_tile", "tokens_per_tile")):
            model_value = getattr(model_config, model_name)
            if values.get(name, model_value) != model_value:
                raise ModelError(
                    f"{file}: {name} is {values[name]}, but {model_value} in the model's configuration"
                )
        if file.name == PREPROCESSING_FILE:
            return cls(**values).with_tile_limit(max_dynamic_patch)
        try:
            options = dataclasses.replace(cls.from_model_config(model_config), **values)
        except ModelError as error:
            raise ModelError(f"{file}: {error}") from None
        return options.with_tile_limit(max_dynamic_patch)

    def with_tile_limit(self, max_dynamic_patch: int | None) -> "Preprocessing":
        """Return the options with a different maximum number of tiles; None keeps the current one.

        A minimum above the new maximum is lowered to it.
        """
        if max_dynamic_patch is None:
            return self
        min_tiles = min(self.min_dynamic_patch, max_dynamic_patch)
        return dataclasses.replace(self, max_dynamic_patch=max_dynamic_patch, min_dynamic_patch=min_tiles)

    def with_options(self, **options: Any) -> "Preprocessing":
        """Return the options with the given changes; None keeps the current value."""
        return dataclasses.replace(self, **{name: v for name, v in options.items() if v is not None})

    @property
    def image_options(self) -> ImageOptions:
        """Options for transparency and EXIF rotation."""
        return ImageOptions(self.image_background, self.exif_transpose)

    @classmethod
    def read(cls, file: Path) -> "Preprocessing":
        """Read a `preprocessing.json`.

        Raises:
            ModelError: the file is malformed.
        """
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, ModelError) as error:
            raise ModelError(f"{file}: malformed: {error}") from None

    @classmethod
    def from_model_config(cls, model_config: Any) -> "Preprocessing":
        """Derive the options from an `InternVLChatConfig`."""
        template = model_config.template or cls.template
        if template not in SYSTEM_TEXTS:
            raise ModelError(
                f"unknown conversation template {template!r}; choose one of {', '.join(SYSTEM_TEXTS)}"
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
        write_json(folder / PREPROCESSING_FILE, dataclasses.asdict(self))


def stored_options(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the path to a folder's preprocessing file and its options; None if there is no such file.

    Raises:
        ModelError: the file is malformed.
    """
    file = folder / PREPROCESSING_FILE
    if file.is_file():
        return file, dataclasses.asdict(Preprocessing.read(file))
    return read_image_options(folder)

"""Read image options from the processor files of a model in transformers' format."""

import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

from internvl_chat.constants import NORMALIZATIONS
from internvl_chat.utils.errors import ModelError, format_problems

# Newer transformers releases save all settings in `processor_config.json`, under `image_processor`.
IMAGE_PROCESSOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
_PROCESSOR = "GotOcr2ImageProcessor"
# Settings with a single supported value.
_FIXED = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": int(Image.Resampling.BICUBIC),
}


def read_image_options(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the file with a model's image settings and its content as fields of `Preprocessing`.

    Returns None if the folder has no settings for InternVL's image processor. Folders in the reference's
    format have CLIP settings instead, which are not used.

    As in transformers, the tile limits default to 1 and 12, and `crop_to_patches` has no effect, because
    `InternVLProcessor` always splits images.

    Raises:
        ModelError: a file is malformed or has unsupported settings; the message lists all of these.
    """
    processor = _read(folder / PROCESSOR_FILE)
    file, settings = folder / PROCESSOR_FILE, processor.get("image_processor")
    if not isinstance(settings, dict):
        file = folder / IMAGE_PROCESSOR_FILE
        settings = _read(file)
    if not (str(settings.get("image_processor_type")).startswith(_PROCESSOR) or "max_patches" in settings):
        return None
    options, problems = _parse(settings)
    if "image_seq_length" in processor:
        options["tokens_per_tile"] = processor["image_seq_length"]
    if problems:
        raise ModelError(f"{file}: {format_problems(problems)}")
    return file, options


def _read(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty if the file does not exist."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: must be a JSON object")
    return content


def _parse(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return an image processor's settings as `Preprocessing` options, and a message for each problem."""
    problems = [
        f"{name} is {settings[name]!r}; only {value!r} is supported"
        for name, value in _FIXED.items()
        if settings.get(name) is not None and settings[name] != value
    ]
    factor = settings.get("rescale_factor")
    if factor is not None and not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        problems.append(f"rescale_factor is {factor!r}; only 1/255 is supported")
    options: dict[str, Any] = {}
    for name, option, default in (
        ("min_patches", "min_dynamic_patch", 1),
        ("max_patches", "max_dynamic_patch", 12),
    ):
        options[option] = default if settings.get(name) is None else settings[name]
        if isinstance(options[option], bool) or not isinstance(options[option], int):
            problems.append(f"{name} is {options[option]!r}; it must be an integer")
    if isinstance(settings.get("use_thumbnail"), bool):
        options["use_thumbnail"] = settings["use_thumbnail"]
    if (side := _side(settings.get("size"))) is not None:
        options["tile_size"] = side
    elif settings.get("size") is not None:
        problems.append(
            f"size is {settings['size']!r}; expected an integer, or equal 'height' and 'width' "
            "(tiles must be square)"
        )
    statistics = [settings.get("image_mean"), settings.get("image_std")]
    if None not in statistics:
        options["normalize_type"] = next((k for k, v in NORMALIZATIONS.items() if _same(statistics, v)), None)
        if options["normalize_type"] is None:
            problems.append(
                f"image_mean and image_std are {statistics}; only those of {', '.join(NORMALIZATIONS)} are "
                "supported"
            )
    return options, problems


def _side(size: Any) -> int | None:
    """Return the side length if a size is an integer or has equal height and width; otherwise None."""
    if isinstance(size, dict) and size.get("height") == size.get("width"):
        size = size.get("height")
    return size if isinstance(size, int) else None


def _same(statistics: list[Any], known: tuple[tuple[float, ...], ...]) -> bool:
    """Return whether a mean and standard deviation match known ones; a number applies to all channels."""
    for values, expected in zip(statistics, known, strict=True):
        channels = values if isinstance(values, list) else [values] * len(expected)
        numeric = all(isinstance(value, int | float) for value in channels)
        if not numeric or len(channels) != len(expected):
            return False
        if not all(math.isclose(v, e, abs_tol=1e-4) for v, e in zip(channels, expected, strict=True)):
            return False
    return True

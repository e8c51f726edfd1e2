"""Export preprocessing options to transformers' `InternVLProcessor`.

Tested with transformers 5.24 and `GotOcr2ImageProcessor`. The Pillow backend gives identical pixels; the
torchvision backend interpolates differently.
"""

import json
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase

from internvl_chat.constants import (
    IM_END,
    IM_START,
    IMAGE_PLACEHOLDER,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    NORMALIZATIONS,
)
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.utils.errors import ModelError
from internvl_chat.utils.files import write_json

PROCESSOR_CLASS = "InternVLProcessor"

# The processor requires a video token; this one is not used in prompts.
_UNUSED_TOKEN = "</quad>"

_TEMPLATE = """\
{%- if not messages or messages[0].role != 'system' -%}
    {{- '@START@system\\n' + @SYSTEM@ + '@END@\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set ns = namespace(text='') -%}
    {%- if message.content is string -%}
        {%- set ns.text = message.content -%}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}
                {%- set ns.text = ns.text + '@PLACEHOLDER@\\n' -%}
            {%- elif part.type == 'text' -%}
                {%- set ns.text = ns.text + part.text -%}
            {%- else -%}
                {{- raise_exception('a part of a message must be text or an image') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {%- set ns.text = ns.text.replace('@PLACEHOLDER@', '@CONTEXT@') -%}
    {%- endif -%}
    {{- '@START@' + message.role + '\\n' + ns.text + '@END@\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '@START@assistant\\n' -}}
{%- endif -%}
"""


def chat_template(system_text: str) -> str:
    """Return the conversation template as a Jinja chat template.

    A message's content is text with `<image>` placeholders, or a list of parts. An image part becomes a
    placeholder and a newline, as in records.

    Args:
        system_text: system message of conversations without one.
    """
    literal = json.dumps(system_text, ensure_ascii=False)
    marks = {
        "@START@": IM_START,
        "@END@": IM_END,
        "@PLACEHOLDER@": IMAGE_PLACEHOLDER,
        "@CONTEXT@": IMG_CONTEXT,
        "@SYSTEM@": literal,
    }
    text = _TEMPLATE
    for mark, value in marks.items():
        text = text.replace(mark, value)
    return text


def unsupported_options(preprocessing: Preprocessing) -> list[str]:
    """Return a message for each option whose value transformers' processor does not support."""
    messages = []
    splits_images = preprocessing.dynamic_image_size and preprocessing.max_dynamic_patch > 1
    if splits_images and not preprocessing.use_thumbnail:
        messages.append("use_thumbnail is False, but transformers' processor always adds a thumbnail")
    if preprocessing.pad2square and not preprocessing.dynamic_image_size:
        messages.append("pad2square is True, but transformers' processor cannot pad")
    for name in ("image_background", "exif_transpose", "escape_control_tokens"):
        value = getattr(preprocessing, name)
        if value != getattr(Preprocessing, name):
            messages.append(f"{name} is {value}, which transformers' processor does not support")
    return messages


def image_processor_settings(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the contents of `preprocessor_config.json`."""
    mean, deviation = NORMALIZATIONS[preprocessing.normalize_type]
    one_tile = not preprocessing.dynamic_image_size
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": PROCESSOR_CLASS,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": preprocessing.tile_size, "width": preprocessing.tile_size},
        "resample": int(Image.Resampling.BICUBIC),
        "crop_to_patches": True,
        "min_patches": 1 if one_tile else preprocessing.min_dynamic_patch,
        "max_patches": 1 if one_tile else preprocessing.max_dynamic_patch,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(deviation),
    }


def save_hf_processor(
    tokenizer: PreTrainedTokenizerBase, preprocessing: Preprocessing, folder: Path, max_length: int
) -> None:
    """Save the tokenizer, chat template and processor files for transformers' `AutoProcessor`.

    Args:
        tokenizer: tokenizer with InternVL's special tokens.
        preprocessing: options to export.
        folder: output folder.
        max_length: maximum sequence length of the model in tokens.

    Raises:
        ModelError: transformers' processor does not support an option; the message lists all of them.
    """
    problems = unsupported_options(preprocessing)
    if problems:
        raise ModelError("this model cannot be exported to transformers' format: " + "; ".join(problems))
    template = chat_template(preprocessing.system_text)
    tokenizer.save_pretrained(str(folder))
    write_json(folder / "tokenizer_config.json", _tokenizer_settings(folder, max_length))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    images = image_processor_settings(preprocessing)
    write_json(folder / "preprocessor_config.json", images)
    videos = {key: value for key, value in images.items() if not key.endswith(("_type", "_patches"))}
    videos["video_processor_type"] = "InternVLVideoProcessor"
    write_json(folder / "video_preprocessor_config.json", videos)
    write_json(
        folder / "processor_config.json",
        {"processor_class": PROCESSOR_CLASS, "image_seq_length": preprocessing.tokens_per_tile},
    )


def _tokenizer_settings(folder: Path, max_length: int) -> dict[str, Any]:
    """Return the saved `tokenizer_config.json` with the processor's tokens and the maximum length.

    The chat template is removed, because it is saved in a separate file. The arguments with which the
    tokenizer was loaded are removed, too.
    """
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in ("chat_template", "is_local", "local_files_only"):
        settings.pop(key, None)
    return settings | {
        "processor_class": PROCESSOR_CLASS,
        "model_max_length": max_length,
        "extra_special_tokens": {
            "start_image_token": IMG_START,
            "end_image_token": IMG_END,
            "context_image_token": IMG_CONTEXT,
            "video_token": _UNUSED_TOKEN,
        },
    }

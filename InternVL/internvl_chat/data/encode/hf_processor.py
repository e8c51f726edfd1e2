"""Preprocessing in the files that transformers' own InternVL processor reads, so that both prepare alike.

Checked against transformers 5.24: `InternVLProcessor` with `GotOcr2ImageProcessor`. With its Pillow backend
the pixels are the same; its torchvision backend interpolates otherwise.
"""

import json
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase

from internvl_chat.constants import IM_END, IM_START, IMAGE_PLACEHOLDER, IMG_CONTEXT, IMG_END, IMG_START
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tiling import NORMALIZATIONS
from internvl_chat.utils.errors import ModelError

PROCESSOR_CLASS = "InternVLProcessor"

# The processor asks for a token that stands for a video; nothing writes this one.
_NO_VIDEO = "</quad>"

_TEMPLATE = """\
{%- if not messages or messages[0].role != 'system' -%}
    {{- '@START@system\\n' + @SYSTEM@ + '@END@\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set turn = namespace(text='') -%}
    {%- if message.content is string -%}
        {%- set turn.text = message.content -%}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}
                {%- set turn.text = turn.text + '@PLACEHOLDER@\\n' -%}
            {%- elif part.type == 'text' -%}
                {%- set turn.text = turn.text + part.text -%}
            {%- else -%}
                {{- raise_exception('a part of a message must be text or an image') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {%- set turn.text = turn.text.replace('@PLACEHOLDER@', '@CONTEXT@') -%}
    {%- endif -%}
    {{- '@START@' + message.role + '\\n' + turn.text + '@END@\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '@START@assistant\\n' -}}
{%- endif -%}
"""


def chat_template(system_text: str) -> str:
    """Return the conversation style as a Jinja template.

    A message's content is text with `<image>` placeholders, or a list of parts, where an image is its
    placeholder and a newline, as in records of `messages`.

    Args:
        system_text: of conversations without a system message.
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


def unknown_options(preprocessing: Preprocessing) -> list[str]:
    """Return the settings that transformers' processor cannot have, one sentence each."""
    found = []
    several = preprocessing.dynamic_image_size and preprocessing.max_dynamic_patch > 1
    if several and not preprocessing.use_thumbnail:
        found.append("use_thumbnail is off, but transformers' processor always adds the thumbnail")
    if preprocessing.pad2square and not preprocessing.dynamic_image_size:
        found.append("pad2square is on, but transformers' processor cannot pad")
    return found


def image_processor_settings(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return `preprocessor_config.json`."""
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
    """Write tokenizer, chat template and processor so that transformers' `AutoProcessor` loads them.

    Args:
        tokenizer: with InternVL's special tokens.
        preprocessing: how inputs are made.
        folder: an existing folder.
        max_length: most tokens that the model takes.

    Raises:
        ModelError: transformers' processor cannot do what the preprocessing asks for; lists all.
    """
    problems = unknown_options(preprocessing)
    if problems:
        raise ModelError("this model cannot be exported to transformers' format: " + "; ".join(problems))
    template = chat_template(preprocessing.system_text)
    tokenizer.save_pretrained(str(folder))
    _write_json(folder / "tokenizer_config.json", _tokenizer_settings(folder, max_length))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    images = image_processor_settings(preprocessing)
    _write_json(folder / "preprocessor_config.json", images)
    videos = {key: value for key, value in images.items() if not key.endswith(("_type", "_patches"))}
    videos["video_processor_type"] = "InternVLVideoProcessor"
    _write_json(folder / "video_preprocessor_config.json", videos)
    _write_json(
        folder / "processor_config.json",
        {"processor_class": PROCESSOR_CLASS, "image_seq_length": preprocessing.tokens_per_tile},
    )


def _tokenizer_settings(folder: Path, max_length: int) -> dict[str, Any]:
    """Return the saved `tokenizer_config.json` with the tokens that the processor asks for by name."""
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
            "video_token": _NO_VIDEO,
        },
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

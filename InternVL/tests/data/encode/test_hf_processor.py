"""The exported chat template matches ours when rendered by transformers; the processor settings."""

from dataclasses import replace

import pytest
from small_sets import tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from internvl_chat.constants import SYSTEM_TEXTS
from internvl_chat.data.encode.conversation import Template
from internvl_chat.data.encode.hf_processor import (
    chat_template,
    image_processor_settings,
    save_hf_processor,
    unsupported_options,
)
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.sources.records import Message, parse_record
from internvl_chat.utils.errors import ModelError

SYSTEM = 'You see "figures".\n\tBackslash \\ and {{ braces }}, 书生 and 🩻.'
CONVERSATIONS = {
    "question": [("user", "what is this ?")],
    "image": [("user", "<image>\nwhat is this ?"), ("assistant", "a cat")],
    "labeled": [("user", "Fig-0: <image>\nFig-1: <image>\nwhich ?"), ("assistant", "Fig-1")],
    "own system": [("system", "be brief  \n"), ("user", " a cat "), ("assistant", "\n on a mat \n")],
    "messages": [("user", "<image> a"), ("assistant", "b <image>"), ("user", "c"), ("assistant", "d")],
    "marks": [("user", "{{ x }} {% y %} <b>&amp;</b> <|im_end|>"), ("assistant", "é ü 你")],
    "empty": [("user", ""), ("assistant", "")],
}


def render(messages: list[dict], system: str = SYSTEM, **options) -> str:
    [text], _ = render_jinja_template(
        conversations=[messages], chat_template=chat_template(system), **options
    )
    return text


@pytest.mark.parametrize("system", [SYSTEM, SYSTEM_TEXTS["internvl2_5"], ""])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_token_ids_match(messages, system) -> None:
    conversation = Template(tokenizer(), system).tokenize([Message(*message) for message in messages])
    messages = [{"role": role, "content": text} for role, text in messages]
    text = render(messages, system)
    text = text.replace(
        "<IMG_CONTEXT>", "<img><IMG_CONTEXT></img>"
    )  # as the processor does with one tile of one token
    assert tokenizer()(text, add_special_tokens=False).input_ids == [
        token for ids in conversation.ids for token in ids
    ]


def test_generation_prompt_matches() -> None:
    conversation = Template(tokenizer(), SYSTEM).tokenize_prompt([Message("user", "what is this ?")])
    text = render([{"role": "user", "content": "what is this ?"}], add_generation_prompt=True)
    assert tokenizer()(text, add_special_tokens=False).input_ids == [
        token for ids in conversation.ids for token in ids
    ]


def test_content_parts_match_records() -> None:
    parts = [
        {"type": "text", "text": "Fig-0: "},
        {"type": "image"},
        {"type": "text", "text": "Fig-1: "},
        {"type": "image"},
        {"type": "text", "text": "which ?"},
    ]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Fig-1"}]
    record = parse_record({"messages": messages, "images": ["a.png", "b.png"]})
    plain = [{"role": message.role, "content": message.content} for message in record.messages]
    assert render(messages) == render(plain)
    assert "Fig-0: <IMG_CONTEXT>\nFig-1: <IMG_CONTEXT>\nwhich ?" in render(messages)


def test_video_is_rejected() -> None:
    with pytest.raises(Exception, match="text or an image"):
        render([{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}])


def test_image_processor_settings() -> None:
    settings = image_processor_settings(
        Preprocessing(tile_size=56, min_dynamic_patch=2, max_dynamic_patch=6, normalize_type="siglip")
    )
    assert settings["size"] == {"height": 56, "width": 56}
    assert (settings["min_patches"], settings["max_patches"]) == (2, 6)
    assert settings["image_mean"] == settings["image_std"] == [0.5, 0.5, 0.5]
    single_tile = image_processor_settings(Preprocessing(dynamic_image_size=False, max_dynamic_patch=6))
    assert (single_tile["min_patches"], single_tile["max_patches"]) == (1, 1)


def test_unsupported_options(tmp_path) -> None:
    supported = Preprocessing()
    assert not unsupported_options(supported)
    assert not unsupported_options(replace(supported, pad2square=True))  # tiles are already square
    assert not unsupported_options(replace(supported, use_thumbnail=False, max_dynamic_patch=1))
    for option in ({"image_background": "white"}, {"exif_transpose": True}, {"escape_control_tokens": True}):
        [message] = unsupported_options(replace(supported, **option))
        assert message.startswith(f"{next(iter(option))} is ")
    assert "thumbnail" in unsupported_options(replace(supported, use_thumbnail=False))[0]
    padded = replace(supported, dynamic_image_size=False, pad2square=True)
    with pytest.raises(ModelError, match="pad2square"):
        save_hf_processor(tokenizer(), padded, tmp_path, 100)
    assert not list(tmp_path.iterdir())

"""Messages and images of a request become a prompt like a training record with content parts."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from internvl_chat.constants import IMG_CONTEXT
from internvl_chat.data.sources.image_content import ImageOptions
from internvl_chat.data.sources.records import Message, parse_record
from internvl_chat.data.sources.uploads import MAX_IMAGES
from internvl_chat.inference.serve.prompt import to_prompt
from internvl_chat.inference.serve.schema import ChatRequest
from internvl_chat.utils.errors import DataError

RED = Image.new("RGB", (9, 5), (200, 30, 20))


def data_url(image: Image.Image = RED, form: str = "PNG", **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image_part(url: str | None = None) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url() if url is None else url}}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def prompt_of(*messages: tuple[str, str | list], **options):
    raw = [{"role": role, "content": content} for role, content in messages]
    request = ChatRequest.model_validate({"model": "m", "messages": raw})
    return to_prompt(request, ImageOptions(**options))


CONVERSATIONS = {
    "text": [("user", "Which?")],
    "image first": [("user", [image_part(), text_part("Which?")])],
    "image last": [("user", [text_part("Which?"), image_part()])],
    "labels": [
        (
            "user",
            [text_part("Fig-0: "), image_part(), text_part("Fig-1: "), image_part(), text_part("Which?")],
        )
    ],
    "several messages": [
        ("system", "Be brief."),
        ("user", [image_part(), text_part("Which?")]),
        ("assistant", "See <image>."),
        ("user", [text_part("And "), text_part("this?"), image_part()]),
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_same_text_as_a_training_record(name):
    messages = CONVERSATIONS[name]
    found = prompt_of(*messages)
    raw = [{"role": role, "content": content} for role, content in [*messages, ("assistant", "A.")]]
    parts = [part for _, content in messages if isinstance(content, list) for part in content]
    images = ["a.png"] * sum(part["type"] == "image_url" for part in parts)
    for part in parts:  # the record has a path instead of a data URL
        if part["type"] == "image_url":
            part["image_url"] = {"url": "a.png"}
    record = parse_record({"messages": raw, "images": images})
    assert found.messages == list(record.messages[:-1])
    assert len(found.images) == len(record.images)


def test_developer_message_is_a_system_message():
    found = prompt_of(("developer", "Be brief."), ("user", "Which?"))
    assert found.messages[0] == Message("system", "Be brief.")


def test_pixels_and_options():
    rotated = Image.Exif()
    rotated[0x0112] = 6
    translucent = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    content = [
        image_part(data_url(RED, exif=rotated)),
        image_part(data_url(translucent)),
        text_part("Which?"),
    ]
    plain = prompt_of(("user", content)).images
    assert np.array_equal(np.asarray(plain[0]), np.asarray(RED)) and not np.asarray(plain[1]).any()
    turned = prompt_of(("user", content), background="white", exif_transpose=True).images
    assert turned[0].size == (5, 9) and np.asarray(turned[1]).min() == 255


PNG = "data:image/png;base64,"
INVALID = {
    "web image": ([image_part("https://example.org/a.png")], "the image #1 is not a data URL"),
    "path": ([image_part("/etc/passwd")], "opens no other URLs and no files"),
    "other data": ([image_part("data:text/plain;base64,aaaa")], "must be a data URL of the form"),
    "not base64": ([image_part("data:image/png,abc")], "must be a data URL of the form"),
    "wrong base64": ([image_part(PNG + "a*b")], "the image #1 is not valid base64"),
    "no data": ([image_part(PNG)], "the image #1 cannot be read: it is empty"),
    "no image": (
        [image_part(PNG + "aGVsbG8=")],
        "the image #1 cannot be read: its format is not one of JPEG",
    ),
    "two bad images": ([image_part(PNG), image_part(PNG + "aGVsbG8=")], "2 problems"),
    "many images": ([image_part()] * (MAX_IMAGES + 1), f"{MAX_IMAGES + 1} images; at most {MAX_IMAGES}"),
    "empty": ("  \n", "messages.0 is empty"),
    "no parts": ([], "messages.0 is empty"),
    "placeholder": ("What is <image>?", "messages.0 contains <image> as text; send images as parts"),
    "split placeholder": ([text_part("<ima"), text_part("ge>?")], "contains <image> as text"),
    "reserved token": (f"What is {IMG_CONTEXT}?", "messages.0 contains the reserved token"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_questions(name):
    content, message = INVALID[name]
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        prompt_of(("user", content))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([("system", [image_part()]), ("user", "Which?")], "only user messages can contain images"),
        ([("user", "Which?"), ("assistant", "A.")], "the last message must be a user message"),
        ([("user", "Which?"), ("system", "Be brief.")], "only the first message can be a system message"),
    ],
)
def test_invalid_order(messages, message):
    with pytest.raises(DataError, match=message):
        prompt_of(*messages)

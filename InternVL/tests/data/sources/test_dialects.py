"""Keys, placeholders and control tokens of other frameworks, and similar ones that are not."""

import pytest
from fuzzing import time_limit

from internvl_chat.data.sources.dialects import (
    control_tokens,
    file_in_text,
    foreign_placeholder,
    is_supervised,
    misplaced_image,
    split_control_tokens,
    unread_media,
    unread_message_fields,
    unread_record_fields,
)


class TestMedia:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("image_path", "0001"),
            ("images_path", ["a.png"]),
            ("Image", "a.png"),
            ("IMG", "a.png"),
            ("imageFile", "a.png"),
            ("image_1", "a.png"),
            ("image1_path", "a.png"),
            ("img_path_2", "a.png"),
            ("image.url", "https://example.org/1"),
            ("input_image", "a"),
            ("image_base64", "/9j/4AAQ"),
            ("picture", "a.webp"),
            ("media", [{"type": "image", "path": "a.png"}]),
            ("frames", ["f1.jpg", "f2.jpg"]),
            ("video", "clip.mp4"),
            ("audios", ["a.wav"]),
        ],
    )
    def test_found(self, key, value):
        assert unread_media({key: value}, ("image",), ()).startswith(f"unsupported key {key!r} refers to ")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("image", "a.png"),  # supported
            ("image_id", "a.png"),
            ("image_caption", "A scan"),
            ("image_size", [3, 4]),
            ("image_width", "640"),
            ("media", "newspaper"),
            ("picture", "a village"),
            ("img", None),
            ("images_path", []),
            ("video", False),
            ("audio_length", 3.5),
            ("x" * 1000, "a.png"),
        ],
    )
    def test_ignored(self, key, value):
        assert unread_media({key: value}, ("image",), ()) is None

    def test_copy_of_a_supported_name(self):
        raw = {"image": "sub/a.png", "image_path": "/data/sub/a.png"}
        assert unread_media(raw, ("image",), ["sub/a.png"]) is None
        assert unread_media({**raw, "image_path": "/data/b.png"}, ("image",), ["sub/a.png"]) is not None


CERTAIN = [
    "<image 1>",
    "<image1>",
    "<image_2>",
    "<Image>",
    "<IMAGE>",
    "<ImageHere>",
    "<image_placeholder>",
    "<image_soft_token>",
    "<start_of_image>",
    "<image_start>",
    "<DEFAULT_IMAGE_TOKEN>",
    "<im_patch>",
    "<|image_pad|>",
    "<|vision_start|>",
    "<|image_1|>",
    "<|image|>",
    "<|begin_of_image|>",
    "&lt;image&gt;",
    "<img></img>",
    "<img>a.png</img>",
    "</image>",
]
POSSIBLE = [
    "<img>",
    "<video>",
    "<images>",
    "<Picture 1>",
    "[IMG]",
    "[image 2]",
    "<img src='a.png'>",
    "![x](a.png)",
    "{image}",
    "<image/>",
    "<图片>",
]


class TestPlaceholders:
    @pytest.mark.parametrize("text", CERTAIN)
    def test_certain(self, text):
        assert foreign_placeholder(f"See {text} here", possible=False)

    @pytest.mark.parametrize("text", POSSIBLE)
    def test_possible(self, text):
        assert foreign_placeholder(f"See {text} here", possible=True) == text
        assert foreign_placeholder(f"See {text} here", possible=False) is None

    @pytest.mark.parametrize(
        "text", ["<image>", "a <imaging> b", "Fig-1", "an image [1]", "p < 0.05 > q", "<b>"]
    )
    def test_none(self, text):
        assert foreign_placeholder(text, possible=True) is None

    @pytest.mark.parametrize("start", ["<image", "<|image", "<start_", "![", "<img ", "<img>", "{"])
    @pytest.mark.parametrize("repeated", ["1", "_pad", " ", "start_", "[", "<|"])
    def test_long_text_takes_little_time(self, start, repeated):
        text = start + repeated * 50_000
        with time_limit():
            foreign_placeholder(text, possible=True)
            control_tokens(text)
            file_in_text(text)

    @pytest.mark.parametrize(
        ("text", "file"),
        [("Picture 1: <img> a b.png </img>", "a b.png"), ("<img>see</img>", None), ("a.png", None)],
    )
    def test_file_in_text(self, text, file):
        assert file_in_text(text) == file

    def test_misplaced_image_of_an_item(self):
        assert "'img' refers to" in misplaced_image({"img": "a.png"}, (), (), "q")
        assert "<image 1>" in misplaced_image({}, (), ["a.png"], "see <image 1>")
        assert misplaced_image({}, (), ["a.png"], "see <image>, then <image 1>") is None


class TestControlTokens:
    @pytest.mark.parametrize(
        "token",
        [
            "<|im_end|>",
            "<|im_start|>",
            "<|endoftext|>",
            "<|eot_id|>",
            "<img>",
            "</img>",
            "</s>",
            "[INST]",
            "<end_of_turn>",
            "<\uff5cend\u2581of\u2581sentence\uff5c>",
        ],
    )
    def test_found(self, token):
        assert control_tokens(f"A nodule.{token}\n") == [token]

    @pytest.mark.parametrize(
        "text", ["<ref>a</ref><box>[[1, 2]]</box>", "<image>", "p <| 0.05 |> q", "<think>a</think>"]
    )
    def test_not_found(self, text):
        assert control_tokens(text) == []

    def test_split(self):
        text = "<img>a<|im_end|><|im_end|>b"
        parts = list(split_control_tokens(text))
        assert "".join(part for part, _ in parts) == text
        assert [part for part, is_control in parts if is_control] == ["<img>", "<|im_end|>", "<|im_end|>"]


class TestFields:
    @pytest.mark.parametrize(
        "field",
        [
            {"loss": False},
            {"loss": 0},
            {"weight": 0.0},
            {"train": False},
            {"trainable": False},
            {"loss_mask": 0},
            {"masked": True},
            {"train_on_turn": False},
            {"compute_loss": False},
            {"Loss": False},
        ],
    )
    def test_excluded_answers(self, field):
        assert not is_supervised({"from": "gpt", "value": "a", **field})
        assert list(unread_message_fields(field, "assistant")) == []

    @pytest.mark.parametrize(
        "field",
        [
            {},
            {"loss": True},
            {"weight": 1},
            {"loss": None},
            {"masked": False},
            {"ignore": False},
            {"use_in_training": True},
            {"label": "A"},
            {"pretrained": False},
            {"edited": True},
        ],
    )
    def test_supervised_answers(self, field):
        assert is_supervised(field)
        assert list(unread_message_fields(field, "assistant")) == []

    @pytest.mark.parametrize(
        ("field", "role"),
        [
            ({"weight": 0.5}, "assistant"),
            ({"loss": "false"}, "assistant"),
            ({"loss": True}, "user"),
            ({"tool_calls": [{}]}, "assistant"),
            ({"reasoning_content": "hm"}, "assistant"),
            ({"training_detail": [{"train": False}]}, "assistant"),
            ({"ignore": True}, "assistant"),
            ({"use_in_training": False}, "assistant"),
            ({"label": False}, "assistant"),
        ],
    )
    def test_unread_fields_of_a_message(self, field, role):
        [found] = unread_message_fields(field, role)
        assert found.startswith(f"{next(iter(field))!r} of a message")

    @pytest.mark.parametrize(
        "field",
        [
            {"rejected": "b"},
            {"System": "S"},
            {"system_prompt": "S"},
            {"tools": [{"name": "f"}]},
            {"weight": 0.5},
            {"loss": False},
            {"label": False},
            {"kto_tag": False},
            {"history": [["a", "b"]]},
            {"loss_mask": [0, 1]},
            {"train": False},
            {"masked": True},
        ],
    )
    def test_unread_fields_of_a_record(self, field):
        [found] = unread_record_fields(field)
        assert found.startswith(repr(next(iter(field))))

    @pytest.mark.parametrize(
        "field",
        [
            {"system": "S"},
            {"weight": 1},
            {"label": True},
            {"label": "CT"},
            {"tools": "[]"},
            {"rejected": None},
        ],
    )
    def test_fields_without_a_meaning(self, field):
        assert list(unread_record_fields(field)) == []

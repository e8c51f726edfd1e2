"""Warnings about usable records; further warnings are tested together with their records."""

from pathlib import Path

import pytest
from small_sets import image_record, text_record

from internvl_chat.data.sources.record_warnings import record_warnings
from internvl_chat.data.sources.records import parse_record


def warnings_of(raw: dict, root: Path = Path("/nowhere"), **options) -> dict[str, str]:
    return dict(record_warnings(raw, parse_record(raw), root, **options))


def test_none():
    raw = {**text_record(0, system="Be brief."), "source": "PMC", "choices": ["yes", "no"], "weight": 1}
    assert warnings_of(raw) == warnings_of(image_record(1, "a.png", "b.png")) == {}


class TestPlaceholders:
    def test_in_the_system_message(self):
        raw = image_record(0, "a.png")
        raw["conversations"].insert(0, {"from": "system", "value": "You see <image>."})
        assert "'<image>' in the system message" in warnings_of(raw)["unsupported placeholder"]

    def test_placeholder_added_as_in_the_reference(self):
        raw = image_record(0, "a.png") | {"image": "a.png"}
        raw["conversations"].insert(0, {"from": "system", "value": "S"})
        assert parse_record(raw).messages[0].content == "<image>\nS"
        assert warnings_of(raw) == {}

    @pytest.mark.parametrize("images", [[], ["a.png"]])
    def test_ambiguous_ones_without_image_placeholder(self, images):
        raw = text_record(0, image=images)
        raw["conversations"][0]["value"] = "[IMG] what?"
        assert "'[IMG]' in message 1" in warnings_of(raw)["unsupported placeholder"]

    def test_ambiguous_ones_with_image_placeholder(self):
        raw = image_record(0, "a.png")
        raw["conversations"][0]["value"] += " [IMG] ![](x.png)"
        assert warnings_of(raw) == {}

    def test_unambiguous_ones_with_image_placeholder(self):
        raw = image_record(0, "a.png")
        raw["conversations"][0]["value"] += " <image 1>"
        assert "<image 1>" in warnings_of(raw)["unsupported placeholder"]


def test_control_tokens():
    raw = text_record(0, answer="A nodule.<|im_end|>")
    assert "'<|im_end|>' in message 2" in warnings_of(raw)["control token"]
    assert warnings_of(raw, escaped=True) == {}


class TestFields:
    def test_second_conversation(self):
        other = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        raw = text_record(0)
        assert "second conversation" in warnings_of({**raw, "messages": other})["ignored field"]
        same = [{"role": "user", "content": m["value"]} for m in raw["conversations"]]
        assert warnings_of({**raw, "messages": same}) == {}

    def test_all_fields_of_a_record_in_one_warning(self):
        raw = text_record(0, rejected="b", tools=[{"name": "f"}])
        raw["conversations"][1]["weight"] = 0.5
        message = warnings_of(raw)["ignored field"]
        assert all(name in message for name in ("'rejected'", "'tools'", "'weight' of a message (0.5"))

    @pytest.mark.parametrize("field", [{"image": ""}, {"image": False}, {"images": {}}])
    def test_empty_image(self, field):
        assert next(iter(field)) in warnings_of(text_record(0, **field))["ignored field"]

    @pytest.mark.parametrize("field", [{"image": None}, {"images": []}])
    def test_no_image(self, field):
        assert warnings_of(text_record(0, **field)) == {}
        assert warnings_of(image_record(0, "a.png") | {"images": ""}) == {}

    @pytest.mark.parametrize("field", [{"attachment": "a.png"}, {"attachments": [{"file": "a.png"}]}])
    def test_file_in_a_message_or_part(self, tmp_path, field):
        (tmp_path / "a.png").touch()
        raw = text_record(0)
        raw["conversations"][0] |= field
        assert "'a.png'" in warnings_of(raw, tmp_path)["ignored file"]
        raw = text_record(0)
        raw["conversations"][0]["value"] = [{"type": "text", "text": "Q", **field}]
        assert "'a.png'" in warnings_of(raw, tmp_path)["ignored file"]

    @pytest.mark.parametrize("value", ["a.png", ["x.png", "a.png"], {"file": "a.png"}])
    def test_value_that_is_a_file(self, tmp_path, value):
        (tmp_path / "a.png").touch()
        raw = text_record(0, source_figure=value)
        assert (
            "'source_figure' refers to the existing file 'a.png'"
            in warnings_of(raw, tmp_path)["ignored file"]
        )
        assert warnings_of(raw, tmp_path / "other") == {}
        assert warnings_of(image_record(0, "a.png", source="a.png"), tmp_path) == {}


class TestEmptyMessages:
    @pytest.mark.parametrize(
        ("number", "text", "part"),
        [
            (1, "", "empty question in message 1"),
            (1, "nan", "the text of message 1 is 'nan'"),
            (2, " NaN\n", "the text of message 2"),
            (2, "<NA>", "the text of message 2"),
        ],
    )
    def test_text(self, number, text, part):
        raw = text_record(0)
        raw["conversations"][number - 1]["value"] = text
        assert part in warnings_of(raw)["empty message"]

    def test_question_that_is_an_image(self):
        raw = image_record(0, "a.png")
        raw["conversations"][0]["value"] = "<image>"
        assert warnings_of(raw) == {}
        raw["conversations"][0]["value"] = "<image>\nnan"
        assert "missing value" in warnings_of(raw)["empty message"]

    def test_word_that_is_an_answer(self):
        assert warnings_of(text_record(0, answer="None")) == {}

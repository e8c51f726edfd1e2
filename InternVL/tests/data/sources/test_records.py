"""Records in all supported formats, and the error messages for all others."""

import pytest

from internvl_chat.data.sources.problems import RecordError
from internvl_chat.data.sources.records import Message, Record, parse_record

ASK, ANSWER = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}
MESSAGES = (Message("user", "What?"), Message("assistant", "This."))


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def problem_of(raw) -> str:
    with pytest.raises(RecordError) as caught:
        parse_record(raw)
    return str(caught.value)


class TestFormats:
    def test_conversations(self):
        raw = {"id": "a1", "conversations": [ASK, ANSWER], "source": "ignored"}
        assert parse_record(raw) == Record("a1", MESSAGES, ())

    def test_messages(self):
        raw = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]}
        assert parse_record(raw) == Record(None, MESSAGES, ())

    @pytest.mark.parametrize("role", ["human", "user"])
    @pytest.mark.parametrize("answer_role", ["gpt", "assistant"])
    def test_role_names_mix(self, role, answer_role):
        raw = {"conversations": [{"from": role, "value": "What?"}, {"from": answer_role, "value": "This."}]}
        assert parse_record(raw).messages == MESSAGES

    def test_conversations_take_precedence_over_messages(self):
        raw = {"conversations": [ASK, ANSWER], "messages": [{"role": "user", "content": "else"}]}
        assert parse_record(raw).messages == MESSAGES

    def test_content_parts(self):
        parts = [
            {"type": "text", "text": "A: "},
            {"type": "image"},
            {"type": "text", "text": "B: "},
            {"type": "image"},
            {"type": "text", "text": "Which?"},
        ]
        answer = {"role": "assistant", "content": [{"type": "text", "text": "This."}]}
        raw = {"messages": [{"role": "user", "content": parts}, answer], "images": ["a.png", "b.png"]}
        record = parse_record(raw)
        assert record.messages == (
            Message("user", "A: <image>\nB: <image>\nWhich?"),
            Message("assistant", "This."),
        )
        assert record.images == ("a.png", "b.png")

    @pytest.mark.parametrize("key", ["image", "path"])
    def test_images_of_content_parts(self, key):
        parts = [
            {"type": "image", key: "a.png"},
            {"type": "image", key: "b.png"},
            {"type": "text", "text": "?"},
        ]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "This."}]
        assert parse_record({"messages": messages}).images == ("a.png", "b.png")
        del parts[1][key]
        assert "2 <image> placeholders in the human messages, but 1 images" in problem_of(
            {"messages": messages}
        )
        parts[1][key] = 3
        assert "'image' must be a path or a list of paths" in problem_of({"messages": messages})

    @pytest.mark.parametrize(
        "part", [{"type": "video"}, {"type": "text"}, {"type": "text", "text": 3}, "a", {}]
    )
    def test_content_part_of_another_kind(self, part):
        raw = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]}
        assert "message 1 has a content part that is neither text nor an image" in problem_of(raw)

    @pytest.mark.parametrize(("given", "parsed"), [("x", "x"), (7, "7"), (0, "0"), (None, None)])
    def test_id(self, given, parsed):
        assert parse_record({"id": given, "conversations": [ASK, ANSWER]}).id == parsed

    def test_many_messages(self):
        texts = ["a", "", " b \n", "中\n\n", "<|im_end|>", "c"]
        entries = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        messages = parse_record({"conversations": entries}).messages
        assert [message.content for message in messages] == texts
        assert [message.role for message in messages] == ["user", "assistant"] * 3


class TestImages:
    @pytest.mark.parametrize("none", [{}, {"image": None}, {"image": ""}, {"image": []}, {"images": None}])
    def test_none(self, none):
        assert parse_record({"conversations": [ASK, ANSWER], **none}) == Record(None, MESSAGES, ())

    @pytest.mark.parametrize("given", [{"image": "a.png"}, {"image": ["a.png"]}, {"images": ["a.png"]}])
    def test_one_with_its_placeholder(self, given):
        record = parse_record({"conversations": [human("See <image>: what?"), ANSWER], **given})
        assert record.messages[0].content == "See <image>: what?"
        assert record.images == ("a.png",)

    @pytest.mark.parametrize("given", ["a.png", ["a.png"]])
    def test_one_without_placeholder_precedes_the_first_message(self, given):
        record = parse_record({"conversations": [ASK, ANSWER, human("And?"), ANSWER], "image": given})
        assert [message.content for message in record.messages] == [
            "<image>\nWhat?",
            "This.",
            "And?",
            "This.",
        ]

    def test_placeholder_in_a_later_message(self):
        record = parse_record(
            {"conversations": [ASK, ANSWER, human("<image>And?"), ANSWER], "image": "a.png"}
        )
        assert [message.content for message in record.messages] == ["What?", "This.", "<image>And?", "This."]

    def test_placeholder_of_the_assistant_is_text(self):
        answer = {"from": "gpt", "value": "An <image>."}
        record = parse_record({"conversations": [ASK, answer], "image": "a.png"})
        assert [message.content for message in record.messages] == ["<image>\nWhat?", "An <image>."]

    def test_several_in_order(self):
        record = parse_record(
            {
                "conversations": [human("<image><image>"), ANSWER, human("<image>"), ANSWER],
                "image": ["c", "a", "b"],
            }
        )
        assert record.images == ("c", "a", "b")

    @pytest.mark.parametrize(
        ("text", "images", "placeholders"),
        [
            ("What?", ["a", "b"], 0),
            ("<image>", ["a", "b"], 1),
            ("<image><image>", ["a"], 2),
            ("<image><image><image>", ["a", "b"], 3),
            ("<image>", [], 1),
            ("<image><image>", "a", 2),
        ],
    )
    def test_error_names_both_counts(self, text, images, placeholders):
        count = 1 if images == "a" else len(images)
        message = problem_of({"conversations": [human(text), ANSWER], "image": images})
        assert f"{placeholders} <image> placeholders" in message
        assert f"{count} images" in message

    @pytest.mark.parametrize("wrong", [3, {"path": "a.png"}, ["a.png", None], [""], [["a.png"]], True])
    def test_not_a_path(self, wrong):
        assert "'image' must be a path or a list of paths" in problem_of(
            {"conversations": [human("<image>"), ANSWER], "image": wrong}
        )

    def test_one_but_no_human_message(self):
        assert "no human message for its placeholder" in problem_of(
            {"conversations": [ANSWER], "image": "a.png"}
        )


class TestSystem:
    def test_first(self):
        record = parse_record({"conversations": [{"from": "system", "value": "Be brief."}, ASK, ANSWER]})
        assert record.messages == (Message("system", "Be brief."), *MESSAGES)

    @pytest.mark.parametrize("position", [1, 2])
    def test_later_is_an_error(self, position):
        entries = [ASK, ANSWER]
        entries.insert(position, {"from": "system", "value": "Be brief."})
        assert "a system message must be the first message" in problem_of({"conversations": entries})

    @pytest.mark.parametrize(
        ("system", "question", "image", "system_read", "question_read"),
        [
            # A string: the reference adds a placeholder to the first message unless that message has one.
            ("S", "<image>\nQ", "a.png", "<image>\nS", "<image>\nQ"),
            ("", "<image>\nQ", "a.png", "<image>\n", "<image>\nQ"),
            ("S <image>", "<image>\nQ", "a.png", "S <image>", "<image>\nQ"),
            # A list: no placeholder is added.
            ("S", "<image>\nQ", ["a.png"], "S", "<image>\nQ"),
            # Without a placeholder, the image precedes the first human message.
            ("S", "Q", "a.png", "S", "<image>\nQ"),
            ("S", "Q", ["a.png"], "S", "<image>\nQ"),
            ("S <image>", "Q", "a.png", "S <image>", "<image>\nQ"),
            # No image.
            ("S", "Q", "", "S", "Q"),
            ("S", "Q", None, "S", "Q"),
        ],
    )
    def test_with_an_image(self, system, question, image, system_read, question_read):
        entries = [{"from": "system", "value": system}, human(question), ANSWER]
        record = parse_record({"conversations": entries, "image": image})
        assert [message.content for message in record.messages] == [system_read, question_read, "This."]

    def test_string_image_without_system_gets_one_placeholder(self):
        record = parse_record({"conversations": [human("Q <image>"), ANSWER], "image": "a.png"})
        assert record.messages[0].content == "Q <image>"


class TestProblems:
    @pytest.mark.parametrize(("raw", "kind"), [([], "list"), (None, "NoneType"), ("a", "str"), (3, "int")])
    def test_not_an_object(self, raw, kind):
        assert problem_of(raw) == f"a record must be a JSON object, found {kind}"

    @pytest.mark.parametrize(
        "raw",
        [
            {},
            {"conversations": []},
            {"conversations": None},
            {"conversations": {"from": "gpt"}},
            {"messages": []},
        ],
    )
    def test_no_conversation(self, raw):
        assert "no conversation" in problem_of(raw)

    @pytest.mark.parametrize(
        "message", ["hi", None, {}, {"from": "gpt"}, {"value": "a"}, {"role": "user", "content": "a"}]
    )
    def test_not_a_message(self, message):
        message = problem_of({"conversations": [ASK, message]})
        assert message == "message 2 must be an object with 'from' and 'value'"

    def test_not_a_message_of_messages(self):
        assert problem_of({"messages": [ASK]}) == "message 1 must be an object with 'role' and 'content'"

    @pytest.mark.parametrize("role", ["bot", "Human", "", None, 1, ["gpt"]])
    def test_unknown_role(self, role):
        message = problem_of({"conversations": [ASK, {"from": role, "value": "a"}]})
        assert f"message 2 has the unknown role {role!r}" in message

    @pytest.mark.parametrize(("value", "kind"), [(None, "NoneType"), (3, "int"), ({"a": 1}, "dict")])
    def test_text_of_another_type(self, value, kind):
        message = problem_of({"conversations": [ASK, {"from": "gpt", "value": value}]})
        assert message == f"message 2: 'value' must be text, found {kind}"

    @pytest.mark.parametrize("entries", [[ASK], [ASK, ASK], [{"from": "system", "value": "S"}, ASK]])
    def test_no_assistant_message(self, entries):
        assert "no assistant message" in problem_of({"conversations": entries})

    @pytest.mark.parametrize("role", ["system", "human", "gpt"])
    def test_reserved_token(self, role):
        entries = [{"from": role, "value": "a <IMG_CONTEXT> b"}, ASK, ANSWER]
        problem = problem_of({"conversations": entries})
        assert problem == "message 1 contains the reserved token <IMG_CONTEXT>; remove it"


@pytest.mark.parametrize("empty", [None, "", []])
def test_images_with_an_empty_image(empty):
    messages = [human("<image> What?"), {"from": "gpt", "value": "That."}]
    record = parse_record({"image": empty, "images": ["a.png"], "conversations": messages})
    assert record.images == ("a.png",)


class TestParts:
    @staticmethod
    def parts(*parts, kind: str = "messages", **raw) -> dict:
        question = [*parts, {"type": "text", "text": "What?"}]
        if kind == "conversations":
            return {"conversations": [{"from": "human", "value": question}, ANSWER], **raw}
        answer = {"role": "assistant", "content": "This."}
        return {"messages": [{"role": "user", "content": question}, answer], **raw}

    @pytest.mark.parametrize("kind", ["messages", "conversations"])
    @pytest.mark.parametrize("key", ["image", "path", "url"])
    def test_order_that_differs_from_the_list(self, kind, key):
        names = ["s/a.png", "s/b.png"]
        raw = self.parts(*({"type": "image", key: name} for name in names), kind=kind)
        assert parse_record({**raw, "images": names}).images == tuple(names)
        message = problem_of({**raw, "images": names[::-1]})
        assert message == "image 1 is 's/a.png' in the messages, but 's/b.png' in the record's list"

    def test_path_with_more_folders(self):
        raw = self.parts({"type": "image", "image": "/data/s/a.png"}, image="s/a.png")
        assert parse_record(raw).images == ("s/a.png",)
        assert "image 1 is" in problem_of({**raw, "image": "t/a.png"})

    def test_placeholders_in_text_count(self):
        raw = self.parts({"type": "image", "image": "b.png"}, images=["a.png", "b.png"])
        raw["messages"] = [
            {"role": "user", "content": "<image> Q"},
            {"role": "assistant", "content": "A"},
            *raw["messages"],
        ]
        assert parse_record(raw).images == ("a.png", "b.png")

    def test_unset_keys(self):
        raw = self.parts({"type": "image", "image": "a.png", "url": None, "text": None})
        raw["messages"][0]["content"][1]["image"] = None
        assert parse_record(raw).images == ("a.png",)

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            ({"type": "text", "text": "Q", "image": "a.png"}, "text part with the key 'image'"),
            ({"type": "image", "image": "a.png", "text": "Q"}, "image part with text"),
            ({"type": "image", "image": "a", "path": "b"}, "an image part refers to both 'a' and 'b'"),
            ({"type": "image_url", "image": "a", "image_url": {"url": "b"}}, "refers to both 'a' and 'b'"),
        ],
    )
    def test_ambiguous(self, part, message):
        assert message in problem_of(self.parts(part))


def test_both_image_and_images():
    messages = [human("<image> What?"), {"from": "gpt", "value": "That."}]
    raw = {"image": "a.png", "images": ["b.png"], "conversations": messages}
    assert "both 'image' and 'images'" in problem_of(raw)


class TestSystemField:
    def test_is_the_system_message(self):
        record = parse_record({"system": "Be brief.", "conversations": [ASK, ANSWER]})
        assert record.messages == (Message("system", "Be brief."), *MESSAGES)

    @pytest.mark.parametrize("image", ["a.png", ["a.png"]])
    def test_with_an_image(self, image):
        record = parse_record({"system": "S", "image": image, "conversations": [human("<image>\nQ"), ANSWER]})
        assert [message.content for message in record.messages] == ["S", "<image>\nQ", "This."]

    @pytest.mark.parametrize("empty", [None, ""])
    def test_empty(self, empty):
        assert parse_record({"system": empty, "conversations": [ASK, ANSWER]}).messages == MESSAGES

    def test_beside_a_system_message(self):
        entries = [{"from": "system", "value": "S"}, ASK, ANSWER]
        assert parse_record({"system": "S", "conversations": entries}).messages[0] == Message("system", "S")
        assert "the 'system' field differs from the conversation's system message" in problem_of(
            {"system": "T", "conversations": entries}
        )

    @pytest.mark.parametrize("value", [3, ["S"], {"text": "S"}])
    def test_of_another_type(self, value):
        assert "'system' must be text" in problem_of({"system": value, "conversations": [ASK, ANSWER]})

    @pytest.mark.parametrize(
        ("text", "part"), [("a\ud800", "not valid Unicode"), ("<IMG_CONTEXT>", "reserved")]
    )
    def test_text_that_cannot_be_encoded(self, text, part):
        assert f"'system' {'is ' if 'not' in part else 'contains the '}{part}" in problem_of(
            {"system": text, "conversations": [ASK, ANSWER]}
        )


class TestSupervision:
    @pytest.mark.parametrize("field", [{"loss": False}, {"weight": 0}, {"loss": 0.0}, {"train": False}])
    @pytest.mark.parametrize("kind", ["conversations", "messages"])
    def test_excluded_answer(self, field, kind):
        if kind == "conversations":
            entries = [ASK, {**ANSWER, **field}, ASK, {**ANSWER, "loss": True}]
        else:
            ask, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
            entries = [ask, {**answer, **field}, ask, answer]
        messages = parse_record({kind: entries}).messages
        assert [message.supervised for message in messages] == [True, False, True, True]

    def test_questions_are_not_affected(self):
        record = parse_record({"conversations": [{**ASK, "loss": False}, ANSWER]})
        assert record.messages == MESSAGES

    def test_no_answer_is_left(self):
        message = problem_of({"conversations": [ASK, {**ANSWER, "weight": 0}]})
        assert message == "no answer is supervised: 'loss' or 'weight' excludes all answers"


class TestUnreadImages:
    def kind_of(self, raw) -> str:
        with pytest.raises(RecordError) as caught:
            parse_record(raw)
        return caught.value.kind

    @pytest.mark.parametrize("key", ["image_path", "images_path", "Image", "img", "IMAGES", "image_url"])
    @pytest.mark.parametrize("value", ["a.png", ["a.png"]])
    def test_under_another_key(self, key, value):
        assert self.kind_of({key: value, "conversations": [ASK, ANSWER]}) == "unsupported media"

    @pytest.mark.parametrize("raw", [{"video": "a.mp4"}, {"audio": ["a.wav"]}, {"media": "a.png"}])
    def test_other_media(self, raw):
        assert self.kind_of({**raw, "conversations": [ASK, ANSWER]}) == "unsupported media"
        assert self.kind_of({**raw, "image": "b.png", "conversations": [ASK, ANSWER]}) == "unsupported media"

    def test_in_a_message(self):
        assert self.kind_of({"conversations": [{**ASK, "image": "a.png"}, ANSWER]}) == "unsupported media"
        raw = {"image": ["a.png"], "conversations": [{**human("<image>"), "image": "a.png"}, ANSWER]}
        assert parse_record(raw).images == ("a.png",)

    def test_in_the_text(self):
        assert "unsupported <img> tag with 'a.png'" in problem_of(
            {"conversations": [human("<img>a.png</img> Q"), ANSWER]}
        )

    @pytest.mark.parametrize("text", ["<image 1>", "<|vision_start|><|image_pad|>", "<ImageHere>", "<IMAGE>"])
    @pytest.mark.parametrize("images", [[], ["a.png"]])
    def test_placeholder_of_another_framework(self, text, images):
        raw = {"image": images, "conversations": [ASK, ANSWER, human(f"Look: {text}"), ANSWER]}
        assert self.kind_of(raw) == "placeholders"
        assert "message 3 contains the unsupported placeholder" in problem_of(raw)

    def test_wrong_number_names_the_other_placeholder(self):
        raw = {"image": ["a", "b"], "conversations": [human("<image> and <image 2>"), ANSWER]}
        assert problem_of(raw).endswith("but 2 images; '<image 2>' is not a placeholder")

    def test_image_url_of_a_content_part(self):
        parts = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "Q"}]
        raw = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}]}
        assert parse_record(raw).images == ("a.png",)
        parts[0]["image_url"] = "b.png"
        assert parse_record(raw).images == ("b.png",)

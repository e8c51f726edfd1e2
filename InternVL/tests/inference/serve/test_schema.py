"""Unsupported and invalid parameters are reported by name, all at once."""

import json

import pytest
from pydantic import ValidationError

from internvl_chat.inference.sampling import Sampling
from internvl_chat.inference.serve.schema import ChatRequest, ImagePart, TextPart, describe_errors

ASKED = {"model": "m", "messages": [{"role": "user", "content": "Which panel?"}]}


def parse(**changes) -> ChatRequest:
    return ChatRequest.model_validate_json(json.dumps({**ASKED, **changes}))


def problem(body: str | bytes | dict) -> tuple[str, str | None]:
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate_json(body if isinstance(body, str | bytes) else json.dumps(body))
    return describe_errors(caught.value)


def test_text_is_one_part():
    [message] = parse().messages
    assert message.content == [TextPart(type="text", text="Which panel?")]


def test_parts():
    content = [
        {"type": "image_url", "image_url": {"url": "data:", "detail": "auto"}},
        {"type": "text", "text": "?"},
    ]
    [message] = parse(messages=[{"role": "user", "content": content}]).messages
    assert [type(part) for part in message.content] == [ImagePart, TextPart]


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "logit_bias": {}},
        {"tools": None, "tool_choice": "auto", "functions": None, "top_logprobs": None, "temperature": None},
        {"response_format": {"type": "text"}, "store": False, "user": "someone", "metadata": {}},
        {"top_k": -1, "repetition_penalty": 1.0, "min_p": 0, "top_p": 1, "stream_options": None},
    ],
)
def test_parameters_without_effect(changes):
    assert parse(**changes).sampling is None


def test_answers_of_the_official_client_are_accepted():
    """Conversations repeat the fields of earlier answers."""
    answer = {"role": "assistant", "content": "A.", "refusal": None, "annotations": [], "audio": None,
              "function_call": None, "tool_calls": None}  # fmt: skip
    assert len(parse(messages=[*ASKED["messages"], answer, *ASKED["messages"]]).messages) == 3


@pytest.mark.parametrize(
    ("changes", "sampling"),
    [
        ({}, None),
        ({"temperature": 0, "top_p": 0.5, "seed": 1}, None),
        ({"temperature": 1e-9}, None),
        ({"temperature": 1}, Sampling(1.0)),
        ({"temperature": 0.5, "top_p": 0.9, "seed": -7}, Sampling(0.5, 0.9, -7)),
    ],
)
def test_sampling(changes, sampling):
    assert parse(**changes).sampling == sampling


@pytest.mark.parametrize(
    ("changes", "length"),
    [({}, None), ({"max_tokens": 5}, 5), ({"max_completion_tokens": 6}, 6),
     ({"max_tokens": 7, "max_completion_tokens": 7}, 7)],
)  # fmt: skip
def test_length(changes, length):
    assert parse(**changes).max_new_tokens == length


def test_stop_is_text_or_a_list():
    assert parse(stop="a").stop == ["a"]
    assert parse(stop=["a", "b"]).stop == ["a", "b"]


INVALID = {
    "tools": ({"tools": [{"type": "function"}]}, "the parameter 'tools' is not supported"),
    "n": ({"n": 2}, "the parameter 'n' is not supported (2; supported: 1)"),
    "unknown": ({"best": 1}, "the parameter 'best' is not supported"),
    "temperature": ({"temperature": 2.5}, "temperature: must be less than or equal to 2, found 2.5"),
    "seed": ({"seed": 1 << 63}, "seed: must be less than 9223372036854775808"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens: must be greater than or equal to 1, found 0"),
    "true": ({"max_tokens": True}, "max_tokens: must be a valid integer, found True"),
    "lengths": ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens and max_completion_tokens differ"),
    "top_p": ({"top_p": 0.5}, "top_p requires temperature"),
    "stream_options": ({"stream_options": {"include_usage": True}}, "stream_options requires stream"),
    "empty stop": ({"stop": ""}, "stop.0: String should have at least 1 character, found ''"),
    "stops": ({"stop": ["a"] * 5}, "stop: List should have at most 4 items"),
    "no message": ({"messages": []}, "messages: List should have at least 1 item"),
    "role": (
        {"messages": [{"role": "tool", "content": "x"}]},
        "messages.0.role: must be 'system', 'developer', 'user' or 'assistant', found 'tool'",
    ),
    "no role": ({"messages": [{"content": "x"}]}, "the parameter 'messages.0.role' is missing"),
    "content": ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: must be a valid array"),
    "no object": ({"messages": ["hello"]}, "messages.0 must be a JSON object, found 'hello'"),
    "no content": ({"messages": [{"role": "user"}]}, "the parameter 'messages.0.content' is missing"),
    "name": ({"messages": [{"role": "user", "content": "x", "name": "a"}]}, "messages.0.name' is not"),
    "audio": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages.0.content.0: 'type' 'input_audio' is not supported; supported: 'text', 'image_url'",
    ),
    "detail": (
        {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:", "detail": "high"}}]}]},
        "the parameter 'messages.0.content.0.image_url.detail' is not supported",
    ),
    "no text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "the parameter 'messages.0.content.0.text' is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_invalid_parameters(name):
    changes, message = INVALID[name]
    assert message in problem({**ASKED, **changes})[0]


def test_all_problems_are_reported_at_once():
    message, parameter = problem({"messages": 3, "temperature": -1, "tools": [1]})
    assert message.startswith("4 problems") and parameter == "model"
    assert all(name in message for name in ("'model' is missing", "messages", "temperature", "'tools'"))
    many = problem({**ASKED, "messages": [{"role": "tool", "content": "x"}] * 500})[0]
    assert many.endswith("and 490 more") and len(many) < 2000


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "not valid JSON: EOF"),
        (b"\xff", "not valid JSON"),
        ("[" * 100000, "not valid JSON: recursion limit"),
        ('{"model": "\\ud800"}', "not valid JSON"),
        ('{"temperature": NaN}', "temperature: must be a finite number"),
        ("[]", "the request must be a JSON object"),
        ("null", "the request must be a JSON object"),
    ],
)
def test_malformed_json(body, message):
    assert message in problem(body)[0]

"""The client of OpenAI-compatible endpoints: messages, errors and unusual servers."""

import base64
import io
import json

import numpy as np
import pytest
from browser import served
from fastapi import FastAPI, Request, Response
from PIL import Image

from internvl_chat.convert.endpoint import Endpoint, EndpointAnswer, as_parts, chat_messages
from internvl_chat.data.sources.records import Message
from internvl_chat.inference.engine import Prompt, ask
from internvl_chat.utils.errors import DataError, ModelError, UsageError

IMAGES = [Image.fromarray(np.full((4, 6, 3), value, np.uint8)) for value in (10, 200)]


def test_messages():
    prompt = ask("Which?", IMAGES, system="Be brief.").then("The first.", "Why?")
    system, question, answer, last = chat_messages(prompt)
    assert system == {"role": "system", "content": "Be brief."}
    assert answer == {"role": "assistant", "content": "The first."}
    assert last == {"role": "user", "content": "Why?"}
    parts = question["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "text", "image_url", "text"]
    assert [part["text"] for part in parts[::2]] == ["Fig-0: ", "Fig-1: ", "Which?"]
    for part, image in zip(parts[1::2], IMAGES, strict=True):
        data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(image))


def test_rendered_parts_have_a_newline_after_each_image():
    question = "Is <image> like <image>\nin the scan?"
    prompt = Prompt((Message("user", question), Message("assistant", "See <image>.")), IMAGES)
    rendered = as_parts(prompt)
    assert [message.content for message in rendered.messages] == [
        "Is <image>\n like <image>\nin the scan?",
        "See <image>.",
    ]
    assert as_parts(rendered) == rendered
    same = ask("Which?", IMAGES)
    assert list(as_parts(same).messages) == list(same.messages)


RESPONSES: dict[str, Response] = {}


@pytest.fixture(scope="module")
def url():
    app = FastAPI()
    app.state.requests = []

    @app.get("/v1/models")
    def models() -> Response:
        return RESPONSES["models"]

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        RESPONSES["request"] = (request.headers.get("authorization"), await request.json())
        return RESPONSES["chat"]

    with served(app) as address:
        yield address


def reply(content: object, status: int = 200) -> Response:
    text = content if isinstance(content, str) else json.dumps(content)
    return Response(text, status, media_type="application/json")


def completion(text: str | None, usage: object = None) -> Response:
    return reply({"choices": [{"message": {"content": text}}], "usage": usage})


@pytest.fixture(autouse=True)
def one_model():
    RESPONSES["models"] = reply({"data": [{"id": "m"}]})


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_answer(url, suffix):
    RESPONSES["chat"] = completion(" The scan. \n", {"prompt_tokens": 12})
    endpoint = Endpoint(url + suffix, api_key="secret")
    assert endpoint.answer(ask("Which?"), 7) == EndpointAnswer("The scan.", 12)
    key, body = RESPONSES["request"]
    assert key == "Bearer secret"
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Which?"}],
        "max_tokens": 7,
        "temperature": 0,
    }


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None}, {"prompt_tokens": "12"}])
def test_no_usage(url, usage):
    RESPONSES["chat"] = completion(None, usage)
    assert Endpoint(url, model="other").answer(ask("Which?"), 7) == EndpointAnswer("", None)
    assert RESPONSES["request"][1]["model"] == "other"


@pytest.mark.parametrize(
    ("response", "error", "message"),
    [
        (reply({"error": {"message": "too long"}}, 400), DataError, "HTTP status 400: too long"),
        (reply({"error": "too long"}, 422), DataError, "HTTP status 422: too long"),
        (reply({"message": "too many images"}, 400), DataError, "HTTP status 400: too many images"),
        (reply("<html>" + "x" * 9999, 500), DataError, "HTTP status 500: <html>xxx"),
        (reply({"error": {"message": "no key"}}, 401), ModelError, "no key; pass the key with --api_key"),
        (reply("hello"), ModelError, "/v1/chat/completions: the response is not OpenAI-compatible"),
        (reply({"choices": []}), ModelError, "not OpenAI-compatible"),
        (reply({"choices": [{"message": {"content": ["a"]}}]}), ModelError, "not OpenAI-compatible"),
        (reply("[" * 99_999), ModelError, "not OpenAI-compatible"),
        (reply([]), ModelError, "not OpenAI-compatible"),
        (
            reply({"choices": [{"message": {"content": "a"}}], "usage": 3}),
            ModelError,
            "not OpenAI-compatible",
        ),
    ],
)
def test_errors(url, response, error, message):
    RESPONSES["chat"] = response
    with pytest.raises(error, match=message) as caught:
        Endpoint(url).answer(ask("Which?"), 7)
    assert len(str(caught.value)) < 500


def test_choice_of_the_model(url):
    RESPONSES["models"] = reply({"data": [{"id": "a"}, {"id": "b"}]})
    with pytest.raises(UsageError, match=r"2 models; choose one with --served_model_name: \['a', 'b'\]"):
        Endpoint(url)
    RESPONSES["models"] = reply({"detail": "Not Found"}, 404)
    with pytest.raises(ModelError, match="HTTP status 404"):
        Endpoint(url)


def test_unreachable():
    with pytest.raises(ModelError, match=r"http://127\.0\.0\.1:9/v1 cannot be reached: .*refused"):
        Endpoint("http://127.0.0.1:9")
    for url in ("localhost:8000", "file:///etc/passwd", "ftp://host"):
        with pytest.raises(UsageError, match="must begin with http:// or https://"):
            Endpoint(url)


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        ("http://[::1", None, r"--endpoint http://\[::1: Invalid IPv6 URL"),
        ("http://user:secret@localhost", None, "pass the key with --api_key instead of the URL"),
        ("http://localhost", "secret\n", "characters other than printable ASCII"),
        ("http://localhost", "sécret", "characters other than printable ASCII"),
    ],
)
def test_invalid_url_or_key(url, key, message):
    with pytest.raises(UsageError, match=message) as caught:
        Endpoint(url, api_key=key)
    assert "cret" not in str(caught.value)

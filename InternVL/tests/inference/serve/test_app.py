"""The official OpenAI client works against the server, and bad requests get clear errors."""

import asyncio
import base64
import contextlib
import gc
import io
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from browser import served
from helpers import tensor_bytes
from inference.prompts import picture
from openai import AsyncOpenAI, OpenAI
from PIL import Image

from internvl_chat.data.sources import uploads
from internvl_chat.data.sources.records import Message
from internvl_chat.data.sources.uploads import MAX_BYTES, MAX_IMAGES
from internvl_chat.inference.engine import Engine, Prompt, ask
from internvl_chat.inference.sampling import Sampling
from internvl_chat.inference.scheduler import Scheduler
from internvl_chat.inference.serve.app import create_app

QUESTION = "Which panel shows the scan?"
LENGTH = 8
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": LENGTH}
LONG = {**ASKED, "max_tokens": 4000, "stream": True}


@pytest.fixture(scope="module")
def reference(tiny_model) -> Engine:
    """A separate engine for expected answers: nothing else may use the engine of a scheduler."""
    return Engine.from_checkpoint(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def scheduler(tiny_model) -> Iterator[Scheduler]:
    with Scheduler(Engine.from_checkpoint(tiny_model, device="cpu")) as opened:
        yield opened


@pytest.fixture(scope="module")
def url(scheduler) -> Iterator[str]:
    with served(create_app(scheduler, "tiny")) as address:
        yield address


@pytest.fixture(scope="module")
def client(url) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def data_url(image: Image.Image, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image_part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def answer(engine: Engine, prompt: Prompt, **options) -> str:
    return engine.answer([prompt], max_new_tokens=LENGTH, **options)[0]


def test_text(client, reference):
    completion = client.chat.completions.create(**ASKED)
    [choice] = completion.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == answer(reference, ask(QUESTION))
    assert choice.finish_reason == "length"
    prompt_tokens = len(reference.encode(ask(QUESTION)).input_ids)
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt_tokens, LENGTH)
    assert usage.total_tokens == prompt_tokens + LENGTH
    assert completion.model == "tiny" and completion.object == "chat.completion"


def test_two_images(client, reference):
    images = [picture(112, 56, seed=1), picture(56, 170, seed=2)]
    prompt = ask(QUESTION, images)
    parts = [
        text_part("Fig-0: "),
        image_part(data_url(images[0])),
        text_part("Fig-1: "),
        image_part(data_url(images[1], "BMP")),
        text_part(QUESTION),
    ]
    completion = client.chat.completions.create(**ASKED | {"messages": user(*parts)})
    assert completion.choices[0].message.content == answer(reference, prompt)
    encoded = reference.encode(prompt)
    assert completion.usage.prompt_tokens == len(encoded.input_ids)
    assert completion.usage.prompt_tokens_details.image_tokens == 4 * encoded.num_tiles > 20


def test_conversation(client, reference):
    image = picture(seed=3)
    messages = [
        {"role": "system", "content": "You read figures."},
        *user(image_part(data_url(image)), text_part("What is it?")),
        {"role": "assistant", "content": "The scan."},
        *user(text_part("And "), image_part(data_url(image)), text_part("this?")),
    ]
    prompt = Prompt(
        (
            Message("system", "You read figures."),
            Message("user", "<image>\nWhat is it?"),
            Message("assistant", "The scan."),
            Message("user", "And <image>\nthis?"),
        ),
        (image, image),
    )
    completion = client.chat.completions.create(**ASKED | {"messages": messages})
    assert completion.choices[0].message.content == answer(reference, prompt)
    assert completion.usage.prompt_tokens == len(reference.encode(prompt).input_ids)


def test_streaming(client, reference):
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 30}
    chunks = list(client.chat.completions.create(**ASKED | options | {"max_tokens": None}))
    *pieces, usage = chunks
    assert usage.choices == [] and usage.usage.completion_tokens == 30
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in pieces)
    deltas = [chunk.choices[0].delta for chunk in pieces]
    assert deltas[0].role == "assistant"
    [expected] = reference.answer([ask(QUESTION)], max_new_tokens=30)
    assert "".join(delta.content or "" for delta in deltas) == expected
    assert len(pieces) > 5
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_usage(client):
    chunks = list(client.chat.completions.create(**ASKED, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_stop_and_sampling(client, reference):
    sampled = reference.answer([ask(QUESTION)], max_new_tokens=30, sampling=Sampling(1.3, 0.9, 5))[0]
    options = {"temperature": 1.3, "top_p": 0.9, "seed": 5, "max_tokens": 30}
    [choice] = client.chat.completions.create(**ASKED | options).choices
    assert choice.message.content == sampled
    stop = sampled[10:12]
    [choice] = client.chat.completions.create(**ASKED | options | {"stop": stop}).choices
    assert choice.message.content == sampled.split(stop)[0].rstrip()
    assert choice.finish_reason == "stop"


def test_models_and_health(client, url):
    [model] = client.models.list().data
    assert model.id == "tiny" == client.models.retrieve("tiny").id
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("org/other")
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "running": 0, "waiting": 0}


def bad_image(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


ERRORS = {
    "unknown model": ({"model": "gpt"}, openai.NotFoundError, "the model 'gpt' does not exist"),
    "unsupported parameter": ({"n": 3}, openai.BadRequestError, "'n' is not supported (3; supported: 1)"),
    "two problems": ({"temperature": 3, "logprobs": True}, openai.BadRequestError, "2 problems"),
    "too long": ({"max_tokens": 40000}, openai.BadRequestError, "does not fit in the model's 32768"),
    "long text": (
        {"messages": user(text_part("word " * 30000))}, openai.BadRequestError, "max_seq_length 8192",
    ),
    "web image": (
        {"messages": user(image_part("https://example.org/a.png"))},
        openai.BadRequestError, "the image #1 is not a data URL",
    ),
    "file": (
        {"messages": user(image_part("file:///etc/passwd"))}, openai.BadRequestError, "opens no other URLs",
    ),
    "no image": (
        {"messages": user(image_part(bad_image(b"hello")))}, openai.BadRequestError, "its format is not one",
    ),
    "cut image": (
        {"messages": user(image_part(data_url(picture(200, 200))[:-4000]))},
        openai.BadRequestError, "the image #1 cannot be decoded",
    ),
    "many images": (
        {"messages": user(*[image_part(data_url(picture(8, 8)))] * (MAX_IMAGES + 1))},
        openai.BadRequestError, f"{MAX_IMAGES + 1} images; at most {MAX_IMAGES}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(client, name):
    changes, error, message = ERRORS[name]
    with pytest.raises(error) as caught:
        client.chat.completions.create(**ASKED | changes)
    assert message in caught.value.message
    assert caught.value.body["type"] == "invalid_request_error"


def test_huge_images(client, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_PIXELS", 100 * 100)
    parts = [image_part(data_url(picture(99, 99)))] * 2
    with pytest.raises(openai.BadRequestError, match="19,602 pixels in total; at most 10,000"):
        client.chat.completions.create(**ASKED | {"messages": user(*parts)})


def test_huge_request(client):
    with pytest.raises(openai.APIStatusError, match="larger than 32 MB") as caught:
        client.chat.completions.create(**ASKED | {"messages": user(text_part("x" * (MAX_BYTES + 1)))})
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/v1/chat/completions", b"{'model'", 400, "not valid JSON"),
        ("POST", "/v1/chat/completions", b"", 400, "not valid JSON"),
        ("POST", "/v1/chat/completions", b"[" * 100000, 400, "recursion limit"),
        ("POST", "/v1/chat/completions", b"\x89PNG\r\n\x00\xff", 400, "not valid JSON"),
        ("POST", "/v1/chat/completions", b'"text"', 400, "must be a JSON object"),
        ("GET", "/v1/chat/completions", None, 405, "Method Not Allowed: GET /v1/chat/completions"),
        ("POST", "/v1/embeddings", b"{}", 404, "Not Found: POST /v1/embeddings"),
        ("GET", "/../../etc/passwd", None, 404, "Not Found"),
    ],
)
def test_malformed_requests(url, method, path, body, status, message):
    response = httpx.request(method, url + path, content=body)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_api_key(scheduler):
    with served(create_app(scheduler, "tiny", "secret")) as url:
        with (
            OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"),
        ):
            client.models.list()
        with OpenAI(base_url=f"{url}/v1", api_key="secret") as client:
            assert client.chat.completions.create(**ASKED).choices
        for header in ({}, {"authorization": "secret"}, {"authorization": "Bearer sécret".encode("latin-1")}):
            assert httpx.get(f"{url}/v1/models", headers=header).status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200


def live_bytes() -> int:
    """Return the number of bytes of all tensors and images in use."""
    tensors = tensor_bytes()
    images = [x for x in gc.get_objects() if isinstance(x, Image.Image)]
    return tensors + sum(3 * image.width * image.height for image in images)


def settle(scheduler: Scheduler) -> None:
    """Wait until the scheduler has nothing to do."""
    deadline = time.monotonic() + 300
    while scheduler.running or scheduler.waiting:
        assert time.monotonic() < deadline, "an answer was not cancelled"
        time.sleep(0.01)


def test_50_concurrent_requests(url, scheduler, reference):
    """Answers are those of single requests; afterwards, memory is back at its level."""
    images = [picture(112, 56, seed=seed) for seed in range(5)]
    prompts = [
        Prompt((Message("user", "<image>\n" * (i % 3) + f"{QUESTION} {i}"),), images[: i % 3])
        for i in range(50)
    ]
    expected = [answer(reference, prompt) for prompt in prompts]

    async def request(client: AsyncOpenAI, number: int) -> str:
        parts = [image_part(data_url(image)) for image in prompts[number].images]
        messages = user(*parts, text_part(f"{QUESTION} {number}"))
        asked = {**ASKED, "messages": messages}
        if number % 2:
            return (await client.chat.completions.create(**asked)).choices[0].message.content
        stream = await client.chat.completions.create(**asked, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def request_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(request(client, number) for number in range(50)))

    levels = []
    for _ in range(2):
        assert asyncio.run(request_all()) == expected
        settle(scheduler)
        "".join(
            scheduler.submit(ask(QUESTION, images[:1]), max_new_tokens=1)
        )  # the engine keeps the last tiles
        levels.append((live_bytes(), scheduler._decoder._cache.tokens))
    assert levels[0] == levels[1]
    assert levels[0][1] == 0


def test_disconnecting_mid_stream(url, scheduler, client):
    with client.chat.completions.create(**LONG) as stream:
        next(chunk for chunk in stream if chunk.choices[0].delta.content)
        assert scheduler.running == 1
    settle(scheduler)
    assert client.chat.completions.create(**ASKED).choices


def test_disconnecting_before_the_answer(url, scheduler, monkeypatch):
    """Abandoned requests leave the queue and the batch."""
    engine, reached, opened = scheduler.engine, threading.Event(), threading.Event()
    embed = engine.embed_tiles

    def wait(*args):
        reached.set()
        opened.wait()
        return embed(*args)

    monkeypatch.setattr(engine, "embed_tiles", wait)

    async def abandon() -> None:
        async with httpx.AsyncClient() as client:
            bodies = [{**LONG, "stream": i % 2 == 0} for i in range(10)]
            posts = [
                asyncio.create_task(client.post(f"{url}/v1/chat/completions", json=body, timeout=None))
                for body in bodies
            ]
            while scheduler.waiting < 10:
                await asyncio.sleep(0.01)
            for post in posts:
                post.cancel()
            await asyncio.gather(*posts, return_exceptions=True)

    asyncio.run(abandon())
    deadline = time.monotonic() + 300
    while not all(request.completion.cancelled for request in list(scheduler._waiting)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    opened.set()
    settle(scheduler)


@contextlib.contextmanager
def server(tiny_model, **options) -> Iterator[tuple[Scheduler, OpenAI, str]]:
    engine = Engine.from_checkpoint(tiny_model, device="cpu")
    with (
        Scheduler(engine, **options) as scheduler,
        served(create_app(scheduler, "tiny")) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield scheduler, client, url


def test_full_queue(tiny_model, monkeypatch):
    with server(tiny_model, max_queue=2) as (scheduler, client, _):
        opened = threading.Event()
        embed = scheduler.engine.embed_tiles
        monkeypatch.setattr(scheduler.engine, "embed_tiles", lambda *args: opened.wait() and embed(*args))
        queued = [scheduler.submit(ask(QUESTION), max_new_tokens=2) for _ in range(2)]
        with pytest.raises(openai.InternalServerError, match="2 prompts are waiting already") as caught:
            client.chat.completions.create(**ASKED)
        assert caught.value.status_code == 503
        opened.set()
        assert len({"".join(completion) for completion in queued}) == 1
        assert client.chat.completions.create(**ASKED).choices


def test_failure_of_the_model(tiny_model, monkeypatch):
    with server(tiny_model) as (scheduler, client, url):
        with client.chat.completions.create(**LONG) as stream:
            chunks = iter(stream)
            next(chunks)
            monkeypatch.setattr(scheduler._decoder, "step", lambda: 1 / 0)
            with pytest.raises(openai.APIError, match="the model has failed"):
                list(chunks)
        with pytest.raises(openai.InternalServerError, match="the model has failed"):
            client.chat.completions.create(**ASKED)
        response = httpx.get(f"{url}/health")
        assert (response.status_code, response.json()["status"]) == (503, "failed")


def test_a_bug_shows_no_traceback(tiny_model, monkeypatch):
    with server(tiny_model) as (scheduler, client, _):
        monkeypatch.setattr(scheduler, "submit", lambda *_, **__: 1 / 0)
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(**ASKED)
        assert caught.value.body["message"] == "internal error; see the log of the server"

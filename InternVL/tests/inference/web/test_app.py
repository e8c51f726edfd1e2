"""Requests to the demo: answers, limits, malformed and hostile requests, failures."""

import asyncio
import base64
import contextlib
import io
import json
import threading
import zipfile
from collections.abc import Iterator

import httpx
import pytest
from browser import served
from inference.prompts import picture
from inference.web.conftest import PANELS, closed, example_images, example_prompt, wait_until
from PIL import Image

from internvl_chat.data.sources import uploads
from internvl_chat.data.sources.uploads import MAX_BYTES, MAX_IMAGES
from internvl_chat.inference.conversation import Question, build_messages
from internvl_chat.inference.engine import Engine, Prompt
from internvl_chat.inference.sampling import Sampling
from internvl_chat.inference.scheduler import Scheduler
from internvl_chat.inference.web.app import create_app
from internvl_chat.inference.web.examples import EXAMPLES, example_image


@pytest.fixture(scope="module")
def client(compare_url) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=compare_url, timeout=300) as opened:
        yield opened


def encoded(image: Image.Image | bytes) -> str:
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image = buffer.getvalue()
    return base64.b64encode(image).decode()


def asked(*questions: tuple[str, int], images=(), answers=(), **changes) -> dict:
    return {
        "questions": [{"text": text, "images": count} for text, count in questions],
        "images": [encoded(image) for image in images],
        "answers": list(answers),
        "model": 0,
        "max_new_tokens": 8,
        **changes,
    }


def lines(response: httpx.Response) -> list[dict]:
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def text_of(parts: list[dict]) -> str:
    return "".join(part.get("text", "") for part in parts)


def message(response: httpx.Response) -> str:
    assert "Traceback" not in response.text
    return response.json()["error"]["message"]


@pytest.fixture(scope="module")
def reference(tiny_model) -> Engine:
    """An engine for token counts: nothing else may use the engine of a scheduler."""
    return Engine.from_checkpoint(tiny_model, device="cpu")


@pytest.fixture
def answer(schedulers):
    """Return a function that answers a prompt without the web application."""

    def answer(prompt: Prompt, **options) -> str:
        return "".join(schedulers[0].submit(prompt, max_new_tokens=8, **options))

    return answer


def test_page(client):
    page = client.get("/").text
    for text in ("not for diagnosis", "checkpoint-400", "checkpoint-200", EXAMPLES[2].question):
        assert text in page
    for name in ("demo.css", "demo.js", "api.js", "elements.js", "figures.js", "conversation.js"):
        assert client.get(f"/static/{name}").status_code == 200


def test_names_of_models_are_escaped(schedulers):
    page = asyncio.run(fetch_page({"</script><b>x": schedulers[0]}))
    assert "</script><b>" not in page
    assert "&lt;/script&gt;&lt;b&gt;x" in page


async def fetch_page(models) -> str:
    transport = httpx.ASGITransport(create_app(models))
    async with httpx.AsyncClient(transport=transport, base_url="http://demo") as client:
        return (await client.get("/")).text


def test_an_answer_of_each_model(client, reference):
    question = (EXAMPLES[1].question, 3)
    images = [example_image(1, index) for index in range(3)]
    for model, (expected, tiles) in enumerate(zip(PANELS, (15, 3), strict=True)):
        parts = lines(client.post("/api/answer", json=asked(question, images=images, model=model,
                                                            max_new_tokens=100)))  # fmt: skip
        begin, *pieces, end = parts
        assert sum(columns * rows + thumbnail for columns, rows, thumbnail in begin["grids"]) == tiles
        assert begin["imageTokens"] == 4 * tiles
        assert begin["tilesLost"] == 0 and begin["warnings"] == []
        assert text_of(pieces) == expected and len(pieces) > 5
        counts = [piece["answerTokens"] for piece in pieces]
        assert counts == sorted(counts)
        assert end == {"finishReason": "stop", "answerTokens": len(reference.tokenizer(expected).input_ids)}
    prompt_tokens = len(reference.encode(example_prompt(1)).input_ids)
    assert (
        lines(client.post("/api/answer", json=asked(question, images=images)))[0]["promptTokens"]
        == prompt_tokens
    )


def test_a_conversation_with_later_images(client, answer):
    images = example_images(0) + [picture(112, 56, seed=seed) for seed in (1, 2)]
    body = asked(
        ("What?", 1), ("Why?", 0), ("And these?", 2),
        images=[example_image(0, 0), *images[1:]], answers=["A.", "B."], system="Be brief.",
    )  # fmt: skip
    parts = lines(client.post("/api/answer", json=body))
    questions = [Question("What?", 1), Question("Why?"), Question("And these?", 2)]
    prompt = Prompt(build_messages(questions, ["A.", "B."], "Be brief."), tuple(images))
    assert text_of(parts) == answer(prompt)
    assert parts[-1]["finishReason"] == "length"


def test_sampling(client, answer, monkeypatch):
    monkeypatch.setattr("internvl_chat.inference.web.schema.Sampling", lambda t: Sampling(t, seed=3))
    sampled = text_of(lines(client.post("/api/answer", json=asked(("What?", 0), temperature=1.5))))
    assert sampled == answer(Prompt(build_messages([Question("What?")])), sampling=Sampling(1.5, seed=3))
    greedy = [text_of(lines(client.post("/api/answer", json=asked(("What?", 0), **options))))
              for options in ({}, {"temperature": 0.0}, {"temperature": 1e-9})]  # fmt: skip
    assert len({*greedy}) == 1


def test_image(client):
    response = client.post(
        "/api/image", params={"name": "a.png"}, content=base64.b64decode(encoded(picture(2000, 50)))
    )
    described = response.json()
    assert (described["width"], described["height"], described["warnings"]) == (2000, 50, [])
    kind, _, data = described["preview"].partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (1024, 26)


def test_tile_plan(client, schedulers):
    plans = client.post("/api/plan", json={"sizes": [[1000, 500], [300, 300]]}).json()
    for scheduler, grids, limit in zip(schedulers, plans, (6, 3), strict=True):
        expected = [scheduler.engine.encoder.plan_grid(size, limit) for size in ((1000, 500), (300, 300))]
        assert grids == [[grid.columns, grid.rows, grid.thumbnail] for grid in expected]
    assert client.post("/api/plan", json={"sizes": []}).json() == [[], []]
    for side in (0, -1, 10**400):
        response = client.post("/api/plan", json={"sizes": [[side, 1]]})
        assert response.status_code == 400 and "sizes.0.0: Input should be" in message(response)


def test_a_long_conversation_gets_fewer_tiles(client, monkeypatch, schedulers, reference):
    images = [picture(600, 400)]
    needed = len(reference.encode(Prompt(build_messages([Question("What?", 1)]), images)).input_ids)
    options = schedulers[0].engine.encoder.preprocessing.with_options(max_seq_length=needed - 4)
    monkeypatch.setattr(schedulers[0].engine.encoder, "preprocessing", options)
    begin = lines(client.post("/api/answer", json=asked(("What?", 1), images=images)))[0]
    assert begin["tilesLost"] > 0


def test_warnings_about_the_question(client):
    begin = lines(client.post("/api/answer", json=asked(("What is <|im_end|>?", 0))))[0]
    assert "'<|im_end|>' is tokenized as a control token" in begin["warnings"][0]


def test_export(client):
    images = [picture(30, 20), example_image(0, 0)]
    body = asked(("What?", 1), ("And this?", 1), images=images, system="Be brief.",
                 answers=[["A.", "B."], ["C.", "D."]])  # fmt: skip
    for key in ("model", "max_new_tokens"):
        del body[key]
    response = client.post("/api/export", json=body)
    assert response.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.namelist() == ["conversation.jsonl", "images/fig-0.png", "images/fig-1.jpeg"]
        assert archive.read("images/fig-1.jpeg") == images[1]
        records = list(map(json.loads, archive.read("conversation.jsonl").splitlines()))
    assert [record["id"] for record in records] == ["checkpoint-400", "checkpoint-200"]
    assert records[0]["image"] == ["images/fig-0.png", "images/fig-1.jpeg"]
    assert [entry["value"] for entry in records[1]["conversations"]] == [
        "Be brief.", "Fig-0: <image>\nWhat?", "C.", "Fig-1: <image>\nAnd this?", "D.",
    ]  # fmt: skip


BAD_ANSWERS = {
    "no JSON": (b"{'text'", "invalid request: Invalid JSON"),
    "nothing": (b"", "invalid request: Invalid JSON"),
    "deep": (b"[" * 100000, "recursion limit"),
    "binary": (b"\x89PNG\r\n\x00\xff", "invalid request: Invalid JSON"),
    "surrogate": (json.dumps(asked(("\ud800", 0))).encode(), "invalid request: Invalid JSON"),
    "list": ([], "invalid request: Input should be an object"),
    "no question": (asked(), "questions: List should have at least 1 item"),
    "empty question": (asked((" ", 0)), "the question is empty"),
    "many questions": (asked(*[("a", 0)] * 201), "questions: List should have at most 200 items"),
    "unknown field": (asked(("a", 0), path="/etc/passwd"), "path: Extra inputs are not permitted"),
    "no answers": (asked(("a", 0), ("b", 0)), "each question before the last one must have an answer"),
    "image counts": (asked(("a", 2)), "the questions have 2 images, but 0 were sent"),
    "base64": (asked(("a", 1)) | {"images": ["not base64!"]}, "images.0: Data should be valid base64"),
    "path": (asked(("a", 1)) | {"images": ["/etc/passwd"]}, "images.0: Data should be valid base64"),
    "no image": (asked(("a", 1), images=[b"hello"]), "the image Fig-0 cannot be read: its format"),
    "model": (asked(("a", 0), model=2), "there is no model 2"),
    "temperature": (asked(("a", 0), temperature=3), "temperature: Input should be less than or equal to 2"),
    "not a number": (asked(("a", 0), temperature="hot"), "temperature: Input should be a valid number"),
    "no tokens": (asked(("a", 0), max_new_tokens=0), "max_new_tokens: Input should be greater than or equal"),
    "many tokens": (asked(("a", 0), max_new_tokens=40000), "does not fit in the model's 32768 positions"),
    "long": (asked(("word " * 30000, 0)), "max_seq_length 8192"),
    "placeholder": (asked(("Is <image> red?", 0)), "1 <image> placeholder, but 0 images"),
    "reserved": (asked(("a <IMG_CONTEXT>", 0)), "the reserved token <IMG_CONTEXT>"),
    "many images": (asked(("a", 32), ("b", 1), images=[picture(8, 8)] * 33, answers=["a"]),
                    f"images: List should have at most {MAX_IMAGES} items"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_bad_requests(client, name):
    body, expected = BAD_ANSWERS[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post("/api/answer", content=content)
    assert response.status_code == 400
    assert expected in message(response)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the image a.png cannot be read: it is empty"),
        (b"hello", "the image a.png cannot be read: its format is not one of JPEG, PNG"),
        (base64.b64decode(encoded(picture(200, 200)))[:-4000], "the image a.png cannot be decoded"),
    ],
)
def test_bad_images(client, content, expected):
    response = client.post("/api/image", params={"name": "a.png"}, content=content)
    assert response.status_code == 400
    assert expected in message(response)


def test_names_of_images_are_only_shown(client):
    for name, shown in (
        ("../../etc/passwd", "../../etc/passwd"),
        ("a\0\n", "a\\x00\\n"),
        ("x" * 999, "x" * 100),
    ):
        response = client.post("/api/image", params={"name": name}, content=b"")
        assert message(response) == f"the image {shown} cannot be read: it is empty"
    assert "(unnamed) cannot be read" in message(client.post("/api/image", content=b""))


def test_huge_images(client, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_PIXELS", 100 * 100)
    content = base64.b64decode(encoded(picture(200, 200)))
    expected = "the images have 40,000 pixels in total; at most 10,000 are allowed"
    assert message(client.post("/api/image", content=content)) == expected
    body = asked(("a", 2), images=[picture(99, 99)] * 2)
    assert "19,602 pixels in total" in message(client.post("/api/answer", json=body))


@pytest.mark.parametrize("path", ["/api/image", "/api/answer", "/api/export", "/api/plan"])
def test_huge_requests(client, path):
    response = client.post(path, content=bytes(MAX_BYTES + 1))
    assert response.status_code == 413
    assert "larger than 32 MB" in message(response)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/answer", 405),
        ("GET", "/none", 404),
        ("GET", "/static/../app.py", 404),
        ("GET", "/static/%2e%2e/app.py", 404),
        ("GET", "/examples/0/1", 404),
        ("GET", "/examples/9/0", 404),
        ("GET", "/examples/-1/0", 404),
        ("GET", f"/examples/{'9' * 5000}/0", 404),
        ("GET", "/docs", 404),
    ],
)
def test_other_paths(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status
    assert message(response)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"answers": [["A."]]}, "answers of 1 model, but the demo has 2"),
        ({"answers": [["A.", "B."], ["A."]]}, "each question must have an answer"),
        ({"answers": [[""], ["A."]]}, "all answers are empty"),
        ({"images": [encoded(b"hello")]}, "the image Fig-0 cannot be read"),
    ],
)
def test_bad_exports(client, changes, expected):
    body = {
        "questions": [{"text": "What?", "images": 1}],
        "images": [encoded(picture(8, 8))],
        "answers": [["A."], ["A."]],
    }
    response = client.post("/api/export", json=body | changes)
    assert response.status_code == 400
    assert expected in message(response)


def test_50_questions_at_once(client, schedulers, compare_url, answer):
    """All are answered, each with the answer of a single question."""
    texts = [f"What is {number}?" for number in range(50)]
    expected = [answer(Prompt(build_messages([Question(text)]))) for text in texts]

    async def ask_all() -> list[str]:
        async with httpx.AsyncClient(base_url=compare_url, timeout=None, limits=httpx.Limits()) as opened:
            posts = [opened.post("/api/answer", json=asked((text, 0))) for text in texts]
            return [text_of(lines(response)) for response in await asyncio.gather(*posts)]

    assert asyncio.run(ask_all()) == expected
    wait_until(lambda: not schedulers[0].running)
    assert schedulers[0]._decoder._cache.tokens == 0


def test_disconnecting_cancels_the_answer(client, gates, submitted):
    with closed(gates[0]):
        body = asked(("a", 0), max_new_tokens=4000)
        with client.stream("POST", "/api/answer", json=body) as response:
            next(response.iter_lines())
        [completion] = submitted
        wait_until(lambda: completion.cancelled)
    assert completion.completion_tokens < 10
    wait_until(lambda: completion.finish_reason)
    assert completion.finish_reason == "cancelled"


@contextlib.contextmanager
def demo(tiny_model, **options) -> Iterator[tuple[Scheduler, httpx.Client]]:
    engine = Engine.from_checkpoint(tiny_model, device="cpu")
    with (
        Scheduler(engine, **options) as scheduler,
        served(create_app({"tiny": scheduler})) as url,
        httpx.Client(base_url=url, timeout=300) as opened,
    ):
        yield scheduler, opened


def test_a_full_queue(tiny_model, monkeypatch):
    with demo(tiny_model, max_queue=1) as (scheduler, client):
        opened = threading.Event()
        embed = scheduler.engine.embed_tiles
        monkeypatch.setattr(scheduler.engine, "embed_tiles", lambda *args: opened.wait() and embed(*args))
        queued = scheduler.submit(Prompt(build_messages([Question("a")])), max_new_tokens=2)
        response = client.post("/api/answer", json=asked(("a", 0)))
        opened.set()
        assert response.status_code == 503
        assert message(response) == "1 prompts are waiting already; try again later"
        assert "".join(queued)


def test_a_failure_of_the_model(tiny_model, monkeypatch):
    with demo(tiny_model) as (scheduler, client):
        monkeypatch.setattr(scheduler._decoder, "step", lambda: 1 / 0)
        parts = lines(client.post("/api/answer", json=asked(("a", 0))))
        assert parts[-1] == {"error": "the model has failed: see the log, and restart"}
        response = client.post("/api/answer", json=asked(("a", 0)))
        assert (response.status_code, message(response)) == (503, parts[-1]["error"])


def test_a_bug_shows_no_traceback(tiny_model, monkeypatch):
    with demo(tiny_model) as (scheduler, client):
        monkeypatch.setattr(scheduler, "submit", lambda *_, **__: 1 / 0)
        response = client.post("/api/answer", json=asked(("a", 0)))
        assert response.status_code == 500
        assert message(response) == "internal error; see the log of the server"

"""`m3llm parity --endpoint` accepts a correct server and reports the fault of a wrong one."""

import json
from collections.abc import Callable, Iterator

import pytest
from browser import served

from internvl_chat.cli import main as m3llm
from internvl_chat.commands.parity import print_endpoint_differences
from internvl_chat.convert.endpoint import EndpointAnswer
from internvl_chat.convert.endpoint_parity import EndpointComparison, EndpointDifference, explain_tiles
from internvl_chat.convert.parity import synthetic_examples
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.inference.engine import Engine
from internvl_chat.inference.scheduler import Scheduler
from internvl_chat.inference.serve.app import create_app
from internvl_chat.utils.errors import DataError

LENGTH = 4


class PerImageEncoder(RecordEncoder):
    """Each image may use the full tile limit, as in vLLM."""

    def _max_tiles_per_image(self, num_images: int) -> int:
        return self.preprocessing.max_dynamic_patch


@pytest.fixture(scope="module")
def engine(tiny_model) -> Engine:
    return Engine.from_checkpoint(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def scheduler(tiny_model) -> Iterator[Scheduler]:
    with Scheduler(Engine.from_checkpoint(tiny_model, device="cpu")) as opened:
        yield opened


@pytest.fixture(scope="module")
def url(scheduler) -> Iterator[str]:
    with served(create_app(scheduler, "tiny", "secret")) as address:
        yield address


@pytest.fixture
def encode_with(scheduler) -> Iterator[Callable[[RecordEncoder], None]]:
    """Return a function that replaces the encoder of the server."""
    before = scheduler.engine.encoder

    def replace(encoder: RecordEncoder) -> None:
        scheduler.engine.encoder = encoder

    yield replace
    scheduler.engine.encoder = before


def run(*argv, capsys) -> tuple[int, list[dict]]:
    words = ["parity", *map(str, argv), "--device", "cpu", "--json", "--max_new_tokens", str(LENGTH)]
    code = m3llm(words)
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_correct_server(tiny_model, url, sample_data, capsys, monkeypatch):
    monkeypatch.setenv("M3LLM_API_KEY", "secret")
    meta = sample_data / "held_out.json"
    code, rows = run(tiny_model, "--endpoint", url, "--meta", meta, "--limit", 1, capsys=capsys)
    *records, summary = rows
    assert (code, summary) == (0, {"records": 6, "same": True, "faults": []})
    for record in records:
        for name in ("prompt_tokens", "image_tokens", "answers"):
            assert record[name][0] == record[name][1], record
    assert max(record["image_tokens"][0] for record in records) > 20
    argv = ["parity", str(tiny_model), "--endpoint", url, "--device", "cpu", "--max_new_tokens", "2"]
    assert m3llm(argv) == 0
    out = capsys.readouterr().out
    assert "same image tokens" in out and "the token counts are equal" in out


@pytest.mark.parametrize(
    ("changes", "encoder", "fault"),
    [
        ({"max_dynamic_patch": 2}, RecordEncoder, "they match max_dynamic_patch 2 to 5 per record, not 12"),
        ({}, PerImageEncoder, "each image may use all of max_dynamic_patch 12"),
        ({"system_text": "You are a helpful assistant."}, RecordEncoder,
         "the endpoint's system prompt is 'You are a helpful assistant.', not the checkpoint's"),
    ],
)  # fmt: skip
def test_wrong_server(tiny_model, url, encode_with, scheduler, capsys, changes, encoder, fault):
    preprocessing = scheduler.engine.encoder.preprocessing.with_options(**changes)
    encode_with(encoder(scheduler.engine.tokenizer, preprocessing))
    options = ("--endpoint", url, "--api_key", "secret", "--served_model_name", "tiny")
    code, rows = run(tiny_model, *options, capsys=capsys)
    assert code == 1
    assert fault in rows[-1]["faults"][0]
    assert not any("system prompt" in other for other in rows[-1]["faults"][1:])


class FakeEndpoint:
    """Counts tokens like the checkpoint, with changes."""

    def __init__(self, encoder: RecordEncoder, **changes) -> None:
        self.encoder, self.changes = encoder, changes

    def answer(self, prompt, max_new_tokens: int) -> EndpointAnswer:
        if self.changes.get("no usage"):
            return EndpointAnswer("", None)
        if self.changes.get("max images", 9) < len(prompt.images):
            raise DataError("HTTP status 400: too many images")
        encoded = self.encoder.encode_prompt(prompt.messages, [image.size for image in prompt.images])
        tokens = len(encoded.input_ids) + self.changes.get("per image", 0) * len(prompt.images)
        if self.changes.get("no images"):
            tokens -= len(encoded.image_positions)
        if prompt.messages[0].role != "system":
            tokens += self.changes.get("system", 0)
        return EndpointAnswer("", tokens + self.changes.get("all", 0))


def faults(engine: Engine, examples, same_answers: float = 0.0, **changes) -> list[str]:
    encoder = RecordEncoder(engine.tokenizer, engine.encoder.preprocessing)
    comparison = EndpointComparison(engine, FakeEndpoint(encoder, **changes))
    found = list(comparison.run(examples, 1))
    engine.encoder = encoder
    return comparison.faults(found, same_answers)


@pytest.fixture(scope="module")
def examples(tiny_model) -> list:
    return synthetic_examples(tiny_model)


def test_faults_by_hand(engine, examples):
    assert faults(engine, examples) == []
    system = engine.encoder.template.tokenize([]).num_tokens([])
    [fault] = faults(engine, examples, system=-system)
    assert fault.startswith(f"the endpoint adds no system prompt; the checkpoint's has {system} tokens")
    [fault] = faults(engine, examples, system=3)
    assert "a different system prompt: it has 3 tokens more than the checkpoint's" in fault
    [fault] = faults(engine, examples, all=-2)
    assert fault == "the chat template differs: prompts have 2 tokens fewer than with the checkpoint"
    [fault] = faults(engine, examples, **{"per image": -1})
    assert "the text around each image has 1 tokens fewer" in fault
    [fault] = faults(engine, examples, **{"no images": True})
    assert "the endpoint ignores the images" in fault
    [fault] = faults(engine, examples, **{"max images": 1})
    assert "the endpoint rejects" in fault and "too many images" in fault
    [fault] = faults(engine, examples, **{"no usage": True})
    assert fault == "the endpoint reports no usage.prompt_tokens, so token counts are not compared"
    [fault] = faults(engine, examples, same_answers=1.0)
    assert fault.endswith("the token counts agree, so compare weights, pixels and sampling")


def difference(tokens: int, *sizes: tuple[int, int]) -> EndpointDifference:
    return EndpointDifference("set", 0, None, (0, 0), (0, tokens), sizes, ("", ""))


def test_explanations_by_hand():
    """56-pixel tiles of 4 tokens; by hand, a 2:1 image has 2 tiles and a thumbnail, a square image 1 tile."""
    options = Preprocessing(tile_size=56, tokens_per_tile=4, max_dynamic_patch=2)
    wide, square = (112, 56), (56, 56)
    assert "each image may use all of" in explain_tiles([difference(24, wide, wide)], options)
    assert "adds no thumbnail" in explain_tiles([difference(8, wide)], options)
    many = options.with_tile_limit(12)
    assert "max_dynamic_patch 1 per record" in explain_tiles([difference(4, (560, 280))], many)
    both = [difference(4 * 7, (560, 56)), difference(4, square)]
    assert "max_dynamic_patch 6 per record, not 12 per record" in explain_tiles(both, many)
    four = [difference(4 * 5, (560, 56)), difference(4 * 10, (560, 56), (560, 56))]
    assert "max_dynamic_patch 4 per image, not 12 per record" in explain_tiles(four, many)
    without = [difference(4 * 6, (560, 56)), difference(4 * 2, wide)]
    assert "6 per record and no thumbnail" in explain_tiles(without, many)
    assert "no tile limit explains them" in explain_tiles([difference(17, wide)], options)


def test_table_without_token_counts(capsys):
    unknown = EndpointDifference("set", 0, None, (9, None), (4, None), (), ("yes", "yes"))
    print_endpoint_differences([unknown, unknown])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["set", "2", "-", "-", "2"]
    print_endpoint_differences([unknown, difference(0)])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["set", "2", "1", "1", "2"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "SECOND (a checkpoint) or --endpoint (a URL) is required"),
        (["SECOND", "--endpoint", "http://x"], "SECOND cannot be combined with --endpoint"),
        (["--endpoint", "http://x", "--logit_tolerance", "1", "--pixel_tolerance", "1"], "2 problems"),
        (["SECOND", "--api_key", "x"], "--api_key requires --endpoint"),
        (["--endpoint", "localhost:8000"], "must begin with http:// or https://"),
    ],
)
def test_usage_errors(tiny_model, argv, message, capsys):
    words = [str(tiny_model) if word == "SECOND" else word for word in argv]
    assert m3llm(["parity", str(tiny_model), *words]) == 2
    assert message in capsys.readouterr().err

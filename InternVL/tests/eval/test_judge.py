"""Judge: verdicts of an OpenAI-compatible API, their cache, and rejected input."""

import json
import logging
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from small_sets import write_lines

from internvl_chat.cli import main as m3llm
from internvl_chat.eval.benchmarks.item import Benchmark, Item
from internvl_chat.eval.judge import judge_answers, judge_problems, parse_verdict
from internvl_chat.eval.scoring import score
from internvl_chat.metrics.suite import Suite
from internvl_chat.utils.errors import DataError, ModelError

ITEMS = [Item("open", n, f"What is {n}?", f"It is {n}") for n in range(6)]
CHOICE = Item("choice", 0, "Which?", "A", choices=("x", "y"))
BENCHMARK = Benchmark("own", (*ITEMS, CHOICE))
# The judge accepts answers that contain the reference.
ANSWERS = {item.key: item.reference if item.index % 2 else "unknown" for item in (*ITEMS, CHOICE)}


class Api(BaseHTTPRequestHandler):
    """Chat completions; the next requests take `replies`, `statuses` and `bodies`, if there are any."""

    requests: ClassVar[list[dict]] = []
    keys: ClassVar[list[str]] = []
    replies: ClassVar[list[str]] = []
    statuses: ClassVar[list[int]] = []
    bodies: ClassVar[list[str]] = []
    lock = threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.lock:
            self.requests.append(body)
            self.keys.append(self.headers["authorization"])
            status = self.statuses.pop() if self.statuses else 200
            reply = self.replies.pop() if self.replies else None
        prompt = body["messages"][0]["content"]
        reference, answer = (
            re.search(f"<{tag}>\n(.*)\n</{tag}>", prompt)[1] for tag in ("reference", "answer")
        )
        content = reply if reply is not None else "CORRECT" if reference in answer else "INCORRECT"
        message = {"role": "assistant", "content": content}
        result = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                  "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}  # fmt: skip
        if status != 200 or self.path != "/v1/chat/completions":
            result = {"error": {"message": "the service is down", "type": "server_error"}}
            status = status if status != 200 else 404
        text = (self.bodies.pop() if self.bodies else json.dumps(result)).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("retry-after-ms", "1")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _api(monkeypatch):
    for name in ("requests", "keys", "replies", "statuses", "bodies"):
        monkeypatch.setattr(Api, name, [])
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")


@pytest.fixture
def judge(server, tmp_path):
    def run(answers=ANSWERS, url=f"{server}/v1", model="grader"):
        return judge_answers(
            BENCHMARK, answers, url=url, model=model, folder=tmp_path, progress=lambda replies, total: replies
        )

    return run


def rows(folder):
    return [json.loads(line) for line in (folder / "judge.jsonl").read_text().splitlines()]


def test_open_answers_are_judged_and_stored(judge, tmp_path):
    verdicts = judge()
    assert verdicts == {item.key: bool(item.index % 2) for item in ITEMS}  # not the choice item
    assert {body["model"] for body in Api.requests} == {"grader"} and len(Api.requests) == 6
    assert {body["temperature"] for body in Api.requests} == {0}
    assert {*Api.keys} == {"Bearer sk-secret"}
    stored = rows(tmp_path)
    assert {(row["task"], row["index"], row["correct"]) for row in stored} == {
        (*key, verdict) for key, verdict in verdicts.items()
    }
    assert "sk-secret" not in (tmp_path / "judge.jsonl").read_text()


def test_stored_verdicts_are_reused(judge):
    first = judge()
    assert judge() == first and len(Api.requests) == 6
    judge({**ANSWERS, ITEMS[0].key: "It is 0"})
    assert len(Api.requests) == 7  # the changed answer
    judge(model="other")
    assert len(Api.requests) == 13


def test_interrupted_run_continues(judge, server, tmp_path):
    Api.statuses = [404, *[200] * 3]  # the fourth request fails
    with pytest.raises(ModelError, match=r"the service is down.*run the command again to continue"):
        judge()
    done = len(rows(tmp_path))
    assert done < 6
    file = tmp_path / "judge.jsonl"
    file.write_bytes(file.read_bytes() + b'{"task": "open", "ind')  # cut off by a crash
    Api.requests.clear()
    assert len(judge()) == 6 and len(Api.requests) == 6 - done


def test_failed_requests_are_retried(judge):
    Api.statuses = [500, 429]
    assert len(judge()) == 6 and len(Api.requests) == 8


def test_unreadable_verdicts_are_named_and_not_averaged(judge, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("internvl_chat"), "propagate", True)
    Api.replies = ["I cannot grade this."]
    verdicts = judge()
    [key] = [key for key, verdict in verdicts.items() if verdict is None]
    assert f"1 verdict unreadable and excluded from the average ({key[0]} {key[1]})" in caplog.text
    scores = score(BENCHMARK, ANSWERS, Suite(frozenset()), verdicts)
    known = [verdict for verdict in verdicts.values() if verdict is not None]
    assert scores.tasks["open"]["judge"] == 100 * sum(known) / 5
    assert scores.tasks["open"]["judge_unreadable"] == 1 and "judge" not in scores.tasks["choice"]
    assert "judge" not in scores.items[key]
    assert [row["reply"] for row in rows(tmp_path) if row["correct"] is None] == ["I cannot grade this."]
    assert None not in judge().values() and len(Api.requests) == 7  # asked again


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("CORRECT", True),
        ("incorrect.", False),
        ("**Incorrect**\n", False),
        ("The answer names the same lesion.\n\nCORRECT", True),
        ("<think>Is it CORRECT?\nCORRECT</think>INCORRECT", False),
        ("<think>cut off\nCORRECT", True),
        ("CORRECT or INCORRECT", None),
        ("partially correct", None),
        ("not correct", None),
        ("", None),
    ],
)
def test_verdict_is_the_last_line(reply, verdict):
    assert parse_verdict(reply) is verdict


def test_url_that_is_not_an_api(judge, server):
    with pytest.raises(ModelError, match="the service is down"):
        judge(url=f"{server}/wrong")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"choices": null, "error": {"message": "the upstream is busy"}}', "contains no text"),
        ('{"choices": []}', "contains no text"),
        ('{"choices": [{"message": {"content": ["CORRECT"]}}]}', "contains no text"),
        ('{"choices": [{"message": null}]}', "not the base URL"),
        ("null", "not the base URL"),
        (f'{{"choices": {"[" * 99_999}', "not the base URL"),
    ],
)
def test_malformed_response(judge, tmp_path, body, message):
    Api.bodies = [body]
    with pytest.raises(ModelError, match=message):
        judge()
    stored = len(rows(tmp_path))  # of the other requests that were in progress
    assert stored < 6 and len(judge()) == 6


def test_an_interrupt_does_not_wait_for_requests_in_progress(judge, server, tmp_path, monkeypatch):
    before, release, asked = {*threading.enumerate()}, threading.Event(), threading.Semaphore(0)

    def ask(client, model, prompt):
        asked.release()
        if "It is 0" in prompt:
            return "CORRECT"
        release.wait()

    monkeypatch.setattr("internvl_chat.eval.judge._ask", ask)

    def interrupt(replies, total):
        yield next(iter(replies))
        for _ in range(6):
            asked.acquire()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge_answers(BENCHMARK, ANSWERS, url=f"{server}/v1", model="m", folder=tmp_path, progress=interrupt)
    left = {*threading.enumerate()} - before
    release.set()
    assert left and all(thread.daemon for thread in left)  # the interpreter would wait for other threads
    assert len(rows(tmp_path)) == 1


def test_malformed_file(judge, tmp_path):
    (tmp_path / "judge.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(DataError, match=r"judge\.jsonl, line 1: not a verdict"):
        judge()


def test_arguments(tmp_path):
    assert judge_problems(None, None, None) == []
    assert judge_problems("http://localhost:8000/v1", "m", tmp_path) == []
    assert judge_problems(None, "m", None) == ["--judge_model requires --judge URL"]
    missing = judge_problems("localhost:8000", None, None)
    assert [text.split(" ")[0] for text in missing] == ["--judge", "--judge_model", "--out"]
    assert "base URL" in missing[0]
    assert "OPENAI_API_KEY" in judge_problems("https://me:key@host/v1", "m", tmp_path)[0]
    assert judge_problems("http://[", "m", tmp_path)


def test_command(server, tmp_path, capfd):
    bench, out = tmp_path / "own", tmp_path / "out"
    bench.mkdir()
    rows = [{"question": item.question, "gt": item.reference} for item in ITEMS]
    (bench / "open.json").write_text(json.dumps(rows))
    answers = [{"task": "open", "index": n, "prediction": ANSWERS["open", n]} for n in range(6)]
    write_lines(tmp_path / "answers.jsonl", answers)
    command = ["eval", "--bench", str(bench), "--predictions", str(tmp_path / "answers.jsonl"),
               "--out", str(out),
               "--metrics", "overlap", "--judge", f"{server}/v1", "--judge_model", "grader"]  # fmt: skip
    assert m3llm(command) == 0
    assert len(Api.requests) == 6 and "judge" in capfd.readouterr().out
    assert json.loads((out / "metrics.json").read_text())["open"]["judge"] == 50
    assert m3llm(command) == 0 and len(Api.requests) == 6
    Api.statuses = [401] * 20
    assert m3llm([*command, "--judge_model", "other"]) == 1
    error = capfd.readouterr().err
    assert f"--judge {server}/v1: " in error and "the service is down" in error and "Traceback" not in error
    assert "sk-secret" not in error

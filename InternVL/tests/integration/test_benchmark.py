"""`m3llm eval --bench` from the command line: answers, what is asked, going on, several processes, errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import HANG_SECONDS, SOURCE_ROOT
from small_sets import noise

from internvl_chat.cli import main as m3llm
from internvl_chat.eval import processes
from internvl_chat.eval.benchmarks.pmc_mi import FILES, read_folder
from internvl_chat.inference.engine import Engine
from internvl_chat.metrics.choice import parse_choice
from internvl_chat.metrics.rouge import rouge

FAST = ("--metrics", "bleu,rouge,overlap,cider,macro", "--max_new_tokens", "6", "--device", "cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    """A benchmark of 7 open questions and 4 of multiple choice, with figures."""
    folder = tmp_path_factory.mktemp("bench") / "own"
    (folder / "images").mkdir(parents=True)
    for name, size in (("a.png", (60, 60)), ("b.png", (130, 60))):
        noise(*size).save(folder / "images" / name)
    figures = [{"images": names, "image_indices": [f"Fig-{i}" for i in range(len(names))]}
               for names in ([], ["a.png"], ["b.png", "a.png"])]  # fmt: skip
    opens = [{"question": f"What is {n}?", "gt": f"It is {n}.", **figures[n % 3]} for n in range(7)]
    choices = [{"question": f"Which {n}?\nA. One\nB. Two", "gt": "AB"[n % 2], **figures[1]} for n in range(4)]
    (folder / "open.json").write_text(json.dumps(opens))
    (folder / "choice.json").write_text(json.dumps(choices))
    return folder


def argv(bench: Path, model: Path, out: Path, *more: str) -> list[str]:
    return ["eval", "--bench", str(bench), "--model", str(model), "--out", str(out), *FAST, *more]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(bench, tiny_model, tmp_path_factory) -> Path:
    """The folder of an evaluation that was left alone."""
    out = tmp_path_factory.mktemp("out") / "eval"
    assert m3llm(argv(bench, tiny_model, out)) == 0
    return out


def test_what_is_written(undisturbed, bench):
    items = read_folder(bench).items
    rows = lines(undisturbed)
    assert [(row["task"], row["index"]) for row in rows] == [item.key for item in items]
    assert rows[-1]["question"] == items[-1].question and rows[0]["images"] == ["a.png"]
    assert all(set(r) == {"task", "index", "question", "images", "prediction", "reference"} for r in rows)
    names = {"predictions.jsonl", "evaluation.json", "metrics.json", "table.md", "bars.png", "report.html"}
    assert names == {file.name for file in undisturbed.iterdir()}
    metrics = json.loads((undisturbed / "metrics.json").read_text())
    scores = [rouge(r["prediction"], r["reference"])["rougeL"] for r in rows if r["task"] == "open"]
    assert metrics["open"]["rougeL"] == pytest.approx(100 * sum(scores) / 7, abs=1e-6)
    right = [
        parse_choice(r["prediction"], ("One", "Two")) == r["reference"] for r in rows if r["task"] == "choice"
    ]
    assert metrics["choice"]["accuracy"] == 100 * sum(right) / 4 and metrics["choice"]["items"] == 4


def test_one_by_one_gives_the_same_answers(undisturbed, bench, tiny_model):
    engine = Engine.from_checkpoint(tiny_model, device="cpu")
    items = read_folder(bench).items
    alone = [engine.answer([item.prompt(None)], max_new_tokens=6)[0] for item in items]
    assert [row["prediction"] for row in lines(undisturbed)] == alone


class Stop(Exception):
    """In a crash's place."""


def test_an_evaluation_that_was_ended_goes_on(undisturbed, bench, tiny_model, tmp_path, monkeypatch):
    real = Engine.answer_each

    def answer_each(self, prompts, **options):
        for count, answer in enumerate(real(self, prompts, **options)):
            if count == 4:
                raise Stop
            yield answer

    monkeypatch.setattr(Engine, "answer_each", answer_each)
    with pytest.raises(Stop):
        m3llm(argv(bench, tiny_model, tmp_path / "out"))
    answered = lines(tmp_path / "out")
    assert len(answered) == 4 and all(row in lines(undisturbed) for row in answered)
    assert not (tmp_path / "out/metrics.json").exists()
    monkeypatch.setattr(Engine, "answer_each", real)
    assert m3llm(argv(bench, tiny_model, tmp_path / "out")) == 0
    for name in ("predictions.jsonl", "metrics.json", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (undisturbed / name).read_bytes()
    monkeypatch.setattr(Engine, "from_checkpoint", None)  # all is answered: no model is loaded
    assert m3llm(argv(bench, tiny_model, tmp_path / "out")) == 0


def test_what_another_number_of_processes_began(undisturbed, bench, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "wait_for_all", lambda: None)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert m3llm(argv(bench, tiny_model, tmp_path)) == 0
    assert {f.name for f in tmp_path.iterdir()} == {"evaluation.json", "predictions.1.jsonl"}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert m3llm(argv(bench, tiny_model, tmp_path)) == 0
    assert lines(tmp_path) == lines(undisturbed)
    assert not (tmp_path / "predictions.1.jsonl").exists()


def test_a_part_first_and_then_the_whole(undisturbed, bench, tiny_model, tmp_path):
    assert m3llm(argv(bench, tiny_model, tmp_path, "--tasks", "open", "--limit", "2")) == 0
    assert list(json.loads((tmp_path / "metrics.json").read_text())) == ["open"]
    assert m3llm(argv(bench, tiny_model, tmp_path)) == 0
    assert lines(tmp_path) == lines(undisturbed)
    assert m3llm(argv(bench, tiny_model, tmp_path, "--limit", "1")) == 0
    assert lines(tmp_path) == lines(undisturbed)  # nothing that was answered is lost


def test_another_model_or_setting_does_not_go_on(undisturbed, bench, tiny_model, capfd):
    before = (undisturbed / "predictions.jsonl").read_bytes()
    assert m3llm(argv(bench, tiny_model, undisturbed, "--max_dynamic_patch", "1")) == 2
    assert "max_dynamic_patch was None, and is 1" in capfd.readouterr().err
    assert (undisturbed / "predictions.jsonl").read_bytes() == before


def test_answers_made_elsewhere(undisturbed, bench, tmp_path, capfd):
    command = [
        "eval",
        "--bench",
        str(bench),
        "--predictions",
        str(undisturbed / "predictions.jsonl"),
        *FAST[:2],
    ]
    assert m3llm([*command, "--json"]) == 0
    metrics = json.loads((undisturbed / "metrics.json").read_text())
    assert [json.loads(line) for line in capfd.readouterr().out.splitlines()] == [
        {"task": task, **figures} for task, figures in metrics.items()
    ]
    assert m3llm([*command, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == metrics
    assert "exact match" in capfd.readouterr().out
    assert m3llm([*command, "--out", str(undisturbed)]) == 2
    assert "holds the answers of another evaluation; choose another" in capfd.readouterr().err
    assert json.loads((undisturbed / "metrics.json").read_text()) == metrics


class Recorder:
    """In an engine's place: notes what it is asked."""

    def __init__(self) -> None:
        self.prompts = []

    def answer_each(self, prompts, **_):
        for number, prompt in enumerate(prompts):
            self.prompts.append(prompt)
            yield number, "A"


def test_what_the_model_is_asked(bench, tiny_model, tmp_path, monkeypatch):
    engine = Recorder()
    monkeypatch.setattr(Engine, "from_checkpoint", lambda *_, **__: engine)
    (tmp_path / "prompts.yaml").write_text("open: Look closely.")
    assert m3llm(argv(bench, tiny_model, tmp_path / "out", "--prompts", str(tmp_path / "prompts.yaml"))) == 0
    messages = [[(t.role, t.content) for t in prompt.messages] for prompt in engine.prompts]
    assert messages[0] == [("user", "Fig-0: <image>\nWhich 0?\nA. One\nB. Two")]
    assert messages[6] == [
        ("system", "Look closely."),
        ("user", "Fig-0: <image>\nFig-1: <image>\nWhat is 2?"),
    ]
    sizes = [[image.size for image in prompt.images] for prompt in engine.prompts]
    assert sizes[4:7] == [[], [(60, 60)], [(130, 60), (60, 60)]]


def test_the_six_tasks(shared, tmp_path, capfd):
    """With the small model, both of the published layout's places, and the package's system texts."""
    tiny = shared / "conformance/tiny"
    more = ("--data", str(shared / "pmc_mi"), "--limit", "2")
    assert m3llm(argv(Path("pmc-mi"), tiny, tmp_path, *more)) == 0
    out = capfd.readouterr().out
    assert "multi-image VQA      M3LLM-8B        15.0     37.8  70.1       78.2" in out
    assert [(r["task"], r["index"]) for r in lines(tmp_path)] == [(t, n) for t in FILES for n in range(2)]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics) == list(FILES) and all(figures["items"] == 2 for figures in metrics.values())
    assert all(row["prediction"] for row in lines(tmp_path))
    assert metrics["puretext"]["bertscore"] is None


@pytest.mark.parametrize(
    ("more", "messages"),
    [
        ((), ["give META", "--bench"]),
        (("meta.json",), ["--model is needed"]),
        (
            ("meta.json", "--model", "x", "--out", "o", "--tasks", "a"),
            ["--out goes with --bench", "--tasks goes"],
        ),
        (
            ("meta.json", "--bench", "b", "--require-above-chance", "0.1", "--metrics", "blue"),
            [
                "4 problems",
                "give one of them",
                "--require-above-chance",
                "give --model",
                "--metrics blue: known are bleu",
            ],
        ),
        (("--bench", "b", "--model", "x"), ["--out DIR is needed"]),
        (
            ("--bench", "b", "--model", "x", "--predictions", "f", "--out", "o"),
            ["give --model", "or --predictions"],
        ),
        (
            ("--bench", "BENCH", "--model", "x", "--out", "o", "--tasks", "none"),
            ["--tasks none: own has choice, open"],
        ),
        (
            ("--bench", "BENCH", "--model", "x", "--out", "o", "--bertscore_model", "/none"),
            ["no such model folder"],
        ),
    ],
)
def test_impossible_command_lines(bench, more, messages, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert m3llm(["eval", *(text.replace("BENCH", str(bench)) for text in more)]) == 2
    error = capfd.readouterr().err
    assert all(message in error for message in messages) and "Traceback" not in error
    assert not any(tmp_path.iterdir())


def start(command: list[str], *launcher: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, *launcher, "-m", "internvl_chat.cli", *command]
    return subprocess.Popen(
        program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_two_processes_give_what_one_gives(undisturbed, bench, tiny_model, tmp_path):
    process = start(
        argv(bench, tiny_model, tmp_path),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    )
    out, error = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, error[-3000:]
    assert lines(tmp_path) == lines(undisturbed)
    assert (tmp_path / "metrics.json").read_bytes() == (undisturbed / "metrics.json").read_bytes()
    assert out.count("exact match") == 1  # one process speaks
    assert not (tmp_path / "predictions.1.jsonl").exists()


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on(bench, tiny_model, tmp_path):
    command = argv(bench, tiny_model, tmp_path / "out", "--max_new_tokens", "200")
    process = start(command)
    file, deadline = tmp_path / "out/predictions.jsonl", time.monotonic() + HANG_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if file.is_file() and file.read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=HANG_SECONDS)
    answered = file.read_bytes().count(b"\n")
    assert process.returncode == -signal.SIGKILL and 3 <= answered < 11
    assert m3llm(command) == 0
    assert m3llm(argv(bench, tiny_model, tmp_path / "whole", "--max_new_tokens", "200")) == 0
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")

"""`m3llm eval --bench`: answers, prompts, resume, several ranks, errors."""

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
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.eval import answering
from internvl_chat.eval.benchmarks.pmc_mi import FILES, read_folder
from internvl_chat.inference.engine import Engine
from internvl_chat.metrics.multiple_choice import parse_choice
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
def complete(bench, tiny_model, tmp_path_factory) -> Path:
    """Output folder of an uninterrupted evaluation."""
    out = tmp_path_factory.mktemp("out") / "eval"
    assert m3llm(argv(bench, tiny_model, out)) == 0
    return out


def test_output_files(complete, bench):
    items = read_folder(bench).items
    rows = lines(complete)
    assert [(row["task"], row["index"]) for row in rows] == [item.key for item in items]
    assert rows[-1]["question"] == items[-1].question and rows[0]["images"] == ["a.png"]
    assert all(set(r) == {"task", "index", "question", "images", "prediction", "reference"} for r in rows)
    names = {"predictions.jsonl", "evaluation.json", "metrics.json", "table.md", "bars.png", "report.html"}
    assert names == {file.name for file in complete.iterdir()}
    metrics = json.loads((complete / "metrics.json").read_text())
    scores = [rouge(r["prediction"], r["reference"])["rougeL"] for r in rows if r["task"] == "open"]
    assert metrics["open"]["rougeL"] == pytest.approx(100 * sum(scores) / 7, abs=1e-6)
    right = [
        parse_choice(r["prediction"], ("One", "Two")) == r["reference"] for r in rows if r["task"] == "choice"
    ]
    assert metrics["choice"]["accuracy"] == 100 * sum(right) / 4 and metrics["choice"]["items"] == 4


def test_answers_do_not_depend_on_the_batch(complete, bench, tiny_model):
    engine = Engine.from_checkpoint(tiny_model, device="cpu")
    items = read_folder(bench).items
    alone = [engine.answer([item.prompt(None)], max_new_tokens=6)[0] for item in items]
    assert [row["prediction"] for row in lines(complete)] == alone


class Stop(Exception):
    """Simulated crash."""


def test_interrupted_evaluation_continues(complete, bench, tiny_model, tmp_path, monkeypatch):
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
    assert len(answered) == 4 and all(row in lines(complete) for row in answered)
    assert not (tmp_path / "out/metrics.json").exists()
    monkeypatch.setattr(Engine, "answer_each", real)
    assert m3llm(argv(bench, tiny_model, tmp_path / "out")) == 0
    for name in ("predictions.jsonl", "metrics.json", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (complete / name).read_bytes()
    monkeypatch.setattr(Engine, "from_checkpoint", None)  # everything is answered: the model is not loaded
    assert m3llm(argv(bench, tiny_model, tmp_path / "out")) == 0


def test_continue_with_another_world_size(complete, bench, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "wait_for_all_ranks", lambda: None)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert m3llm(argv(bench, tiny_model, tmp_path)) == 0
    assert {f.name for f in tmp_path.iterdir()} == {"evaluation.json", "predictions.1.jsonl"}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert m3llm(argv(bench, tiny_model, tmp_path)) == 0
    assert lines(tmp_path) == lines(complete)
    assert not (tmp_path / "predictions.1.jsonl").exists()


def test_subset_first_then_everything(complete, bench, tiny_model, tmp_path):
    assert m3llm(argv(bench, tiny_model, tmp_path, "--tasks", "open", "--limit", "2")) == 0
    assert list(json.loads((tmp_path / "metrics.json").read_text())) == ["open"]
    assert m3llm(argv(bench, tiny_model, tmp_path)) == 0
    assert lines(tmp_path) == lines(complete)
    assert m3llm(argv(bench, tiny_model, tmp_path, "--limit", "1")) == 0
    assert lines(tmp_path) == lines(complete)  # no answer is lost


def test_other_settings_are_rejected(complete, bench, tiny_model, capfd):
    before = (complete / "predictions.jsonl").read_bytes()
    assert m3llm(argv(bench, tiny_model, complete, "--max_dynamic_patch", "1")) == 2
    assert "max_dynamic_patch was None, now 1" in capfd.readouterr().err
    assert (complete / "predictions.jsonl").read_bytes() == before


def test_external_answers(complete, bench, tmp_path, capfd):
    command = [
        "eval",
        "--bench",
        str(bench),
        "--predictions",
        str(complete / "predictions.jsonl"),
        *FAST[:2],
    ]
    assert m3llm([*command, "--json"]) == 0
    metrics = json.loads((complete / "metrics.json").read_text())
    assert [json.loads(line) for line in capfd.readouterr().out.splitlines()] == [
        {"task": task, **values} for task, values in metrics.items()
    ]
    assert m3llm([*command, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == metrics
    assert "exact match" in capfd.readouterr().out
    assert m3llm([*command, "--out", str(complete)]) == 2
    assert "contains another evaluation; choose another folder" in capfd.readouterr().err
    assert json.loads((complete / "metrics.json").read_text()) == metrics


class Recorder:
    """Fake engine that records the prompts."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.prompts, self.encoder = [], RecordEncoder(None, preprocessing)

    def answer_each(self, prompts, **_):
        for number, prompt in enumerate(prompts):
            self.prompts.append(prompt)
            yield number, "A"


def test_prompts(bench, tiny_model, tmp_path, monkeypatch):
    engines = []
    monkeypatch.setattr(
        Engine,
        "from_checkpoint",
        lambda *_, preprocessing, **__: engines.append(Recorder(preprocessing)) or engines[0],
    )
    (tmp_path / "prompts.yaml").write_text("open: Look closely.")
    options = ("--prompts", str(tmp_path / "prompts.yaml"), "--image_background", "white")
    assert m3llm(argv(bench, tiny_model, tmp_path / "out", *options)) == 0
    [engine] = engines
    assert engine.encoder.preprocessing.image_background == "white"
    messages = [[(t.role, t.content) for t in prompt.messages] for prompt in engine.prompts]
    assert messages[0] == [("user", "Fig-0: <image>\nWhich 0?\nA. One\nB. Two")]
    assert messages[6] == [
        ("system", "Look closely."),
        ("user", "Fig-0: <image>\nFig-1: <image>\nWhat is 2?"),
    ]
    sizes = [[image.size for image in prompt.images] for prompt in engine.prompts]
    assert sizes[4:7] == [[], [(60, 60)], [(130, 60), (60, 60)]]


def test_pmc_mi_bench(shared, tmp_path, capfd):
    """The published tasks with the small model and the built-in system texts."""
    tiny = shared / "conformance/tiny"
    more = ("--data", str(shared / "pmc_mi"), "--limit", "2")
    assert m3llm(argv(Path("pmc-mi"), tiny, tmp_path, *more)) == 0
    out = capfd.readouterr().out
    assert "multi-image VQA      M3LLM-8B        15.0     37.8  70.1       78.2" in out
    assert [(r["task"], r["index"]) for r in lines(tmp_path)] == [(t, n) for t in FILES for n in range(2)]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics) == list(FILES) and all(values["items"] == 2 for values in metrics.values())
    assert all(row["prediction"] for row in lines(tmp_path))
    assert metrics["puretext"]["bertscore"] is None


@pytest.mark.parametrize(
    ("more", "messages"),
    [
        ((), ["give META", "--bench"]),
        (("meta.json",), ["--model is required"]),
        (
            ("meta.json", "--model", "x", "--out", "o", "--tasks", "a"),
            ["--out needs --bench", "--tasks needs --bench"],
        ),
        (
            ("meta.json", "--bench", "b", "--require-above-chance", "0.1", "--metrics", "blue"),
            [
                "4 problems",
                "exclude each other",
                "--require-above-chance",
                "give either --model",
                "--metrics blue: unknown; choose from bleu",
            ],
        ),
        (("--bench", "b", "--model", "x"), ["--out DIR is required"]),
        (
            ("--bench", "b", "--model", "x", "--predictions", "f", "--out", "o"),
            ["give either --model", "or --predictions"],
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
def test_invalid_command_lines(bench, more, messages, capfd, tmp_path, monkeypatch):
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
def test_two_ranks_give_the_same_result(complete, bench, tiny_model, tmp_path):
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
    assert lines(tmp_path) == lines(complete)
    assert (tmp_path / "metrics.json").read_bytes() == (complete / "metrics.json").read_bytes()
    assert out.count("exact match") == 1  # only rank 0 prints
    assert not (tmp_path / "predictions.1.jsonl").exists()


@pytest.mark.slow
def test_killed_evaluation_continues(bench, tiny_model, tmp_path):
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
    assert m3llm(argv(bench, tiny_model, tmp_path / "complete", "--max_new_tokens", "200")) == 0
    assert lines(tmp_path / "out") == lines(tmp_path / "complete")

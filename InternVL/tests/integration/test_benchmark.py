"""`m3llm eval --bench`: answers, prompts, resume, multiple ranks, errors."""

import json
import os
import shutil
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
from internvl_chat.eval.protocol import PublishedEngine
from internvl_chat.inference.engine import Engine
from internvl_chat.metrics.multiple_choice import parse_choice
from internvl_chat.metrics.rouge import rouge

FAST = ("--metrics", "bleu,rouge,overlap,cider,macro", "--max_new_tokens", "6", "--device", "cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    """A benchmark of 7 open and 4 multiple-choice questions with figures."""
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
    assert all(
        set(r) == {"task", "index", "question", "images", "prediction", "reference", "truncated", "protocol"}
        and r["protocol"] == "standard"
        for r in rows
    )
    names = {"predictions.jsonl", "evaluation.json", "metrics.json", "table.md", "bars.png", "report.html",
             "report.json"}  # fmt: skip
    assert names == {file.name for file in complete.iterdir()}
    metrics = json.loads((complete / "metrics.json").read_text())
    scores = [rouge(r["prediction"], r["reference"])["rougeL"] for r in rows if r["task"] == "open"]
    assert metrics["open"]["rougeL"] == pytest.approx(100 * sum(scores) / 7, abs=1e-6)
    right = [
        parse_choice(r["prediction"], ("One", "Two")) == r["reference"] for r in rows if r["task"] == "choice"
    ]
    assert metrics["choice"]["accuracy"] == 100 * sum(right) / 4 and metrics["choice"]["items"] == 4


def test_truncated_answers_are_counted(complete, bench, tiny_model, capsys):
    engine = Engine.from_checkpoint(tiny_model, device="cpu")
    prompts = [item.prompt(None) for item in read_folder(bench).items]
    lengths = [len(ids) for ids in engine.generate_ids(prompts, max_new_tokens=7)]
    cut = [length > 6 for length in lengths]
    assert any(cut) and [row["truncated"] for row in lines(complete)] == cut
    metrics = json.loads((complete / "metrics.json").read_text())
    assert sum(task.get("truncated", 0) for task in metrics.values()) == sum(cut)
    assert m3llm(["eval", "--bench", str(bench), "--predictions", str(complete / "predictions.jsonl")]) == 0
    assert f"{sum(cut)} answers cut off at --max_new_tokens; raise it" in capsys.readouterr().err


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
    monkeypatch.setattr(Engine, "from_checkpoint", None)  # all items are answered, so the model is not loaded
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
    for name in ("metrics.json", "report.html"):  # nor the metrics of all items
        assert (tmp_path / name).read_bytes() == (complete / name).read_bytes()


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
    assert "contains answers from a different evaluation; choose a different folder" in capfd.readouterr().err
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
    """Evaluate the small model on the published tasks with the built-in system prompts."""
    tiny = shared / "conformance/tiny"
    more = ("--data", str(shared / "pmc_mi"), "--limit", "2")
    assert m3llm(argv(Path("pmc-mi"), tiny, tmp_path, *more)) == 0
    out = capfd.readouterr().out
    assert "multi-image VQA M3LLM-8B published 15.0 37.8 70.1 78.2" in " ".join(out.split())
    assert [(r["task"], r["index"]) for r in lines(tmp_path)] == [(t, n) for t in FILES for n in range(2)]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics) == list(FILES) and all(values["items"] == 2 for values in metrics.values())
    assert out.count("tiny (partial: 2 of 25 items)") == len(FILES)
    assert all(row["prediction"] for row in lines(tmp_path))
    assert metrics["puretext"]["bertscore"] is None


def test_published_protocol(shared, tmp_path, capfd):
    """The protocol is recorded, and answers of different protocols are not mixed."""
    tiny, out = shared / "conformance/tiny", tmp_path / "published"
    data = ("--data", str(shared / "pmc_mi"), "--limit", "1", "--tasks", "multi-choice,multisubimageVQA")
    published = ("--protocol", "published")
    assert m3llm(argv(Path("pmc-mi"), tiny, out, *data, *published)) == 0
    captured = capfd.readouterr()
    assert "the system prompts are not the published ones" in captured.err
    words = " ".join(captured.out.split())
    assert "multi-choice VQA tiny (partial: 1 of 25 items) published, other system prompts" in words
    settings = json.loads((out / "evaluation.json").read_text())
    assert settings["protocol"] == "published"
    assert {row["protocol"] for row in lines(out)} == {"published"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert {task["protocol"] for task in metrics.values()} == {"published, other system prompts"}
    standard = tmp_path / "standard"
    assert m3llm(argv(Path("pmc-mi"), tiny, standard, *data)) == 0
    capfd.readouterr()
    assert m3llm(argv(Path("pmc-mi"), tiny, standard, *data, *published)) == 2
    assert "protocol was 'standard', now 'published'" in capfd.readouterr().err
    scored = ("eval", "--bench", "pmc-mi", *data, *FAST[:2], "--predictions")
    assert m3llm([*scored, str(out / "predictions.jsonl")]) == 1
    assert "2 answers with --protocol published, not standard" in capfd.readouterr().err
    assert m3llm([*scored, str(out / "predictions.jsonl"), *published]) == 0
    (tmp_path / "mix.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*lines(out)[:1], *lines(standard)[1:]])
    )
    assert m3llm([*scored, str(tmp_path / "mix.jsonl"), *published]) == 1
    assert "1 answer with --protocol standard, not published" in capfd.readouterr().err


def test_published_protocol_reads_task_config(shared, tmp_path, monkeypatch):
    """The system prompts next to the questions are used, and each prompt is a single user message."""
    data = tmp_path / "benchmark_data"
    shutil.copytree(shared / "pmc_mi/benchmark", data)
    (data / "images").symlink_to(shared / "pmc_mi/images")
    tasks = {task: {"system_prompt": f"Task {task}."} for task in FILES}
    (tmp_path / "task_config.py").write_text(f"TASKS = {tasks!r}\n")
    texts, real = [], PublishedEngine.encode

    def encode(self, prompt):
        encoded = real(self, prompt)
        texts.append(self.tokenizer.decode(encoded.input_ids))
        return encoded

    monkeypatch.setattr(PublishedEngine, "encode", encode)
    more = ("--data", str(data), "--limit", "1", "--tasks", "bboxVQA", "--protocol", "published")
    assert m3llm(argv(Path("pmc-mi"), shared / "conformance/tiny", tmp_path / "out", *more)) == 0
    [text] = texts
    assert "<|im_start|>user\nTask bboxVQA.\nFig-0: <img><IMG_CONTEXT>" in text
    assert (
        text.count("<image>") == 2 and "</img>\nFig-1: <image>\nFig-2: <image>\nWhat is the spatial" in text
    )
    settings = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert settings["max_new_tokens"] == 6


@pytest.mark.parametrize(
    ("more", "messages"),
    [
        (
            (
                "--bench",
                "vqa",
                "--model",
                "x",
                "--out",
                "o",
                "--protocol",
                "published",
                "--exif_transpose",
                "True",
                "--max_dynamic_patch",
                "6",
                "--judge",
                "host",
            ),
            [
                "--max_dynamic_patch has no effect with --protocol published",
                "--exif_transpose has no effect",
                "--protocol published requires --bench pmc-mi",
                "--judge host: must be the base URL",
                "--judge_model NAME is required",
            ],
        ),
        (("meta.json", "--model", "x", "--judge", "u"), ["--judge requires --bench"]),
        ((), ["META (a meta file) or --bench (a benchmark) is required"]),
        (("meta.json",), ["--model is required"]),
        (
            ("meta.json", "--model", "x", "--out", "o", "--tasks", "a"),
            ["--out requires --bench", "--tasks requires --bench"],
        ),
        (
            ("meta.json", "--bench", "b", "--require-above-chance", "0.1", "--metrics", "blue"),
            [
                "5 problems",
                "1. --bench b: neither a folder nor one of",
                "are mutually exclusive",
                "--require-above-chance",
                "give either --model",
                "--metrics blue: unknown; the choices are bleu",
            ],
        ),
        (("--bench", "b", "--model", "x"), ["--out DIR is required"]),
        (("--bench", "pmcmi"), ["1. --bench pmcmi", "did you mean pmc-mi?", "2. give either --model"]),
        (
            ("--bench", "b", "--model", "x", "--predictions", "f", "--out", "o"),
            ["give either --model", "or --predictions"],
        ),
        (
            ("--bench", "BENCH", "--model", "x", "--out", "o", "--tasks", "none"),
            ["--tasks none: unknown; the tasks of own are choice, open"],
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


@pytest.fixture
def damaged(bench, tmp_path) -> Path:
    """A benchmark with a missing image and a truncated image."""
    folder = shutil.copytree(bench, tmp_path / "damaged")
    content = (folder / "images/b.png").read_bytes()
    (folder / "images/b.png").write_bytes(content[: len(content) // 2])
    items = json.loads((folder / "choice.json").read_text())
    items[1]["images"] = ["none.png"]
    (folder / "choice.json").write_text(json.dumps(items))
    return folder


def test_bad_items_are_named_before_the_model_is_loaded(damaged, tiny_model, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(Engine, "from_checkpoint", None)
    assert m3llm(argv(damaged, tiny_model, tmp_path / "out")) == 1
    assert "the image none.png is not in" in capfd.readouterr().err
    assert m3llm(argv(damaged, tiny_model, tmp_path / "out", "--tasks", "open")) == 1
    error = capfd.readouterr().err
    assert "2 problems" in error and "open, item 2: the image" in error and "open, item 5: the image" in error
    assert "--on_bad_record skip" in error and "Traceback" not in error


def test_bad_items_are_skipped_and_counted(damaged, complete, tiny_model, tmp_path, capfd):
    skip = ("--on_bad_record", "skip")
    assert m3llm(argv(damaged, tiny_model, tmp_path / "out", *skip)) == 0
    captured = capfd.readouterr()
    assert "skipped 1 of 11 items" in captured.err and "skipped 2 of 10 items" in captured.err
    assert "3 items skipped" in captured.err and "3 of 4" in captured.out and "5 of 7" in captured.out
    bad = {("choice", 1), ("open", 2), ("open", 5)}
    kept = [row for row in lines(complete) if (row["task"], row["index"]) not in bad]
    assert lines(tmp_path / "out") == kept
    assert m3llm(argv(damaged, tiny_model, tmp_path / "out", *skip, "--json")) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert rows[0] == {"skipped": 3, "without_reference": 0}
    assert [(row["items"], row["total"]) for row in rows[1:]] == [(3, 4), (5, 7)]
    answers = tmp_path / "out/predictions.jsonl"
    scored = ("eval", "--bench", str(damaged), "--predictions", str(answers), *FAST[:2], "--tasks", "choice")
    assert m3llm([*scored, *skip]) == 1  # scoring does not need the image: an answer is missing
    assert "choice has no answer for index 1" in capfd.readouterr().err


def test_item_that_does_not_fit_the_model_is_skipped(bench, tiny_model, tmp_path, capfd):
    folder = shutil.copytree(bench, tmp_path / "long")
    items = json.loads((folder / "open.json").read_text())
    items[3]["question"] = "why " * 20_000
    (folder / "open.json").write_text(json.dumps(items))
    command = argv(folder, tiny_model, tmp_path / "out", "--tasks", "open")
    assert m3llm(command) == 1
    assert m3llm([*command, "--on_bad_record", "skip"]) == 0
    error = capfd.readouterr().err
    assert "open, item 3: skipped: " in error and "1 item skipped" in error
    assert [row["index"] for row in lines(tmp_path / "out")] == [0, 1, 2, 4, 5, 6]


def test_answers_without_references(bench, complete, tiny_model, tmp_path, capfd):
    folder = shutil.copytree(bench, tmp_path / "hidden")
    items = json.loads((folder / "open.json").read_text())
    (folder / "open.json").write_text(json.dumps([{k: v for k, v in i.items() if k != "gt"} for i in items]))
    assert m3llm(argv(folder, tiny_model, tmp_path / "one", "--tasks", "open")) == 0
    captured = capfd.readouterr()
    assert "7 answers not scored (no reference)" in captured.err and not captured.out
    expected = {row["index"]: row["prediction"] for row in lines(complete) if row["task"] == "open"}
    assert {row["index"]: row["prediction"] for row in lines(tmp_path / "one")} == expected
    assert not (tmp_path / "one/metrics.json").exists()
    assert m3llm(argv(folder, tiny_model, tmp_path / "two")) == 0
    assert list(json.loads((tmp_path / "two/metrics.json").read_text())) == ["choice"]
    answers = str(tmp_path / "one/predictions.jsonl")
    assert m3llm(["eval", "--bench", str(folder), "--predictions", answers, "--tasks", "open"]) == 1
    assert "no reference answers to score against" in capfd.readouterr().err


def test_answers_are_scored_without_the_images(bench, complete, tmp_path):
    folder = shutil.copytree(bench, tmp_path / "texts")
    shutil.rmtree(folder / "images")
    command = [
        "eval",
        "--bench",
        str(folder),
        "--predictions",
        str(complete / "predictions.jsonl"),
        *FAST[:2],
    ]
    assert m3llm([*command, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/metrics.json").read_bytes() == (complete / "metrics.json").read_bytes()
    (folder / "open.json").write_text("[broken")
    assert m3llm([*command, "--tasks", "choice"]) == 0


def test_ambiguous_answer_is_refused(tmp_path, capfd):
    """The reference is the text of one option and the letter of a different one; both together are clear."""
    item = {"question": "Which density?", "choices": ["D", "C", "B", "A"], "answer": "A"}
    data, said = tmp_path / "density.jsonl", tmp_path / "said.jsonl"
    said.write_text(json.dumps({"task": "density", "index": 0, "prediction": "D. A"}))
    command = ["eval", "--bench", "vqa", "--data", str(data), "--predictions", str(said), "--json", *FAST[:2]]
    data.write_text(json.dumps(item))
    assert m3llm(command) == 1
    assert "density.jsonl, line 1: the correct answer 'A' is ambiguous" in capfd.readouterr().err
    data.write_text(json.dumps(item | {"answer": "D. A"}))
    assert m3llm(command) == 0
    assert json.loads(capfd.readouterr().out)["accuracy"] == 100


def start(command: list[str], *launcher: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, *launcher, "-m", "internvl_chat.cli", *command]
    return subprocess.Popen(
        program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


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

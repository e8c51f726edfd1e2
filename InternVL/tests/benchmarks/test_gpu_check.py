"""The acceptance run at small size on a CPU: report and required packages."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import SOURCE_ROOT

from benchmarks import gpu_check
from benchmarks.gpu import training
from benchmarks.gpu.check import Check, Skipped, read_result
from benchmarks.gpu_check import NAMES, Item, main, run_item
from benchmarks.jobs import Result
from benchmarks.presets.fast import PLAN

SCRIPT = SOURCE_ROOT / "internvl_chat/shell/gpu_check.sh"
# Packages that the acceptance run does not require.
UNNEEDED = ("bert_score", "deepspeed", "matplotlib", "nltk", "pandas", "pyarrow", "rouge", "scipy",
            "sentence_transformers", "sentencepiece", "sklearn", "wandb")  # fmt: skip


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """Environment variables that prevent the import of packages that are not required."""
    folder = tmp_path / "site"
    folder.mkdir()
    code = f"import sys\nsys.modules.update(dict.fromkeys({UNNEEDED!r}))\n"
    (folder / "sitecustomize.py").write_text(code, encoding="utf-8")
    paths = os.pathsep.join([str(folder), str(SOURCE_ROOT)])
    return os.environ | {"PYTHONPATH": paths, "PYTHON": sys.executable}


def check_script(out, environment, *flags):
    """Run the script and return its exit code, output and report."""
    result = subprocess.run(
        ["bash", str(SCRIPT), "--out", str(out), "--device", "cpu", *flags],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    report = json.loads((out / "gpu_check.json").read_text(encoding="utf-8"))
    return result.returncode, result.stdout, report


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "Example: bash InternVL/internvl_chat/shell/gpu_check.sh" in text
    assert "--child" not in text


def test_unknown_items_are_rejected(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--items", "attention,sound"])
    assert end.value.code == 2
    assert "--items: unknown: sound; choose from doctor,attention" in capsys.readouterr().err


def test_works_without_unneeded_packages(bare, tmp_path):
    code = (
        "import sys\n"
        "from benchmarks.gpu import decoding, kernels, launchers, training\n"
        "import benchmarks.checkpoint_overhead, benchmarks.presets.fast, benchmarks.presets.reference\n"
        "import internvl_chat.train.internvl_chat_finetune\n"
        "from internvl_chat.cli import main\n"
        f"assert main(['sample-data', {str(tmp_path / 'data')!r}, '--train', '2', '--held-out', '1']) == 0\n"
        f"assert not any(sys.modules[name] for name in {UNNEEDED!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_attention_at_small_size(bare, tmp_path):
    code, out, report = check_script(tmp_path / "out", bare, "--items", "attention")
    assert code == 0, out
    assert report["ok"]
    assert (report["size"], report["device"]) == ("small", "cpu")
    [item] = report["items"]
    assert (item["name"], item["status"], item["why"]) == ("attention", "ok", "")
    assert item["seconds"] > 0
    assert len(item["figures"]) == 18
    for metric in item["figures"].values():
        assert 0 <= metric["error"] <= metric["tolerance"] < 0.1
    assert "attention   ok" in out
    assert "==== attention" in (tmp_path / "out/gpu_check.log").read_text(encoding="utf-8")


@pytest.mark.slow
def test_everything_at_small_size(bare, tmp_path):
    code, out, report = check_script(tmp_path / "out", bare, "--minutes", "30")
    items = {item["name"]: item for item in report["items"]}
    assert code == 0, out
    assert tuple(items) == NAMES
    assert items["deepspeed"]["status"] == "skipped"
    assert {item["status"] for name, item in items.items() if name != "deepspeed"} <= {"ok", "skipped"}
    for recipe in ("train-lora", "train-full"):
        metrics = items[recipe]["figures"]
        rates = [metrics[preset]["records_per_second"] for preset in ("fast", "reference")]
        assert metrics["ratio"] == pytest.approx(rates[0] / rates[1])
        assert metrics["fast"]["plan"]["components"]["weights"] > 0
    assert items["launchers"]["figures"]["full"]["exit_code"] == 0
    assert items["resume"]["figures"]["stopped_after"] > 0
    assert {items[name]["figures"]["parallel"] for name in ("fsdp", "cpu-offload")} == {"fsdp"}
    assert items["doctor"]["figures"]["ready"]
    assert report["versions"]["torch"]


def test_no_time_left(tmp_path, capsys):
    assert main(["--minutes", "0", "--device", "cpu", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    assert {(item["status"], item["why"]) for item in report["items"]} == {("skipped", "no time left")}
    assert len(report["items"]) == len(NAMES)
    assert capsys.readouterr().out.count("no time left") == len(NAMES)


@pytest.mark.parametrize(
    ("item", "why"),
    [
        (Item("attention", "kernels:attention", 0.2), "took longer than 1 s"),
        (Item("unknown", "kernels:unknown", 60), "exit code 1"),
    ],
)
def test_slow_or_broken_item(item, why, tmp_path):
    args = argparse.Namespace(size="small", device="cpu")
    with (tmp_path / "log").open("w") as log:
        result = run_item(item, args, tmp_path, 100.0, log)
    assert (result["status"], result["why"]) == ("failed", why)


def test_exit_code_of_a_failed_item(monkeypatch, tmp_path):
    statuses = {"doctor": "ok", "attention": "failed", "launchers": "skipped"}

    def run(item, *_):
        return {"status": statuses[item.name], "why": "", "summary": "", "figures": {}, "seconds": 1.0}

    monkeypatch.setattr(gpu_check, "run_item", run)
    argv = ["--device", "cpu", "--out", str(tmp_path), "--items"]
    assert main([*argv, "doctor,launchers"]) == 0
    assert main([*argv, "doctor,attention,launchers"]) == 1
    assert not json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))["ok"]


def run_check(item, work):
    check = Check("item", work, "small", "cpu")
    check.run(item)
    return read_result(work, "item")


def test_statuses_of_an_item(tmp_path, capsys):
    def passes(check):
        check.compare("sum", 0.5, 1.0)
        check.summary = "half"

    def skips(check):
        raise Skipped("no such package")

    def raises(check):
        check.add(before=1)
        raise ValueError("broken")

    def differs(check):
        check.compare("sum", math.nan, 1.0)
        check.expect(False, "other records")

    assert run_check(passes, tmp_path) == {
        "status": "ok", "why": "", "summary": "half", "figures": {"sum": {"error": 0.5, "tolerance": 1.0}},
    }  # fmt: skip
    assert run_check(skips, tmp_path)["why"] == "no such package"
    result = run_check(raises, tmp_path)
    assert (result["status"], result["why"], result["figures"]) == (
        "failed",
        "ValueError: broken",
        {"before": 1},
    )
    assert "ValueError: broken" in capsys.readouterr().err
    result = run_check(differs, tmp_path)
    assert (result["status"], result["why"]) == ("failed", "sum: error nan, tolerance 1; other records")


def test_killed_item_keeps_its_metrics(tmp_path):
    check = Check("item", tmp_path, "small", "cpu")
    check.add(first=1.0)
    result = read_result(tmp_path, "item")
    assert (result["status"], result["why"], result["figures"]) == (
        "failed",
        "killed",
        {"first": 1.0},
    )


@pytest.fixture
def fake_jobs(monkeypatch):
    """Fake the jobs on an 80 GB GPU, where neither float32 masters nor the reference fit in memory."""
    plan = {"parallel": "single", "checkpointed_layers": 4, "components": {"weights": 16e9}, "total": 64e9}
    refusal = (
        "TrainingError: the largest pack does not fit in memory\nmemory plan: 123 of 80\n"
        "flags that would fit: --weight_precision bf16 (62 GB)"
    )
    ran = []

    def run(job, script, number):
        ran.append((job.label, *job.flags))
        if "master" in job.flags:
            raise RuntimeError(refusal)
        if job.label == "reference":
            raise RuntimeError("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 14.3 GiB")
        folder = Path(job.folder) / f"job{number}/run"
        folder.mkdir(parents=True)
        (folder / PLAN).write_text(json.dumps(plan))
        return Result(seconds=3.0, records=24, tokens=21_000, flops=1e15, peak_flops=989e12,
                      peak_memory=66 * 10**9, first_loss=11.9)  # fmt: skip

    monkeypatch.setattr(training, "run_in_subprocess", run)
    monkeypatch.setattr(training.train_throughput, "prepare", lambda args, folder: None)
    return ran


def test_full_training_uses_the_highest_precision_that_fits(fake_jobs, tmp_path):
    check = Check("train-full", tmp_path, "8b", "cuda")
    check.run(training.train_full)
    result = read_result(tmp_path, "train-full")
    assert fake_jobs == [
        ("fast", "--weight_precision", "master"),
        ("fast", "--weight_precision", "bf16"),
        ("reference",),
    ]
    assert (result["status"], result["why"]) == ("ok", "")
    metrics = result["figures"]
    assert "memory plan: 123 of 80" in metrics["refused"][0]
    assert metrics["fast"]["records_per_second"] == 8.0
    assert metrics["fast"]["epoch_hours"] == pytest.approx(237_748 / 8 / 3600)
    assert metrics["full, used over planned memory"] == pytest.approx(66 / 64)
    assert metrics["reference"] == "out of memory"
    assert "weight_precision bf16 8 records/s" in result["summary"]


def test_dry_run_that_contradicts_the_plan_fails(monkeypatch, tmp_path):
    def run(job, script, number):
        raise RuntimeError("TrainingError: the largest pack does not fit: CUDA out of memory")

    monkeypatch.setattr(training, "run_in_subprocess", run)
    monkeypatch.setattr(training.train_throughput, "prepare", lambda args, folder: None)
    Check("train-lora", tmp_path, "8b", "cuda").run(training.train_lora)
    result = read_result(tmp_path, "train-lora")
    assert (result["status"], result["why"]) == ("failed", "lora: the plan fits, but the dry run does not")

"""`m3llm doctor`: report, advice and exit code."""

import errno
import json
import os
import subprocess

import pytest
import torch

from internvl_chat.cli import main as m3llm
from internvl_chat.commands import doctor
from internvl_chat.utils.doctor import hardware, software
from internvl_chat.utils.doctor.diagnosis import Diagnosis, Problem

SECRET = "hf_not_to_be_printed"
GB = 10**9


@pytest.fixture
def quick(monkeypatch):
    """Use a small test file, and skip the import of the training script."""
    monkeypatch.setattr(hardware, "_TEST_FILE_BYTES", 2**24)
    monkeypatch.setattr(software, "inspect_training", lambda diagnosis: "not imported")


def problems(diagnosis: Diagnosis) -> dict[str, str]:
    return {problem.what: problem.severity for problem in diagnosis.problems}


def test_report(quick, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert m3llm(["doctor", "--json", "--folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    report = json.loads(out)
    assert report["ready"]
    assert report["tokens"] == ["HF_TOKEN"]
    assert SECRET not in out
    assert report["torch"]["version"] == torch.__version__
    assert report["packages"]["installed"]["torch"] == torch.__version__.partition("+")[0]
    assert "math" in report["attention"]["sdpa_backends"]
    assert report["cpu"]["cores"] >= 1
    assert report["cpu"]["available_gb"] > 0
    assert report["disk"]["write_mb_per_second"] > 0
    assert all(problem["severity"] == "warning" for problem in report["problems"])
    assert not list(tmp_path.iterdir())


def test_table_and_advice(quick, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "_drivers", lambda: ["580.1"])
    assert m3llm(["doctor", "--folder", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "finds no GPU, but the driver (580.1) does: check CUDA_VISIBLE_DEVICES" in out
    assert "not ready to train" in out
    assert str(tmp_path) in out


def test_a_missing_folder_is_a_usage_error(capsys, tmp_path):
    assert m3llm(["doctor", "--folder", str(tmp_path / "missing")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_full_disk_is_an_error(quick, monkeypatch, tmp_path):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    diagnosis = Diagnosis()
    facts = hardware.inspect_disk(tmp_path, diagnosis)
    assert facts["free_gb"] > 0
    [(what, severity)] = problems(diagnosis).items()
    assert severity == "error"
    assert "No space left on device" in what
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("free", "speed", "expected"),
    [
        (1 * GB, 1e9, "a LoRA checkpoint takes about 0.6 GB, and two must fit"),
        (200 * GB, 1e9, "a full-training checkpoint takes 107.6 GB"),
        (300 * GB, 1e8, "a full-training checkpoint takes 18 minutes"),
        (300 * GB, 1e9, None),
    ],
)
def test_disk_space_and_speed_for_checkpoints(monkeypatch, tmp_path, free, speed, expected):
    usage = hardware.shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(hardware, "_disk_speed", lambda folder: (speed, speed))
    diagnosis = Diagnosis()
    hardware.inspect_disk(tmp_path, diagnosis)
    advice = [problem.advice for problem in diagnosis.problems]
    assert (not advice) if expected is None else expected in advice[0]
    assert diagnosis.ready


def test_missing_and_outdated_packages(monkeypatch):
    versions = {"torch": "2.4.0", "transformers": None, "wandb": None}
    known = software._version
    monkeypatch.setattr(software, "_version", lambda name: versions.get(name, known(name)))
    diagnosis = Diagnosis()
    facts = software.inspect_packages(diagnosis)
    assert facts["installed"]["transformers"] == "missing"
    severities = problems(diagnosis)
    assert severities["transformers is not installed"] == "error"
    assert severities["wandb is not installed"] == "warning"
    assert severities["torch 2.4.0 is not supported (>=2.11)"] == "warning"


def test_api_key_without_its_package(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr(software, "_version", lambda name: None)
    diagnosis = Diagnosis()
    assert "WANDB_API_KEY" in software.inspect_tokens(diagnosis)
    assert problems(diagnosis) == {"WANDB_API_KEY is set, but wandb is missing": "warning"}


def test_training_script_that_cannot_be_imported(monkeypatch):
    result = subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: undefined symbol")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: result)
    diagnosis = Diagnosis()
    software.inspect_training(diagnosis)
    assert not diagnosis.ready
    assert "undefined symbol" in diagnosis.problems[0].what


def test_a_failing_check_does_not_stop_the_others(quick, monkeypatch, tmp_path):
    def fail(diagnosis):
        raise RuntimeError("driver is gone")

    monkeypatch.setattr(hardware, "inspect_gpus", fail)
    diagnosis = doctor.diagnose(tmp_path)
    assert diagnosis.facts["gpus"] is None
    assert diagnosis.facts["disk"]["free_gb"] > 0
    assert Problem("gpus could not be inspected", "RuntimeError: driver is gone") in diagnosis.problems

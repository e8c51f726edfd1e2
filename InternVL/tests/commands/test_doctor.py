"""The doctor's report: what it finds, what it advises, and its exit code."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from internvl_chat.cli import main as m3llm
from internvl_chat.commands import machine
from internvl_chat.utils import hardware

SECRET = "hf_not_to_be_printed"
GB = 10**9


@pytest.fixture
def quick(monkeypatch):
    """A small test file, and no second import of the training script."""
    monkeypatch.setattr(machine, "_TEST_FILE", 2**24)
    monkeypatch.setattr(machine, "inspect_training", lambda diagnosis: "not imported")


def problems(diagnosis: machine.Diagnosis) -> dict[str, str]:
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
    monkeypatch.setattr(machine, "_drivers", lambda: ["580.1"])
    assert m3llm(["doctor", "--folder", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "finds no GPU, but the driver (580.1) does: check CUDA_VISIBLE_DEVICES" in out
    assert "training cannot start here" in out
    assert str(tmp_path) in out


def test_a_missing_folder_is_an_error_of_the_command_line(capsys, tmp_path):
    assert m3llm(["doctor", "--folder", str(tmp_path / "missing")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_full_disk_is_a_finding(quick, monkeypatch, tmp_path):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    diagnosis = machine.Diagnosis()
    facts = machine.inspect_disk(tmp_path, diagnosis)
    assert facts["free_gb"] > 0
    [(what, severity)] = problems(diagnosis).items()
    assert severity == "error"
    assert "No space left on device" in what
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("free", "speed", "expected"),
    [
        (1 * GB, 1e9, "a LoRA checkpoint has about 0.6 GB"),
        (200 * GB, 1e9, "a checkpoint of full training has 107.6 GB"),
        (300 * GB, 1e8, "a checkpoint of full training takes 18 minutes"),
        (300 * GB, 1e9, None),
    ],
)
def test_room_and_speed_for_checkpoints(monkeypatch, tmp_path, free, speed, expected):
    usage = machine.shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(machine, "_disk_speed", lambda folder: (speed, speed))
    diagnosis = machine.Diagnosis()
    machine.inspect_disk(tmp_path, diagnosis)
    advice = [problem.advice for problem in diagnosis.problems]
    assert (not advice) if expected is None else expected in advice[0]
    assert diagnosis.ready


def test_packages_that_are_missing_or_old(monkeypatch):
    versions = {"torch": "2.4.0", "transformers": None, "wandb": None}
    known = machine._version
    monkeypatch.setattr(machine, "_version", lambda name: versions.get(name, known(name)))
    diagnosis = machine.Diagnosis()
    facts = machine.inspect_packages(diagnosis)
    assert facts["installed"]["transformers"] == "missing"
    found = problems(diagnosis)
    assert found["transformers is not installed"] == "error"
    assert found["wandb is not installed"] == "warning"
    assert found["torch 2.4.0 is not supported (>=2.11)"] == "warning"


def test_a_key_without_its_package(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr(machine, "_version", lambda name: None)
    diagnosis = machine.Diagnosis()
    assert "WANDB_API_KEY" in machine.inspect_tokens(diagnosis)
    assert problems(diagnosis) == {"WANDB_API_KEY is set, but wandb is missing": "warning"}


def test_a_training_script_that_cannot_be_imported(monkeypatch):
    result = subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: undefined symbol")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: result)
    diagnosis = machine.Diagnosis()
    machine.inspect_training(diagnosis)
    assert not diagnosis.ready
    assert "undefined symbol" in diagnosis.problems[0].what


def test_an_inspection_that_fails_does_not_end_the_others(quick, monkeypatch, tmp_path):
    def fail(diagnosis):
        raise RuntimeError("driver is gone")

    monkeypatch.setattr(machine, "inspect_gpus", fail)
    diagnosis = machine.diagnose(tmp_path)
    assert diagnosis.facts["gpus"] is None
    assert diagnosis.facts["disk"]["free_gb"] > 0
    assert "gpus could not be inspected: RuntimeError: driver is gone" in problems(diagnosis)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def cgroups(monkeypatch, tmp_path):
    """An empty tree of cgroups, and the file that names this process's own."""
    own = tmp_path / "cgroup"
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path / "sys")
    monkeypatch.setattr(hardware, "_OWN_CGROUPS", own)
    return own, tmp_path / "sys"


def test_limits_of_cgroups_version_2(cgroups):
    own, root = cgroups
    own.write_text("0::/outer/inner\n")
    write(root / "outer", cpu__max="150000 100000", memory__max=f"{2 * GB}", memory__current=f"{GB}",
          memory__stat=f"anon 1\ninactive_file {GB // 4}")  # fmt: skip
    write(root / "outer/inner", cpu__max="max 100000", memory__max="max", memory__current="5")
    assert hardware.cpu_cores() == min(2, len(os.sched_getaffinity(0)))
    assert hardware.available_host_memory() == GB + GB // 4


def test_limits_of_cgroups_version_1_in_a_container(cgroups):
    """There the path is the host's, and the limits are those of the root."""
    own, root = cgroups
    own.write_text("5:memory:/docker/0123\n4:cpu:/docker/0123\n")
    write(root / "cpu", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    write(root / "memory", memory__limit_in_bytes=f"{GB}", memory__usage_in_bytes=f"{GB // 2}")
    assert hardware.cpu_cores() == 1
    assert hardware.available_host_memory() == GB - GB // 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx512_bf16 amx_bf16", ("avx512_bf16", "amx_bf16")),
        ("Features\t: fp asimd bf16", ("bf16",)),
        ("flags\t\t: fpu avx2", ()),
    ],
)
def test_bf16_instructions(monkeypatch, tmp_path, line, expected):
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(hardware, "_CPU_INFO", file)
    assert hardware.cpu_bf16_instructions() == expected

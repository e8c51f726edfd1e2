"""The wheel contains all non-code files, and its launchers work without the repository."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers import HANG_SECONDS, SOURCE_ROOT

PACKAGE = SOURCE_ROOT / "internvl_chat"
# Scripts that require the repository.
REPOSITORY_ONLY = {"shell/quickstart.sh", "shell/test.sh", "shell/gpu_check.sh"}
LORA = "internvl_chat/shell/internvl3.0/2nd_finetune/M3LLM-fulldata-lora.sh"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The unpacked wheel, built from a copy of the repository without network access."""
    source, wheels, site = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(SOURCE_ROOT.parent / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, source / "InternVL/internvl_chat", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet",
               "--disable-pip-version-check", "--wheel-dir", str(wheels), str(source)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert result.returncode == 0, result.stderr[-3000:]
    [wheel] = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_wheel_is_complete(installed):
    for path in PACKAGE.rglob("*"):
        name = path.relative_to(PACKAGE).as_posix()
        if path.is_file() and path.suffix != ".pyc" and name not in REPOSITORY_ONLY:
            assert (installed / "internvl_chat" / name).read_bytes() == path.read_bytes(), name
    shell = installed / "internvl_chat/shell"
    assert set(json.loads((shell / "data/PMC-data.json").read_text())) >= {"qa-bbox", "qa-puretext"}
    assert yaml.safe_load((shell / "recipes/full.yaml").read_text())["max_seq_length"] == 16384
    names = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
    assert {file.name for file in (shell / "deepspeed").iterdir()} == {f"{name}.json" for name in names}
    assert (installed / "internvl_chat/train/planning/calibration.json").is_file()


# PYTHON is what every other test of the launchers sets.
@pytest.mark.parametrize("choice", [pytest.param("PYTHON", marks=pytest.mark.slow), "active environment"])
def test_installed_launcher_trains(installed, choice, tiny_model, sample_data, tmp_path, metrics):
    """The launcher writes to the current folder and uses PYTHON, or else `python` on the PATH."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k not in ("WANDB_API_KEY", "PYTHON", "OUTPUT_DIR")}
    environment = {
        **clean, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "GPUS": "0", "BATCH_SIZE": "2",
        "MODEL_PATH": str(tiny_model), "META_PATH": str(sample_data / "train.json"),
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    if choice == "PYTHON":
        environment |= {"PYTHON": sys.executable, "PATH": os.environ["PATH"]}
    flags = ["--force_image_size", "56", "--max_dynamic_patch", "1", "--max_steps", "2"]
    result = subprocess.run(
        ["bash", str(installed / LORA), *flags],
        capture_output=True, text=True, timeout=HANG_SECONDS, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    output = tmp_path / "work_dirs/M3LLM-fulldatav2-lora-lr=5e-6"
    assert [row["records"] for row in metrics(output)] == [2, 2]
    assert f"data_root: {tmp_path}\n" in (output / "config.yaml").read_text()


def test_installed_package_finds_paths_from_the_current_folder(installed, tmp_path):
    code = "from internvl_chat.utils.paths import REPOSITORY; print(REPOSITORY)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(installed)}, cwd=tmp_path,
    )  # fmt: skip
    assert result.stdout.strip() == str(tmp_path)

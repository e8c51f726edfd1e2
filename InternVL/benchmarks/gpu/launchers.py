"""Items that run commands and launchers: doctor, both launchers, resume, DeepSpeed."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.check import Check, Skipped

SOURCE_ROOT = Path(__file__).resolve().parents[2]
SHELL = SOURCE_ROOT / "internvl_chat/shell"
_STEPS = {"lora": 3, "full": 20}
_WEIGHTS = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}
_FLAGS = {
    "force_image_size": 112,
    "max_dynamic_patch": 1,
    "learning_rate": 1e-3,
    "save_steps": 10,
    "dataloader_num_workers": 2,
    "disable_tqdm": True,
}


def doctor(check: Check) -> None:
    """Run `m3llm doctor`, and record a failure for each error that it reports."""
    result = subprocess.run(
        [*_m3llm(), "doctor", "--json", "--folder", str(check.folder)],
        stdout=subprocess.PIPE, text=True, env=_environment(check),
    )  # fmt: skip
    report = json.loads(result.stdout)
    check.add(**report)
    for problem in report["problems"]:
        check.expect(problem["severity"] != "error", problem["what"])
    gpus = [f"{gpu['name']}, {gpu['memory_gb']} GB" for gpu in report["gpus"] or ()]
    check.summary = f"{', '.join(gpus) or 'no GPU'}, torch {(report['torch'] or {}).get('version')}"


def launchers(check: Check) -> None:
    """Run both launchers on a tiny model."""
    for recipe in _STEPS:
        output = check.folder / recipe
        began = time.monotonic()
        code = start(check, recipe, output).wait()
        rows = read_rows(output)
        check.add(**{recipe: {"exit_code": code, "seconds": round(time.monotonic() - began, 1),
                              "losses": [row["loss"] for row in rows]}})  # fmt: skip
        check.expect(code == 0, f"{recipe} failed with exit code {code}")
        check.expect(
            len(rows) == _STEPS[recipe], f"{recipe} logged {len(rows)} steps instead of {_STEPS[recipe]}"
        )
        check.expect(all(math.isfinite(row["loss"]) for row in rows), f"{recipe} has a non-finite loss")
        check.expect((output / _WEIGHTS[recipe]).is_file(), f"{recipe} did not write a model")
    check.summary = ", ".join(f"{recipe} {run['seconds']} s" for recipe, run in check.metrics.items())


def resume(check: Check) -> None:
    """Compare an uninterrupted run with a run that is stopped by a signal and resumed."""
    uninterrupted, stopped = check.work / "launchers/full", check.folder / "stopped"
    if not (uninterrupted / "train_results.json").is_file():
        shutil.rmtree(uninterrupted, ignore_errors=True)
        if code := start(check, "full", uninterrupted).wait():
            raise RuntimeError(f"the uninterrupted run failed with exit code {code}")
    process = start(check, "full", stopped)
    while process.poll() is None and not read_rows(stopped):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, steps = process.wait(), len(read_rows(stopped))
    check.add(stopped_after=steps, exit_code=code)
    check.expect(code == 128 + signal.SIGTERM, f"the stopped run returned exit code {code}")
    check.expect(0 < steps < _STEPS["full"], f"the run was stopped after {steps} steps")
    code = start(check, "full", stopped).wait()
    check.expect(code == 0, f"the resumed run failed with exit code {code}")
    expected, resumed = read_rows(uninterrupted), read_rows(stopped)
    errors = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(resumed, expected, strict=False)]
    # On a GPU, the summation order varies, and the weights are bf16 (epsilon 2 ** -7).
    check.compare("losses", max(errors, default=math.nan), 2**-7 if check.on_gpu else 1e-6)
    check.expect(len(resumed) == len(expected), f"{len(resumed)} steps instead of {len(expected)}")
    ledgers = [(folder / "ledger.jsonl").read_text(encoding="utf-8") for folder in (uninterrupted, stopped)]
    check.expect(ledgers[0] == ledgers[1], "the resumed run trained on different records")
    check.summary = f"stopped after step {steps} of {len(expected)}"


def deepspeed(check: Check) -> None:
    """Compare the losses of ZeRO-1 and ZeRO-3 on one rank with those of a run without DeepSpeed."""
    if find_spec("deepspeed") is None:
        raise Skipped("deepspeed is not installed")
    expected = [row["loss"] for row in read_rows(check.work / "launchers/lora")]
    for stage in (1, 3):
        output = check.folder / f"zero{stage}"
        config = SHELL / f"deepspeed/zero{stage}.json"
        code = start(check, "lora", output, DEEPSPEED=str(config)).wait()
        check.expect(code == 0, f"ZeRO-{stage} failed with exit code {code}")
        errors = [abs(a["loss"] / b - 1) for a, b in zip(read_rows(output), expected, strict=False)]
        if errors:
            # On a GPU, the weights are bf16 (epsilon 2 ** -7); on a CPU, only the summation order differs.
            check.compare(f"zero{stage}", max(errors), 2**-7 if check.on_gpu else 1e-4)
    check.summary = "same losses as without DeepSpeed" if expected else "no losses to compare with"


def start(check: Check, recipe: str, output: Path, **variables: str) -> subprocess.Popen:
    """Start the launcher of a recipe on a tiny model.

    Args:
        check: item that needs the run.
        recipe: `lora` or `full`.
        output: output folder of the run.
        variables: additional environment variables of the launcher.
    """
    data, model = _tiny(check)
    name = {"lora": "M3LLM-fulldata-lora.sh", "full": "M3LLM-fulldata-fullmodel.sh"}[recipe]
    flags = _FLAGS | {"max_steps": _STEPS[recipe]}
    tokens = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    settings = {
        "GPUS": "1" if check.on_gpu else "0",
        "NPROC": "1",
        "BATCH_SIZE": "2" if recipe == "full" else "16" if check.on_gpu else "4",
        "MODEL_PATH": str(model),
        "META_PATH": str(data / "train.json"),
        "OUTPUT_DIR": str(output),
        "REPORT_TO": "none",
    }
    return subprocess.Popen(
        ["bash", str(SHELL / "internvl3.0/2nd_finetune" / name), *tokens],
        stdin=subprocess.DEVNULL,
        env=_environment(check) | settings | variables,
    )


def read_rows(output: Path) -> list[dict[str, Any]]:
    """Return the rows of `metrics.jsonl` that a run has written so far."""
    file = output / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _tiny(check: Check) -> tuple[Path, Path]:
    """Return the folders of the sample data and the tiny model; create them on first use."""
    data, model = check.work / "data", check.work / "tiny"
    if not model.is_dir():
        shutil.rmtree(data, ignore_errors=True)
        for command in (
            ["sample-data", str(data), "--train", "20", "--held-out", "1"],
            ["tiny-model", str(model), "--text", str(data / "train")],
        ):
            subprocess.run([*_m3llm(), *command], check=True, env=_environment(check))
    return data, model


def _m3llm() -> list[str]:
    return [sys.executable, "-m", "internvl_chat.cli"]


def _environment(check: Check) -> dict[str, str]:
    unwanted = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "WANDB_API_KEY",
        "DEEPSPEED",
        "PARALLEL",
    )
    paths = [str(SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    clean = {name: value for name, value in os.environ.items() if name not in unwanted}
    return clean | {"PYTHONPATH": os.pathsep.join(paths)}

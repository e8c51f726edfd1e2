"""The command `m3llm plan`."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from helpers import needs_bitsandbytes

from internvl_chat.cli import main as m3llm
from internvl_chat.train.planning import sweep

SMALL = ["--recipe", "lora", "--gpus", "2", "--", "--force_image_size", "56"]


@pytest.fixture
def plan(capfd):
    """Return a function that runs the command; it returns the exit code, the output and the errors."""

    def run(*argv):
        capfd.readouterr()
        code = m3llm(["plan", *map(str, argv)])
        return code, *capfd.readouterr()

    return run


@pytest.mark.parametrize("name", ["InternVL3.5-30B-A3B", "OpenGVLab/InternVL3_5-30B-A3B"])
def test_model_by_name(plan, name):
    code, out, _ = plan("--model", name, "--gpus", 8)
    assert code == 0
    assert "30.86 B parameters" in out  # 30.85 B and the adapters
    assert "MODEL_PATH=OpenGVLab/InternVL3_5-30B-A3B" in out


def test_plan_of_a_meta_file(plan, tiny_model, sample_data, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_MODELS", ("InternVL3-1B",))  # building all models takes a while
    picture = tmp_path / "plan.png"
    code, out, _ = plan(
        "--model", tiny_model, "--meta", sample_data / "train.json", "--gpu", "h100", "--json",
        "--plot", picture, *SMALL, "--learning_rate", "1e-5",
    )  # fmt: skip
    assert code == 0
    found = json.loads(out)
    assert found["records"] == sum(1 for file in sample_data.glob("train/*.jsonl") for _ in file.open())
    assert [mode["mode"] for mode in found["modes"]] == ["ddp", "fsdp", "zero1", "zero2", "zero3"]
    assert all(mode["fits"] and mode["epoch_hours"] > 0 for mode in found["modes"])
    assert found["recommended"] == "ddp"
    assert re.search(r"--force_image_size 56 --learning_rate 1e-5$", found["command"])
    assert any("not measured" in note for note in found["notes"])
    assert any("records per step from 32" in limit for limit in found["limits"])
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("device", "variables"), [("h200", ""), ("cpu", "GPUS=0 ")])
def test_command_is_accepted_by_the_launcher(plan, tiny_model, device, variables):
    """Runs the printed command with a launcher that stops after checking its variables."""
    code, out, _ = plan("--model", tiny_model, "--gpu", device, *SMALL)
    assert code == 0 and "recommended: ddp" in out
    command = out.splitlines()[-1]
    assert variables in command
    environment, launcher = re.fullmatch(r"(.*) bash (\S+) .*", command).groups()
    common = Path(launcher).resolve().parents[2] / "common.sh"
    script = f'PER_DEVICE_BATCH_SIZE=1; source {common}; prepare_training; echo "$NPROC ${{BATCH_FLAGS[*]}}"'
    done = subprocess.run(
        ["bash", "-euc", f"export {environment}; {script}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2", "--gradient_accumulation_steps", "8"]


@pytest.mark.parametrize(
    ("flags", "modes"),
    [
        pytest.param(["--load_in_4bit", "True"], ["ddp", "zero1", "zero2"], marks=needs_bitsandbytes),
        pytest.param(["--optim", "adamw_8bit"], ["ddp"], marks=needs_bitsandbytes),
        (["--weight_precision", "stochastic"], ["ddp", "fsdp"]),
    ],
)
def test_only_modes_that_support_the_flags(plan, tiny_model, flags, modes):
    _, out, _ = plan("--model", tiny_model, "--json", *SMALL)
    weights = json.loads(out)["modes"][0]["components_gb"]["weights"]
    code, out, _ = plan("--model", tiny_model, "--json", *SMALL, *flags)
    found = json.loads(out)
    assert code == 0 and [mode["mode"] for mode in found["modes"]] == modes
    less = found["modes"][0]["components_gb"]["weights"] < weights
    assert less == (flags[0] == "--load_in_4bit")


def test_command_has_the_paths(plan, tiny_model, sample_data, tmp_path):
    """A model by its `config.json`, and an annotation file with its image folder."""
    [annotation] = sorted(sample_data.glob("train/*.jsonl"))[:1]
    code, out, _ = plan("--model", tiny_model, "--meta", annotation, "--image_root", sample_data / "images",
                        "--data_root", tmp_path, *SMALL)  # fmt: skip
    assert code == 0
    command = out.splitlines()[-1]
    assert f" META_PATH={annotation} DATA_ROOT={tmp_path} " in command
    assert f".sh --image_root {sample_data}/images --force_image_size" in command
    code, out, _ = plan("--model", tiny_model / "config.json", *SMALL)
    assert code == 0 and f" MODEL_PATH={tiny_model} bash" in out
    assert any("record lengths: assumed" in line for line in out.splitlines())


def test_nothing_fits(plan, tiny_model):
    code, out, _ = plan("--model", tiny_model, "--gpu", "l4", "--memory_gb", "0.001", *SMALL)
    assert code == 1 and "does not fit" in out and "recommended" not in out


@pytest.mark.parametrize(
    ("argv", "messages"),
    [
        (["--gpu", "h300", "--tiles", "2"], ["--gpu h300: unknown", "--tiles requires --tokens"]),
        (["--tflops", "100"], ["--memory_gb and --bandwidth_gbs and --link_gbs"]),
        (["--meta", "m.json", "--records", "5"], ["--records: not allowed with --meta"]),
        (
            ["--tokens", "1e9", "--gpus", "1000000"],
            ["--tokens 1e+09", "--gpus 1e+06: must be at most 100,000"],
        ),
        (["--", "--freeze_llm", "True", "--use_llm_lora", "0"], ["all parameters are frozen"]),
        (
            ["--recipe", "full", "--", "--load_in_4bit", "True", "--min_dynamic_patch", "20"],
            ["4-bit weights cannot be trained", "--min_dynamic_patch 20 must be at most"],
        ),
        (["--model", "InternVL3-1B", "--", "--bf16", "False"], ["--bf16 True"]),
        (
            ["--", "--parallel=fsdp", "--global-batch-size", "4", "--meta_path=m", "--cpu_offload=True"],
            [
                "--parallel: not allowed after --",
                "--global-batch-size: not allowed after --; use --batch_size",
                "--meta_path: not allowed after --; use --meta",
                "--cpu_offload: not allowed after --; its speed",
            ],
        ),
        (["PMC-data.json"], ["unexpected argument 'PMC-data.json'; pass a meta file with --meta"]),
        (["--plot", "/no/such/folder/a.png"], ["does not exist"]),
        (["--plot", "a.pdf"], [".png"]),
        (["--model", "/no/such/model"], ["no such folder"]),
        (["--model", "InternVL3-1B", "--", "--learning_rat", "1"], ["--learning_rat"]),
    ],
)
def test_problems_are_reported_together(plan, argv, messages):
    code, _, err = plan(*argv)
    assert code in (1, 2) and all(message in err for message in messages)
    assert "Traceback" not in err


def test_numbers_that_are_not_positive(plan, capfd):
    with pytest.raises(SystemExit) as stop:
        plan("--price_per_hour", "-1")
    assert stop.value.code == 2 and "positive number" in capfd.readouterr().err

"""Both launchers, run from a different folder and configured by environment variables."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from helpers import LAUNCHERS, SOURCE_ROOT, run_launcher

from internvl_chat.cli import main as m3llm
from internvl_chat.train.arguments import parse_arguments
from internvl_chat.train.config import TrainConfig
from internvl_chat.train.flag_help import flag_groups

RECIPES = SOURCE_ROOT / "internvl_chat/shell/recipes"

QUICK = ("--force_image_size", "56", "--max_dynamic_patch", "2", "--max_steps", "3", "--save_steps", "2")


def environment(tiny_model, sample_data, folder: Path, **values: str) -> dict[str, str]:
    return {
        "GPUS": "0",
        "MODEL_PATH": str(tiny_model),
        "META_PATH": str(sample_data / "train.json"),
        "OUTPUT_DIR": str(folder),
        **values,
    }


@pytest.mark.parametrize(
    ("name", "weights", "ranks", "folder"),
    [
        ("lora", "adapter_model.safetensors", "1", "flag"),
        ("fullmodel", "model.safetensors", "2", "variable"),
        pytest.param("lora", "adapter_model.safetensors", "2", "variable", marks=pytest.mark.slow),
        pytest.param("fullmodel", "model.safetensors", "1", "flag", marks=pytest.mark.slow),
    ],
)
def test_launcher_trains(tiny_model, sample_data, tmp_path, metrics, name, weights, ranks, folder):
    """Into a folder relative to the working folder, from OUTPUT_DIR or from the flags, which win."""
    given, words = "out with space", list(QUICK)
    if folder == "flag":
        words += ["--output_dir", "out with space"]
        given = "unused"
    variables = environment(tiny_model, sample_data, Path(given), NPROC=ranks, BATCH_SIZE="4")
    result = run_launcher(name, *words, cwd=tmp_path, **variables)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    out = tmp_path / "out with space"
    assert list(tmp_path.iterdir()) == [out]
    assert [r["records"] for r in metrics(out)] == [4, 4, 4]
    assert (out / weights).is_file()
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    [session] = map(json.loads, (out / "sessions.jsonl").read_text().splitlines())
    assert (session["step"], session["total_steps"], session["hardware"]["ranks"]) == (0, 3, int(ranks))
    report = (out / "report.html").read_text()
    assert "finished</span>" in report and 'id="chart-loss"' in report
    log = (out / "training_log.txt").read_text()
    for shown in ("trainable    share", "finished: the model is in"):
        assert shown in log
    assert log.rstrip("\n") in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"BATCH_SIZE": "5", "NPROC": "2"}, "BATCH_SIZE=5 must be divisible"),
        ({"BATCH_SIZE": "many"}, "BATCH_SIZE must be a non-negative integer"),
        ({"NPROC": "-1"}, "NPROC must be a non-negative integer, found '-1'"),
        ({"PER_DEVICE_BATCH_SIZE": "0"}, "PER_DEVICE_BATCH_SIZE must be at least 1"),
        ({"GPUS": "1", "NPROC": "2"}, "NPROC=2 exceeds GPUS=1"),
        ({"NNODES": "2"}, "NNODES=2 requires MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NNODES=2 requires NODE_RANK"),
        ({"NNODES": "2:1"}, "NNODES must be a number of nodes or a range MIN:MAX, found '2:1'"),
        (
            {"NNODES": "1:8", "MASTER_ADDR": "a", "BATCH_SIZE": "7"},
            "BATCH_SIZE=7 must be at least 8 (8 node(s)",
        ),
        ({"NNODES": "1:2", "MASTER_ADDR": "a", "DEEPSPEED": "z.json"}, "DeepSpeed cannot resume with a diff"),
        (
            {"NNODES": "1:2", "MASTER_ADDR": "a", "RDZV_BACKEND": "static"},
            "a range of nodes, needs RDZV_BACK",
        ),
        (
            {"NNODES": "2", "MASTER_ADDR": "a", "RDZV_BACKEND": "static", "MAX_RESTARTS": "1"},
            "MAX_RESTARTS=1 on multiple nodes needs RDZV_BACKEND=c10d",
        ),
        ({"RDZV_BACKEND": "etcd"}, "RDZV_BACKEND must be static or c10d, found 'etcd'"),
        ({"PYTHON": "/no/python"}, "PYTHON=/no/python: no such interpreter"),
    ],
)
def test_bad_environment(tiny_model, sample_data, tmp_path, changes, message):
    variables = {**environment(tiny_model, sample_data, tmp_path / "out"), **changes}
    result = run_launcher("fullmodel", *QUICK, cwd=tmp_path, **variables)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_all_problems_with_the_environment_are_reported(tmp_path):
    variables = {
        "GPUS": "x", "BATCH_SIZE": "08", "PER_DEVICE_BATCH_SIZE": "-1", "NNODES": "2", "NODE_RANK": "2",
        "MASTER_ADDR": "a b", "MASTER_PORT": "70000", "MAX_RESTARTS": "$(id)", "RDZV_ID": "a/b",
        "RDZV_BACKEND": "no", "PYTHON": "/no/python",
    }  # fmt: skip
    result = run_launcher("lora", "--global_batch_size", "3", cwd=tmp_path, **variables)
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    names = ["--global_batch_size", *variables]
    names.remove("NNODES")
    assert len(lines) == len(names) and all("M3LLM-fulldata-lora.sh: " in line for line in lines)
    assert {line.split(": ")[1].split()[0].split("=")[0].rstrip(":") for line in lines} == set(names)


@pytest.mark.parametrize(
    "flag",
    ["--per_device_train_batch_size=4", "--gradient-accumulation-steps", "--per_device_train_batch_size"],
)
def test_flags_that_contradict_the_batch_size(tiny_model, sample_data, tmp_path, flag):
    result = run_launcher(
        "lora", flag, "4", cwd=tmp_path, **environment(tiny_model, sample_data, tmp_path / "out")
    )
    assert result.returncode == 2
    assert f"{flag}: the launcher sets this flag from BATCH_SIZE" in result.stderr


@pytest.mark.parametrize("ranks", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_failing_run_fails_the_launcher_and_leaves_nothing(tiny_model, sample_data, tmp_path, ranks):
    variables = environment(tiny_model, sample_data, tmp_path / "out", NPROC=ranks)
    result = run_launcher("lora", "--lerning_rate", "1", cwd=tmp_path, **variables)
    assert result.returncode == 2
    assert result.stdout.count("did you mean --learning_rate?") == 1
    assert "Traceback" not in result.stdout + result.stderr
    assert not (tmp_path / "out").exists()


def test_wandb_key_enables_wandb_and_is_not_written(tiny_model, sample_data, tmp_path):
    secret = "0123456789abcdef0123456789abcdef01234567"
    variables = environment(tiny_model, sample_data, tmp_path / "out", WANDB_MODE="offline", BATCH_SIZE="2")
    result = run_launcher(
        "lora",
        *QUICK,
        "--max_steps",
        "1",
        cwd=tmp_path,
        **variables,
        WANDB_API_KEY=secret,
        WANDB_DIR=str(tmp_path),
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert re.search(r"report_to:\s+- wandb\n", (tmp_path / "out/config.yaml").read_text())
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), file


RECIPE = {
    "lora": {
        "max_dynamic_patch": "6", "max_seq_length": "8192", "freeze_llm": "True", "freeze_mlp": "True",
        "use_llm_lora": "16", "gradient_accumulation_steps": "16",
    },
    "fullmodel": {
        "max_dynamic_patch": "12", "max_seq_length": "16384", "max_packed_tokens": "16384",
        "freeze_llm": "False", "freeze_mlp": "False", "gradient_accumulation_steps": "1",
    },
}  # fmt: skip
BOTH = {
    "model_name_or_path": "OpenGVLab/InternVL3-8B",
    "conv_style": "internvl2_5", "force_image_size": "448", "down_sample_ratio": "0.5",
    "drop_path_rate": "0.0", "bf16": "True", "per_device_train_batch_size": "1",
    "freeze_backbone": "True", "vision_select_layer": "-1", "num_train_epochs": "1", "save_steps": "200",
    "save_total_limit": "1", "learning_rate": "5e-6", "weight_decay": "0.05", "warmup_ratio": "0.03",
    "lr_scheduler_type": "cosine", "grad_checkpoint": "auto", "group_by_length": "True",
    "dynamic_image_size": "True", "use_thumbnail": "True", "ps_version": "v2", "loss_reduction": "sample",
    "sanity_check": "True", "report_to": "none",
}  # fmt: skip


@pytest.fixture
def command(tmp_path):
    """Return a function that runs a launcher with a fake interpreter, which prints its arguments."""
    interpreter = tmp_path / "python"
    interpreter.write_text(
        '#!/bin/sh\nprintf "%s\\n" "alloc=$PYTORCH_ALLOC_CONF" "cuda=$CUDA_VISIBLE_DEVICES" "$@"\n'
    )
    interpreter.chmod(0o755)

    def run(name: str, *argv: str, **environment: str) -> tuple[list[str], dict[str, str], list[str]]:
        """Return the words before the training script, its flags, and the environment lines."""
        result = run_launcher(name, *argv, cwd=tmp_path, PYTHON=str(interpreter), **environment)
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        script = lines.index(str(SOURCE_ROOT / "internvl_chat/train/internvl_chat_finetune.py"))
        flags = lines[script + 1 :]
        values = {k.removeprefix("--"): v for k, v in zip(flags[::2], flags[1::2], strict=True)}
        return lines[2:script], values, lines[:2]

    return run


@pytest.mark.parametrize("name", RECIPE)
def test_launcher_runs_torchrun_with_the_recipe(command, name):
    torchrun, flags, environment = command(name)
    assert torchrun[:2] == ["-m", "internvl_chat.train.distributed.launch"]
    assert torchrun[-2:] == ["--nproc_per_node", "1" if name == "lora" else "2"]
    assert flags.items() >= (BOTH | RECIPE[name]).items()
    assert ("use_llm_lora" in flags) == (name == "lora")
    assert not flags.keys() & {"use_cpu", "parallel", "deepspeed"}
    assert environment[0] == "alloc=expandable_segments:True"


@pytest.mark.parametrize("name", RECIPE)
def test_recipe_file_is_the_recipe_of_the_launcher(command, name, monkeypatch):
    """Both result in the same configuration on one device, except for the base folder of relative paths."""
    monkeypatch.chdir(SOURCE_ROOT.parent)
    _, flags, _ = command(name, GPUS="0")
    launched = parse_arguments([text for flag in flags.items() for text in (f"--{flag[0]}", flag[1])])
    cpu = ["--use_cpu", "True", "--bf16", "False"]
    recipe = RECIPES / f"{name.removesuffix('model')}.yaml"
    read = parse_arguments([str(recipe), *cpu, "--data_root", str(SOURCE_ROOT.parent)])
    assert Path(read.data.meta_path).samefile(launched.data.meta_path)
    same_data = dataclasses.replace(read.data, meta_path=launched.data.meta_path)
    same_run = dataclasses.replace(read.run, flags=launched.run.flags)
    assert TrainConfig(read.model, same_data, same_run) == launched


def test_qlora_is_the_lora_recipe_on_4_bit_weights():
    lora, qlora = (yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) for name in ("lora", "qlora"))
    changed = {flag: value for flag, value in qlora.items() if value != lora.get(flag)}
    assert changed == {"output_dir": "work_dirs/M3LLM-fulldatav2-qlora-lr=5e-6", "load_in_4bit": True}
    assert lora.keys() < qlora.keys()


@pytest.mark.parametrize("name", ["lora", "full", "qlora"])
def test_recipe_file_gives_no_defaults(name):
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    defaults = {flag.name: flag.default for flags in flag_groups().values() for flag in flags}
    assert not [flag for flag, value in values.items() if value == defaults[flag]]


def test_recipe_file_with_overrides_trains(tiny_model, sample_data, tmp_path, metrics):
    overrides = {
        "model_name_or_path": tiny_model, "meta_path": sample_data / "train.json", "output_dir": tmp_path,
        "use_cpu": True, "bf16": False, "force_image_size": 56, "max_dynamic_patch": 1, "max_steps": 2,
        "gradient_accumulation_steps": 2, "dataloader_num_workers": 0,
    }  # fmt: skip
    words = [text for flag, value in overrides.items() for text in (f"--{flag}", str(value))]
    assert m3llm(["train", str(RECIPES / "lora.yaml"), *words]) == 0
    assert [row["records"] for row in metrics(tmp_path)] == [2, 2]
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", RECIPE)
def test_launcher_prints_its_command_without_secrets(name):
    text = (LAUNCHERS / f"M3LLM-fulldata-{name}.sh").read_text()
    assert re.search(r"^torchrun .*internvl_chat_finetune\.py", text, flags=re.MULTILINE)
    shown = dict(re.findall(r"^  --(\S+) (\S+) \\$", text, flags=re.MULTILINE))
    assert '\n  "${BATCH_FLAGS[@]}" \\\n' in text
    recipe = BOTH | RECIPE[name]
    del recipe["gradient_accumulation_steps"]
    given = {key: value for key, value in recipe.items() if not shown[key].startswith('"$')}
    assert len(given) > 20 and shown.items() >= given.items()
    assert text.endswith('"$@"\n')
    assert "HOME=" not in text
    assert not re.search(r"[0-9a-f]{32}", text)


def test_environment_becomes_flags(command):
    torchrun, flags, environment = command(
        "lora", "--max_steps", "3", GPUS="0", NPROC="2", BATCH_SIZE="8", PER_DEVICE_BATCH_SIZE="2",
        PARALLEL="fsdp", DEEPSPEED="zero 1.json", WANDB_API_KEY="key", MAX_RESTARTS="2",
        PYTORCH_ALLOC_CONF="max_split_size_mb:64",
    )  # fmt: skip
    shown = "--max_restarts 2 --standalone --local_addr localhost --nproc_per_node 2"
    assert " ".join(torchrun[2:]) == shown
    expected = {
        "use_cpu": "True", "bf16": "False", "gradient_accumulation_steps": "2", "parallel": "fsdp",
        "per_device_train_batch_size": "2", "deepspeed": "zero 1.json", "report_to": "wandb",
        "max_steps": "3",
    }  # fmt: skip
    assert flags.items() >= expected.items()
    assert environment == ["alloc=max_split_size_mb:64", "cuda="]


def test_several_nodes(command):
    torchrun, flags, _ = command("fullmodel", NNODES="2", NODE_RANK="1", MASTER_ADDR="node0", BATCH_SIZE="8")
    shown = "--nnodes 2 --node_rank 1 --master_addr node0 --master_port 34229 --nproc_per_node 2"
    assert " ".join(torchrun[4:]) == shown
    assert flags["gradient_accumulation_steps"] == "2"


@pytest.mark.parametrize(
    ("variables", "conf"),
    [
        ({}, None),
        ({"NODE_RANK": "0"}, "is_host=1"),
        ({"NODE_RANK": "1", "PET_RDZV_CONF": "a=2"}, "is_host=0,a=2"),
    ],
)
def test_range_of_nodes(command, variables, conf):
    torchrun, flags, _ = command(
        "lora", NNODES="1:3", MASTER_ADDR="node0", MASTER_PORT="99", RDZV_ID="job7", **variables
    )
    shown = "--max_restarts 0 --nnodes 1:3 --rdzv_backend c10d --rdzv_id job7 --rdzv_endpoint node0:99"
    shown += f" --rdzv_conf {conf}" if conf else ""
    assert " ".join(torchrun[2:]) == f"{shown} --nproc_per_node 1"
    assert flags["global_batch_size"] == "16" and "gradient_accumulation_steps" not in flags


def test_restarts_on_multiple_nodes_use_c10d(command):
    torchrun, flags, _ = command("lora", NNODES="2", MASTER_ADDR="node0", MAX_RESTARTS="3")
    assert "--rdzv_backend c10d --rdzv_id m3llm --rdzv_endpoint node0:34229" in " ".join(torchrun)
    assert flags["gradient_accumulation_steps"] == "8"


def test_shipped_meta_file_lists_the_six_datasets():
    meta = json.loads((LAUNCHERS / "../../data/PMC-data.json").resolve().read_text())
    assert {name: entry["length"] for name, entry in meta.items()} == {
        "qa-puretext": 40382,
        "qa-bbox": 40293,
        "qa-single_subimage": 40287,
        "qa-multiple_subimage": 39462,
        "qa-subimage-option": 40295,
        "qa-compound-image": 37029,
    }
    assert not any("max_dynamic_patch" in entry for entry in meta.values())

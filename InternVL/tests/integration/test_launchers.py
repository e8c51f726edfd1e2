"""Both launchers, run as a user runs them: from another folder, with settings in the environment."""

import json
import re
from pathlib import Path

import pytest
from helpers import LAUNCHERS, run_launcher

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
    ("name", "weights"), [("lora", "adapter_model.safetensors"), ("fullmodel", "model.safetensors")]
)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_launcher_trains(tiny_model, sample_data, tmp_path, metrics, name, weights, processes):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    out = tmp_path / "out with space"
    result = run_launcher(
        name,
        *QUICK,
        cwd=elsewhere,
        **environment(tiny_model, sample_data, out, NPROC=processes, BATCH_SIZE="4"),
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert [r["records"] for r in metrics(out)] == [4, 4, 4]
    assert (out / weights).is_file()
    log = (out / "training_log.txt").read_text()
    for shown in ("attention: varlen", "trainable    share", "'loss'", "finished: the model is in"):
        assert shown in log
    assert not list(elsewhere.iterdir())


def test_relative_paths_count_from_the_callers_folder(tiny_model, sample_data, tmp_path, metrics):
    variables = environment(tiny_model, sample_data, tmp_path)
    variables["OUTPUT_DIR"] = "here"
    result = run_launcher("lora", *QUICK, "--max_steps", "1", cwd=tmp_path, **variables, BATCH_SIZE="2")
    assert result.returncode == 0, result.stdout[-3000:]
    assert len(metrics(tmp_path / "here")) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"BATCH_SIZE": "5", "NPROC": "2"}, "BATCH_SIZE=5 cannot be divided"),
        ({"BATCH_SIZE": "many"}, "BATCH_SIZE must be a whole number"),
        ({"GPUS": "1", "NPROC": "2"}, "need as many GPUs"),
    ],
)
def test_bad_environment(tiny_model, sample_data, tmp_path, changes, message):
    variables = {**environment(tiny_model, sample_data, tmp_path / "out"), **changes}
    result = run_launcher("fullmodel", *QUICK, cwd=tmp_path, **variables)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_failing_run_fails_the_launcher_and_leaves_nothing(tiny_model, sample_data, tmp_path, processes):
    variables = environment(tiny_model, sample_data, tmp_path / "out", NPROC=processes)
    result = run_launcher("lora", "--lerning_rate", "1", cwd=tmp_path, **variables)
    assert result.returncode == 2
    assert result.stdout.count("did you mean --learning_rate?") == 1
    assert "Traceback" not in result.stdout + result.stderr
    assert not (tmp_path / "out").exists()


def test_wandb_key_turns_wandb_on_and_is_written_nowhere(tiny_model, sample_data, tmp_path):
    secret = "0123456789abcdef0123456789abcdef01234567"
    variables = environment(tiny_model, sample_data, tmp_path / "out", WANDB_MODE="offline", BATCH_SIZE="2")
    result = run_launcher(
        "lora", *QUICK, cwd=tmp_path, **variables, WANDB_API_KEY=secret, WANDB_DIR=str(tmp_path)
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "report_to:\n  - wandb" in (tmp_path / "out/config.yaml").read_text()
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), file


RECIPE = {
    "lora": {"max_dynamic_patch": "6", "freeze_llm": "True", "freeze_mlp": "True", "use_llm_lora": "16"},
    "fullmodel": {"max_dynamic_patch": "12", "freeze_llm": "False", "freeze_mlp": "False"},
}
BOTH = {
    "conv_style": "internvl2_5", "force_image_size": "448", "down_sample_ratio": "0.5",
    "drop_path_rate": "0.0",
    "freeze_backbone": "True", "vision_select_layer": "-1", "num_train_epochs": "1", "save_steps": "200",
    "save_total_limit": "1", "learning_rate": "5e-6", "weight_decay": "0.05", "warmup_ratio": "0.03",
    "lr_scheduler_type": "cosine", "max_seq_length": "8192", "grad_checkpoint": "auto",
    "group_by_length": "True", "dynamic_image_size": "True", "use_thumbnail": "True", "ps_version": "v2",
    "loss_reduction": "sample",
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPE)
def test_launcher_holds_the_recipe_and_no_secret(name):
    text = (LAUNCHERS / f"M3LLM-fulldata-{name}.sh").read_text()
    flags = dict(re.findall(r"^  --(\S+) (\S+) \\$", text, flags=re.MULTILINE))
    assert {key: flags.get(key) for key in {**BOTH, **RECIPE[name]}} == {**BOTH, **RECIPE[name]}
    assert ("use_llm_lora" in flags) == (name == "lora")
    assert "HOME=" not in text
    assert not re.search(r"[0-9a-f]{32}", text)


def test_shipped_meta_file_names_the_six_sets():
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


def test_output_folder_among_the_flags_gets_the_log_too(tiny_model, sample_data, tmp_path):
    variables = environment(tiny_model, sample_data, tmp_path / "unused", BATCH_SIZE="2")
    result = run_launcher("lora", *QUICK, "--output_dir", str(tmp_path / "out"), cwd=tmp_path, **variables)
    assert result.returncode == 0, result.stdout[-3000:]
    assert (tmp_path / "out/training_log.txt").is_file()
    assert not (tmp_path / "unused").exists()

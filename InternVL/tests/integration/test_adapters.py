"""Each LoRA variant and each 8-bit optimizer trains, resumes exactly, merges, exports and passes parity."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import WEIGHTS, changed_weights, needs_bitsandbytes, needs_torchao

from internvl_chat.cli import main as m3llm
from internvl_chat.model.io.weights import open_weights
from internvl_chat.train.internvl_chat_finetune import main as train

VARIANTS = [
    pytest.param({"use_dora": True, "use_rslora": True}, id="DoRA and rsLoRA"),
    pytest.param({"loraplus_lr_ratio": 16, "llm_lr": 1e-4}, id="LoRA+"),
    pytest.param({"load_in_4bit": True, "use_dora": True}, id="QDoRA", marks=needs_bitsandbytes),
    pytest.param({"load_in_4bit": True, "use_backbone_lora": 2}, id="QLoRA", marks=needs_bitsandbytes),
    pytest.param(
        {"use_llm_lora": 0, "freeze_llm": False, "optim": "adamw_torch_8bit"},
        id="8-bit AdamW of torchao",
        marks=needs_torchao,
    ),
    pytest.param(
        {"use_llm_lora": 0, "freeze_llm": False, "optim": "adamw_bnb_8bit"},
        id="8-bit AdamW of bitsandbytes",
        marks=needs_bitsandbytes,
    ),
]


@pytest.fixture(autouse=True)
def _eager():
    """Do not compile torchao's optimizer step."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def stop_after_step_2(finished: Path, target: Path) -> None:
    """Copy a finished run as if it had been killed after step 2."""
    shutil.copytree(finished, target)
    shutil.rmtree(target / "checkpoint-4")
    for name in ("train_results.json", *WEIGHTS.values()):
        (target / name).unlink(missing_ok=True)


@needs_bitsandbytes
def test_training_on_4_bit_weights(small_run, tmp_path, metrics, capfd):
    """The losses are those of the 4-bit weights, and only the adapters are saved."""
    runs = {bits: tmp_path / str(bits) for bits in (4, 32)}
    for bits, folder in runs.items():
        options = {"max_steps": 1, "freeze_mlp": True, "load_in_4bit": bits == 4}
        assert train(small_run(folder, "lora", **options)) == 0
    four, full = (metrics(folder)[0]["loss"] for folder in runs.values())
    assert four != full and abs(four - full) < 0.1
    files = [folder / "adapter_model.safetensors" for folder in runs.values()]
    assert open_weights(files[0]).keys() == open_weights(files[1]).keys()
    assert json.loads((runs[4] / "base_model.json").read_text())["quantization"] == "nf4"
    assert "| load_in_4bit | True |" in (runs[4] / "README.md").read_text()
    tables = [line.split() for line in capfd.readouterr().err.splitlines() if line.startswith("total ")]
    assert len(tables) == 2 and tables[0] == tables[1]


@pytest.mark.slow
@pytest.mark.parametrize("options", VARIANTS)
def test_train_resume_merge_and_export(small_run, tmp_path, metrics, capsys, options):
    finished, stopped = tmp_path / "finished", tmp_path / "stopped"
    options = {"max_steps": 4, "save_steps": 2, "lora_dropout": 0.1, **options}
    assert train(small_run(finished, "lora", **options)) == 0
    stop_after_step_2(finished, stopped)
    assert train(small_run(stopped, "lora", **options)) == 0
    assert [row["loss"] for row in metrics(stopped)] == [row["loss"] for row in metrics(finished)]
    assert not changed_weights(finished, stopped)
    assert len({row["loss"] for row in metrics(finished)}) == 4

    capsys.readouterr()
    if "optim" not in options:
        assert m3llm(["merge", str(finished), str(tmp_path / "merged"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["merged_layers"] == 14 + 8 * (
            "use_backbone_lora" in options
        )
    assert m3llm(["export", str(finished), str(tmp_path / "hf")]) == 0
    assert m3llm(["parity", str(finished), str(tmp_path / "hf")]) == 0

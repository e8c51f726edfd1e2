"""Fixtures of the integration tests."""

import json
import sys

import pytest
from helpers import RECIPES, flags, run_launcher

from internvl_chat.train import internvl_chat_finetune


@pytest.fixture(scope="module")
def augmented(sample_data, tmp_path_factory):
    """Meta file of the sample data with random augmentation, to test the random state of the dataloader."""
    meta = json.loads((sample_data / "train.json").read_text())
    for entry in meta.values():
        entry["data_augment"] = True
    path = tmp_path_factory.mktemp("meta") / "augmented.json"
    path.write_text(json.dumps(meta))
    return path


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Plot and report take as long as the training of a small model; runs of the launchers have theirs."""

    def plot_loss(metrics, output, *_, **__):
        output.write_bytes(b"")

    monkeypatch.setattr(internvl_chat_finetune, "plot_loss", plot_loss)
    monkeypatch.setattr(internvl_chat_finetune, "write_run_report", lambda output: None)


@pytest.fixture(scope="module")
def small_run(tiny_model, augmented):
    """Return a function that builds the command line of a small run, with changes."""

    def make(folder, recipe="full", **values) -> list[str]:
        common = {
            "model_name_or_path": tiny_model,
            "meta_path": augmented,
            "output_dir": folder,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        }
        return flags(**{**common, **RECIPES[recipe], **values})

    return make


@pytest.fixture(scope="session")
def node_run(tiny_model, sample_data):
    """Flags of a run with the launcher for full training, and a function that returns its variables."""
    options = ["--force_image_size", "56", "--max_dynamic_patch", "2", "--max_steps", "40"]
    options += ["--save_steps", "5", "--dataloader_num_workers", "0", "--disable_tqdm", "True"]
    options += ["--async_save", "False", "--learning_rate", "1e-3"]

    def variables(folder) -> dict[str, str]:
        return {
            "GPUS": "0", "BATCH_SIZE": "4", "MODEL_PATH": str(tiny_model), "OUTPUT_DIR": str(folder),
            "META_PATH": str(sample_data / "train.json"), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
            "REPORT_TO": "none",
        }  # fmt: skip

    return options, variables


@pytest.fixture(scope="session")
def undisturbed(node_run, tmp_path_factory):
    """Output folder of `node_run`, trained without interruption on two ranks of one node."""
    options, variables = node_run
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    result = run_launcher("fullmodel", *options, cwd=folder.parent, NPROC="2", **variables(folder))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder

"""Fixtures of the integration tests."""

import json

import pytest
from helpers import RECIPES, flags

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

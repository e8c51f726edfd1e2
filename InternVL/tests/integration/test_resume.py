"""A resumed run does what the undisturbed one would have done: same records, same losses, same weights."""

import json
import shutil

import pytest
import torch
from helpers import flags

from internvl_chat.model.weights import open_weights
from internvl_chat.train.internvl_chat_finetune import main as train


@pytest.fixture(scope="module")
def augmented(sample_data, tmp_path_factory):
    """The sample data with random augmentation, so that randomness in the loader counts too."""
    meta = json.loads((sample_data / "train.json").read_text())
    for entry in meta.values():
        entry["data_augment"] = True
    path = tmp_path_factory.mktemp("meta") / "augmented.json"
    path.write_text(json.dumps(meta))
    return path


RECIPES = {
    "full": {},
    "lora": {"use_llm_lora": 4, "freeze_llm": True, "lora_dropout": 0.1},
}
WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}


def arguments(tiny_model, augmented, folder, recipe, **values):
    return flags(
        model_name_or_path=tiny_model,
        meta_path=augmented,
        output_dir=folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=9,  # one and a half epochs
        save_steps=2,
        dataloader_num_workers=2,
        **{**RECIPES[recipe], **values},
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_resume_is_exact(tiny_model, augmented, tmp_path, metrics, recipe):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(arguments(tiny_model, augmented, whole, recipe)) == 0
    for step in (4, 6, 8):  # within an epoch, at its end, in the next
        checkpoint = str(whole / f"checkpoint-{step}")
        again = arguments(tiny_model, augmented, resumed, recipe, resume_from_checkpoint=checkpoint)
        assert train(again) == 0
        expected = [
            (r["step"], r["epoch"], r["loss"], r["grad_norm"], r["learning_rate"]) for r in metrics(whole)
        ]
        found = [
            (r["step"], r["epoch"], r["loss"], r["grad_norm"], r["learning_rate"]) for r in metrics(resumed)
        ]
        assert found == expected[step:]
        ledgers = [(folder / "ledger.jsonl").read_text().splitlines() for folder in (whole, resumed)]
        assert ledgers[1] == ledgers[0][step:]
        weights = [open_weights(folder / WEIGHTS[recipe]) for folder in (whole, resumed)]
        assert weights[0].keys() == weights[1].keys()
        for name, read in weights[0].items():
            assert torch.equal(read(), weights[1][name]()), name
        shutil.rmtree(resumed)


def test_same_command_again_goes_on_where_it_stopped(tiny_model, augmented, tmp_path, metrics):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(arguments(tiny_model, augmented, whole, "full")) == 0
    assert train(arguments(tiny_model, augmented, stopped, "full")) == 0
    # As if it had been killed between steps 6 and 7, while a checkpoint was being written.
    (stopped / "train_results.json").unlink()
    (stopped / "model.safetensors").unlink()
    for step in (8, 9):
        shutil.rmtree(stopped / f"checkpoint-{step}")
    (stopped / ".partial/checkpoint-8").mkdir(parents=True)
    assert train(arguments(tiny_model, augmented, stopped, "full")) == 0
    assert [r["loss"] for r in metrics(stopped)] == [r["loss"] for r in metrics(whole)]
    assert [r["step"] for r in metrics(stopped)] == list(range(1, 10))
    assert (stopped / "ledger.jsonl").read_text() == (whole / "ledger.jsonl").read_text()

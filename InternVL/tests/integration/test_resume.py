"""A resumed run matches an uninterrupted run: records, losses and weights."""

import json
import shutil
from functools import cache, partial

import pytest
import torch
from helpers import RECIPES, WEIGHTS, changed_weights

from internvl_chat.model.io.weights import open_weights
from internvl_chat.train.internvl_chat_finetune import main as train


@pytest.fixture(scope="module")
def arguments(small_run):
    """Builder of the command line for one and a half epochs."""
    return partial(small_run, max_steps=9, save_steps=2, dataloader_num_workers=2)


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """Folders of finished runs by recipe, only to be read."""

    @cache
    def get(recipe="full"):
        folder = tmp_path_factory.mktemp("finished") / recipe
        assert train(arguments(folder, recipe)) == 0
        return folder

    return get


@pytest.mark.parametrize("recipe", RECIPES)
def test_resume_is_exact(arguments, finished, tmp_path, metrics, recipe):
    full, resumed = finished(recipe), tmp_path / "resumed"
    for step in (4, 6, 8):  # within an epoch, at its end, in the next
        checkpoint = str(full / f"checkpoint-{step}")
        again = arguments(resumed, recipe, resume_from_checkpoint=checkpoint)
        assert train(again) == 0
        keys = ("step", "epoch", "loss", "grad_norm", "learning_rate")
        expected, found = ([[row[key] for key in keys] for row in metrics(run)] for run in (full, resumed))
        assert found == expected[step:]
        ledgers = [(folder / "ledger.jsonl").read_text().splitlines() for folder in (full, resumed)]
        assert ledgers[1] == ledgers[0][step:]
        assert not changed_weights(full, resumed)
        shutil.rmtree(resumed)


def test_same_command_resumes(arguments, finished, tmp_path, metrics):
    full, stopped = finished(), tmp_path / "stopped"
    shutil.copytree(full, stopped)
    # Simulates a kill between steps 6 and 7, while a checkpoint was being written.
    (stopped / "train_results.json").unlink()
    (stopped / "model.safetensors").unlink()
    for step in (8, 9):
        shutil.rmtree(stopped / f"checkpoint-{step}")
    (stopped / ".partial/checkpoint-8").mkdir(parents=True)
    assert train(arguments(stopped)) == 0
    assert [r["loss"] for r in metrics(stopped)] == [r["loss"] for r in metrics(full)]
    assert [r["step"] for r in metrics(stopped)] == list(range(1, 10))
    assert (stopped / "ledger.jsonl").read_text() == (full / "ledger.jsonl").read_text()
    sessions = [json.loads(line) for line in (stopped / "sessions.jsonl").read_text().splitlines()]
    assert [(session["step"], session["total_steps"]) for session in sessions] == [(0, 9), (6, 9)]
    assert sessions[0]["data"] == sessions[1]["data"]


def test_resumed_run_leaves_the_same_files(arguments, tmp_path):
    """This also holds if rotation has deleted the checkpoint from which the run resumed."""
    full, stopped = tmp_path / "full", tmp_path / "stopped"
    for recipe in RECIPES:
        assert train(arguments(full, recipe, save_total_limit=1)) == 0
        shutil.copytree(full, stopped)
        for name in ("train_results.json", WEIGHTS[recipe]):
            (stopped / name).unlink()
        assert (
            train(arguments(stopped, recipe, save_total_limit=1, max_steps=12, allow_resume_changes=True))
            == 0
        )
        expected = {p.name for p in full.iterdir()} - {"checkpoint-9"} | {"checkpoint-12"}
        assert {p.name for p in stopped.iterdir()} == expected
        for step, folder in ((9, full), (12, stopped)):
            files = {p.name for p in (folder / f"checkpoint-{step}").iterdir()}
            assert {"tokenizer.json", "vocab.json", "preprocessing.json", "generation_config.json"} <= files
        shutil.rmtree(full)
        shutil.rmtree(stopped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "seed is 7, but the checkpoint has 42"),
        ({"optim": "adafactor"}, "optim is 'adafactor', but the checkpoint has 'adamw_torch_fused'"),
        ({"adam_beta2": 0.95}, "adam_beta2 is 0.95, but the checkpoint has 0.999"),
        ({"gradient_accumulation_steps": 4}, "(records per step) is 8, but the checkpoint has 4"),
        ({"use_llm_lora": 2, "freeze_llm": True}, "use_llm_lora is 2, but the checkpoint has 0"),
        (
            {"train_sampling_strategy": "sequential"},
            "train_sampling_strategy is 'sequential', but the checkpoint has 'random'",
        ),
    ],
)
def test_resuming_with_other_flags_is_refused(arguments, finished, tmp_path, capfd, change, message):
    checkpoint = finished() / "checkpoint-2"
    capfd.readouterr()
    assert train(arguments(tmp_path / "second", resume_from_checkpoint=checkpoint, **change)) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "second").exists()


def test_resuming_on_other_data_is_refused(arguments, finished, augmented, tmp_path, capfd):
    meta = json.loads(augmented.read_text())
    meta["qa-bbox"]["repeat_time"] = 2
    other = tmp_path / "other.json"
    other.write_text(json.dumps(meta))
    checkpoint = finished() / "checkpoint-2"
    again = arguments(tmp_path / "second", meta_path=other, resume_from_checkpoint=checkpoint)
    assert train(again) == 2
    assert "but the checkpoint has [4, 4, 4, 4, 4, 4]" in capfd.readouterr().err


def test_more_steps_after_a_finished_run(arguments, tmp_path, metrics, capfd):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert train(arguments(first, "lora", max_steps=2)) == 0
    again = partial(
        arguments, second, "lora", max_steps=4, weight_decay=0.1, save_only_model=True,
        resume_from_checkpoint=first / "checkpoint-2",
    )  # fmt: skip
    assert train(again()) == 2
    stderr = capfd.readouterr().err
    assert "total steps is 4, but the checkpoint has 2" in stderr and "weight_decay is 0.1" in stderr
    assert not second.exists()
    assert train(again(allow_resume_changes=True)) == 0
    stderr = capfd.readouterr().err
    assert "total steps 2 -> 4: the learning rate follows the new schedule from step 3" in stderr
    assert "learning rate at step 3: 0.0005 (0 in the schedule of the checkpoint)" in stderr
    assert [row["learning_rate"] for row in metrics(second)] == [5e-4, 2.5e-4]
    assert "--save_only_model True: the checkpoints have no optimizer state" in stderr

    # The second run has saved no optimizer state.
    checkpoint = second / "checkpoint-4"
    again = partial(arguments, third, "lora", max_steps=5, resume_from_checkpoint=checkpoint)
    assert train(again()) == 2
    assert "has no optimizer state (--save_only_model)" in capfd.readouterr().err
    assert train(again(allow_resume_changes=True)) == 0
    assert "moments start at zero in step 5" in capfd.readouterr().err
    assert [row["step"] for row in metrics(third)] == [5]
    assert metrics(third)[0]["learning_rate"] == pytest.approx(2e-4)


def test_adapters_resume_though_their_base_has_moved(arguments, tiny_model, tmp_path):
    base, moved, run = tmp_path / "base", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(tiny_model, base)
    assert train(arguments(run, "lora", model_name_or_path=base, max_steps=4)) == 0
    base.rename(moved)
    again = {"model_name_or_path": moved, "resume_from_checkpoint": run / "checkpoint-4", "max_steps": 4}
    assert train(arguments(tmp_path / "more", "lora", **again)) == 0


def test_going_back_to_an_earlier_checkpoint(arguments, tmp_path, metrics):
    run = tmp_path / "run"
    assert train(arguments(run, max_steps=6)) == 0
    expected = [row["loss"] for row in metrics(run)]
    checkpoint = run / "checkpoint-2"
    again = arguments(run, max_steps=6, resume_from_checkpoint=checkpoint)
    assert train(again) == 0
    assert [row["loss"] for row in metrics(run)] == expected
    assert {p.name for p in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def test_complete_run_takes_no_more_steps(arguments, tmp_path, metrics):
    """Simulates a kill while the final model was being written."""
    run = tmp_path / "run"
    assert train(arguments(run, max_steps=4)) == 0
    weights = {name: read().clone() for name, read in open_weights(run / "model.safetensors").items()}
    for name in ("train_results.json", "model.safetensors"):
        (run / name).unlink()
    assert train(arguments(run, max_steps=4)) == 0
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    for name, read in open_weights(run / "model.safetensors").items():
        assert torch.equal(read(), weights[name])


@pytest.mark.parametrize("recipe", RECIPES)
def test_saving_at_every_step_changes_nothing(arguments, tmp_path, metrics, recipe):
    """Checkpoints written in the background match those written in the foreground."""
    waits, background = tmp_path / "waits", tmp_path / "background"
    for folder, asynchronous in ((waits, False), (background, True)):
        values = {"save_steps": 1, "bf16": True, "max_steps": 5, "async_save": asynchronous}
        assert train(arguments(folder, recipe, **values)) == 0
    assert len(list(waits.glob("checkpoint-*"))) == 5
    assert [row["loss"] for row in metrics(waits)] == [row["loss"] for row in metrics(background)]
    saved = sorted(folder.name for folder in background.glob("checkpoint-*"))
    assert saved[-1] == "checkpoint-5"  # some of the others may have been skipped
    for name in saved:
        assert not changed_weights(background / name, waits / name)
        states = [open_weights(*(f / name / "optimizer").iterdir()) for f in (background, waits)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(read(), states[1][key]()) for key, read in states[0].items())

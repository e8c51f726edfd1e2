"""Validation during training: metrics, no effect on training, best checkpoint and early stopping."""

import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from helpers import RECIPES, SOURCE_ROOT, changed_weights
from ranks import run_training

from internvl_chat.cli import main as m3llm
from internvl_chat.inference.engine import Engine, last_question
from internvl_chat.metrics.overlap import exact_match
from internvl_chat.metrics.rouge import rouge
from internvl_chat.train.internvl_chat_finetune import main as train
from internvl_chat.train.loop import TrainingLoop
from internvl_chat.train.monitor.trackers import Trackers
from internvl_chat.train.validation import Validation, ValidationResult, metrics_of

pytest.importorskip("rouge", reason="the package rouge is not installed")


@pytest.fixture
def arguments(small_run, sample_data):
    """Builder of the command line of a small run with validation."""
    validation = {"eval_meta_path": sample_data / "held_out.json", "eval_strategy": "steps", "eval_steps": 2}
    return partial(small_run, max_steps=6, save_steps=3, **validation)


def validations(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def without_time(row: dict) -> dict:
    return {key: value for key, value in row.items() if "second" not in key and key != "max_memory_gb"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_validation_does_not_change_training(arguments, tmp_path, metrics, recipe):
    with_it, without = tmp_path / "with", tmp_path / "without"
    loaders = {"dataloader_num_workers": 2}
    assert train(arguments(with_it, recipe, eval_generate=2, eval_samples=9, **loaders)) == 0
    none = {"eval_meta_path": None, "eval_strategy": None, "eval_steps": None}
    assert train(arguments(without, recipe, **none, **loaders)) == 0
    assert [row["step"] for row in validations(with_it)] == [2, 4, 6]
    assert list(map(without_time, metrics(with_it))) == list(map(without_time, metrics(without)))
    assert (with_it / "ledger.jsonl").read_text() == (without / "ledger.jsonl").read_text()
    assert not changed_weights(with_it, without)
    for name in ("validation.jsonl", "samples.jsonl"):
        assert (with_it / name).exists() and not (without / name).exists()


@pytest.mark.parametrize("reduction", ["sample", "token"])
@pytest.mark.parametrize("packing", [{}, {"max_packed_tokens": 300}, {"packing": False}])
def test_losses_match_the_finished_model(arguments, sample_data, tmp_path, capfd, reduction, packing):
    """Compare with `m3llm loss`, which processes one record at a time."""
    out = tmp_path / "out"
    assert train(arguments(out, max_steps=2, loss_reduction=reduction, **packing)) == 0
    [row] = validations(out)
    capfd.readouterr()
    argv = [
        "loss",
        sample_data / "held_out.json",
        "--model",
        out,
        "--device",
        "cpu",
        "--max_dynamic_patch",
        6,
    ]
    assert m3llm([*map(str, argv), "--json"]) == 0
    records = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    records = [record for record in records if "index" in record]
    for name, found in {"": row, **row["sets"]}.items():
        own = [r for r in records if name in ("", r["dataset"])]
        weights = [1 if reduction == "sample" else r["num_supervised"] for r in own]
        expected = sum(w * r["loss"] for w, r in zip(weights, own, strict=True)) / sum(weights)
        assert found["loss"] == pytest.approx(expected, abs=1e-5)
        assert found["records"] == len(own)
        assert found["tokens"] == sum(r["num_supervised"] for r in own)
        assert (found["em"], found["rougeL"], found["generated"]) == (None, None, 0)


def test_answers_match_the_finished_model(arguments, sample_data, tmp_path):
    from internvl_chat.data.dataset import build_sets
    from internvl_chat.data.sources.meta import load_meta

    out = tmp_path / "out"
    # Train long enough that some answers are partly correct.
    values = {"max_steps": 40, "eval_steps": 40, "save_strategy": "no", "learning_rate": 1e-2}
    assert train(arguments(out, eval_generate=2, eval_samples=8, **values)) == 0
    [row] = validations(out)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    engine = Engine.from_checkpoint(out, device="cpu")
    sets = build_sets(load_meta(sample_data / "held_out.json", sample_data), engine.encoder)
    names = [records.spec.name for records in sets]
    # Two of the first two datasets, one of the others.
    sampled = {(name, index) for n, name in enumerate(names) for index in range(1 + (n < 2))}
    everything, expected = [], []
    for records in sets:
        scores, cut = [], 0
        for index in range(2):
            record = records.record(index)
            prompt, reference = last_question(record, records.images(index, record))
            [answer] = engine.answer([prompt], max_new_tokens=256)
            if (records.spec.name, index) in sampled:
                expected.append(
                    {
                        "step": 40, "dataset": records.spec.name, "index": index,
                        "images": [str(path) for path in records.image_paths(record)],
                        "question": record.messages[0].content, "reference": reference, "answer": answer,
                        "truncated": answer.truncated,
                    }
                )  # fmt: skip
            cut += answer.truncated
            scores.append((exact_match(answer, reference), rouge(answer, reference)["rougeL"]))
        found = row["sets"][records.spec.name]
        assert (found["generated"], found["truncated"]) == (2, cut)
        assert found["em"] == pytest.approx(50 * sum(em for em, _ in scores))
        assert found["rougeL"] == pytest.approx(50 * sum(score for _, score in scores))
        everything += scores
    assert row["generated"] == len(everything)
    assert row["rougeL"] == pytest.approx(100 * sum(s for _, s in everything) / len(everything))
    assert row["rougeL"] > 0
    assert samples == expected


def test_end_within_an_epoch_is_validated_and_saved(arguments, tmp_path):
    """As in transformers, the end of the run also ends the epoch."""
    out = tmp_path / "out"
    values = {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 8}
    assert train(arguments(out, **values)) == 0
    assert [row["step"] for row in validations(out)] == [6, 8]
    assert (out / "checkpoint-8/trainer_state.json").is_file()


def test_metrics_are_reported(arguments, tmp_path, monkeypatch):
    logged: list[dict] = []
    monkeypatch.setattr(Trackers, "log", lambda self, values, step: logged.append({"step": step, **values}))
    out = tmp_path / "out"
    epochs = {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    values = {"eval_generate": 1, "metric_for_best_model": "loss", "eval_on_start": True, "logging_steps": 4}
    assert train(arguments(out, **epochs, **values)) == 0
    before, *rows = validations(out)
    assert (before["step"], before["epoch"]) == (0, 0) and before["loss"] > rows[0]["loss"]
    assert [(row["step"], row["epoch"]) for row in rows] == [(6, 1.0), (12, 2.0)]
    state = json.loads((out / "checkpoint-12/trainer_state.json").read_text())
    assert state["best_global_step"] == 12 and state["best_metric"] == rows[1]["loss"]
    assert not (out / ".partial").exists()
    assert [row["step"] for row in logged if "train/loss" in row] == [4, 8, 12]
    reported = [row for row in logged if "eval/loss" in row]
    assert [row["eval/loss"] for row in reported] == [row["loss"] for row in (before, *rows)]
    for name, metrics_of_set in rows[1]["sets"].items():
        for kind in ("loss", "em", "rougeL"):
            assert reported[2][f"eval/{name}_{kind}"] == metrics_of_set[kind]


@pytest.fixture
def fake_losses(monkeypatch):
    """Return a function that makes successive validations return the given losses."""

    def tell(*losses: float) -> None:
        left = iter(losses)

        def run(self, model, is_stopped):
            row = metrics_of([next(left), 1, 1, 1, 0, 0, 0, 0])
            sets = {records.spec.name: row for records in self.data.sets}
            return ValidationResult(row | {"sets": sets}, [])

        monkeypatch.setattr(Validation, "run", run)

    return tell


def checkpoints(folder: Path) -> list[int]:
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


@pytest.mark.parametrize("recipe", RECIPES)
def test_best_checkpoint_is_kept_and_becomes_the_model(arguments, fake_losses, tmp_path, recipe):
    out, last = tmp_path / "out", tmp_path / "last"
    fake_losses(3.0, 1.0, 2.0)
    best = {"save_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    assert train(arguments(out, recipe, **best)) == 0
    assert checkpoints(out) == [4, 6]
    assert not changed_weights(out, out / "checkpoint-4")
    assert changed_weights(out, out / "checkpoint-6")
    fake_losses(3.0, 1.0, 2.0)
    assert train(arguments(last, recipe, save_steps=2, save_total_limit=1)) == 0
    assert checkpoints(last) == [6]
    assert not changed_weights(last, out / "checkpoint-6")
    # The files match those of a run that saves its last model, and the model can be loaded.
    own = {"config.yaml", "validation.jsonl"}
    files = [{path.name for path in folder.iterdir() if path.is_file()} - own for folder in (out, last)]
    assert files[0] == files[1]
    Engine.from_checkpoint(out, device="cpu")


def test_a_new_best_is_saved_between_other_checkpoints(arguments, fake_losses, tmp_path):
    out = tmp_path / "out"
    fake_losses(3.0, 1.0, 2.0)
    assert train(arguments(out, save_steps=5, metric_for_best_model="eval_loss")) == 0
    assert checkpoints(out) == [2, 4, 5, 6]


def test_only_the_best_is_saved(arguments, fake_losses, tmp_path):
    out = tmp_path / "out"
    fake_losses(3.0, 1.0, 2.0)
    best = {"save_strategy": "best", "save_total_limit": 1, "load_best_model_at_end": True}
    assert train(arguments(out, **best)) == 0
    assert checkpoints(out) == [4]
    assert not changed_weights(out, out / "checkpoint-4")


def test_stopped_run_is_saved_even_if_not_the_best(arguments, fake_losses, tmp_path, monkeypatch):
    out = tmp_path / "out"
    fake_losses(1.0, 3.0, 2.0)
    validate = TrainingLoop.validate

    def stop(self):
        self.should_stop |= self.state.step == 4
        return validate(self)

    monkeypatch.setattr(TrainingLoop, "validate", stop)
    train(arguments(out, save_strategy="best"))
    assert checkpoints(out) == [2, 4]


def test_early_stopping(arguments, fake_losses, tmp_path, capfd, metrics):
    out = tmp_path / "out"
    fake_losses(3.0, 1.0, 2.0, 1.5, 0.5)
    values = {"max_steps": 20, "early_stopping_patience": 2, "load_best_model_at_end": True, "save_steps": 2}
    assert train(arguments(out, **values)) == 0
    assert [row["step"] for row in validations(out)] == [2, 4, 6, 8]
    assert metrics(out)[-1]["step"] == 8
    assert "step 8: early stopping: eval_loss has not improved for 2 validations" in capfd.readouterr().err
    assert not changed_weights(out, out / "checkpoint-4")
    assert (out / "train_results.json").is_file()


def test_best_and_patience_survive_a_restart(arguments, fake_losses, tmp_path):
    full, resumed, elsewhere = tmp_path / "full", tmp_path / "resumed", tmp_path / "elsewhere"
    losses = (3.0, 1.0, 2.0, 1.5, 1.2, 0.5)
    values = {"max_steps": 20, "early_stopping_patience": 3, "load_best_model_at_end": True, "save_steps": 2}
    fake_losses(*losses)
    assert train(arguments(full, **values)) == 0
    assert validations(full)[-1]["step"] == 10
    # Simulates a kill after step 6, with one validation without improvement.
    shutil.copytree(full, resumed)
    for name in ("train_results.json", "model.safetensors", "checkpoint-8", "checkpoint-10"):
        path = resumed / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    fake_losses(*losses[3:])
    assert train(arguments(resumed, **values)) == 0
    rows = [list(map(without_time, validations(folder))) for folder in (full, resumed)]
    assert rows[0] == rows[1]
    assert not changed_weights(full, resumed)
    assert not changed_weights(resumed, resumed / "checkpoint-4")
    # With a different output folder, the best checkpoint is next to the checkpoint to resume from.
    fake_losses(*losses[3:])
    again = arguments(elsewhere, **values, resume_from_checkpoint=full / "checkpoint-6")
    assert train(again) == 0
    assert [row["step"] for row in validations(elsewhere)] == [8, 10]
    assert checkpoints(elsewhere) == [8, 10]
    assert not changed_weights(elsewhere, full)


def test_resume_after_a_kill_before_the_final_save(arguments, fake_losses, tmp_path):
    out = tmp_path / "out"
    fake_losses(3.0, 1.0, 2.0)
    values = {"load_best_model_at_end": True, "save_steps": 2}
    assert train(arguments(out, **values)) == 0
    (out / "train_results.json").unlink()
    (out / "model.safetensors").unlink()
    assert train(arguments(out, **values)) == 0
    assert not changed_weights(out, out / "checkpoint-4")


def test_unusable_validation_record(arguments, sample_data, tmp_path, capfd):
    meta = json.loads((sample_data / "held_out.json").read_text())
    name, entry = next(iter(meta.items()))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"conversations": [{"from": "human", "value": "?"}]}\n')
    (tmp_path / "meta.json").write_text(json.dumps({name: {**entry, "annotation": str(broken)}}))
    assert train(arguments(tmp_path / "out", eval_meta_path=tmp_path / "meta.json")) == 1
    assert "broken.jsonl, line 1: no assistant message" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_ranks_measure_the_same_as_one(arguments, tmp_path, metrics, recipe):
    values = {
        "eval_generate": 2, "eval_samples": 8, "load_best_model_at_end": True, "save_steps": 2,
        "early_stopping_patience": 5,
        "lora_dropout": 0.0, "save_total_limit": 1,
    }  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    result = run_training(*arguments(one, recipe, **values))
    assert result.returncode == 0, result.stderr[-3000:]
    share = {"per_device_train_batch_size": 1}
    result = run_training(*arguments(two, recipe, **{**values, **share}), ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [validations(folder) for folder in (one, two)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [2, 4, 6]
    for first, second in zip(*rows, strict=True):
        for a, b in [(first, second), *((first["sets"][n], second["sets"][n]) for n in first["sets"])]:
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
            assert [a[k] for k in ("records", "tokens", "generated")] == [
                b[k] for k in ("records", "tokens", "generated")
            ]
    keys = [
        [
            (row["step"], row["dataset"], row["index"])
            for row in map(json.loads, (folder / "samples.jsonl").open())
        ]
        for folder in (one, two)
    ]
    assert keys[0] == keys[1] and len(keys[0]) == 24
    assert checkpoints(one) == checkpoints(two)


@pytest.mark.slow
def test_validation_does_not_change_training_on_two_ranks(arguments, tmp_path, metrics):
    share = {"per_device_train_batch_size": 1, "save_strategy": "no"}
    none = {"eval_meta_path": None, "eval_strategy": None, "eval_steps": None}
    for name, values in (("with", {"eval_generate": 3, "eval_samples": 8}), ("without", none)):
        argv = arguments(tmp_path / name, "lora", **{**share, **values})
        result = run_training(*argv, ranks=2)
        assert result.returncode == 0, result.stderr[-3000:]
    found = [list(map(without_time, metrics(tmp_path / name))) for name in ("with", "without")]
    assert found[0] == found[1]
    assert not changed_weights(tmp_path / "with", tmp_path / "without")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "hsdp", "zero2", "zero3"])
def test_validation_with_sharded_weights(arguments, tmp_path, how):
    if how.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    sharded = {
        "fsdp": {"fsdp": "full_shard"},
        "hsdp": {"fsdp": "hybrid_shard"},
        "zero2": {"deepspeed": SOURCE_ROOT / "internvl_chat/shell/deepspeed/zero2.json"},
        "zero3": {"deepspeed": SOURCE_ROOT / "internvl_chat/shell/deepspeed/zero3.json"},
    }[how]
    one, two = tmp_path / "one", tmp_path / "two"
    size = {"ranks": 4, "nodes": 2} if how == "hsdp" else {"ranks": 2}
    values = {"load_best_model_at_end": True, "save_steps": 2, "save_total_limit": 1}
    assert run_training(*arguments(one, **values)).returncode == 0
    share = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // size["ranks"]}
    result = run_training(*arguments(two, eval_samples=2, **{**values, **sharded, **share}), **size)
    assert result.returncode == 0, result.stderr[-3000:]
    assert ("no sample answers" in result.stderr) == (how != "zero2")
    assert (two / "samples.jsonl").exists() == (how == "zero2")
    losses = [[row["loss"] for row in validations(folder)] for folder in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    state = json.loads((two / f"checkpoint-{checkpoints(two)[-1]}/trainer_state.json").read_text())
    assert state["best_global_step"] in checkpoints(two)
    result = run_training(*arguments(tmp_path / "no", eval_generate=1, **{**sharded, **share}), **size)
    refused = "--eval_generate 1: not supported with" in result.stderr
    assert refused == (how != "zero2") and (result.returncode == 0) != refused


def test_signal_interrupts_a_validation(arguments, tmp_path, metrics, monkeypatch, capfd):
    """The second validation is interrupted; the same command resumes."""
    full, out = tmp_path / "full", tmp_path / "out"
    assert train(arguments(full)) == 0
    original, begun = Validation._add_losses, []

    def interrupted(self, model, packs, sums):
        begun.append(model)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, model, packs, sums)

    monkeypatch.setattr(Validation, "_add_losses", interrupted)
    assert train(arguments(out)) == 128 + signal.SIGTERM
    assert "step 4: validation interrupted" in capfd.readouterr().err
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4]
    assert (out / "checkpoint-4/manifest.json").is_file()
    assert [row["step"] for row in validations(out)] == [2]
    assert train(arguments(out)) == 0
    assert [row["step"] for row in validations(out)] == [2, 6]
    assert not changed_weights(full, out)


def test_signal_before_a_validation_skips_it(arguments, tmp_path, metrics, monkeypatch):
    original = TrainingLoop.train_step

    def interrupted(self, step, packs):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, packs)

    monkeypatch.setattr(TrainingLoop, "train_step", interrupted)
    assert train(arguments(tmp_path / "out")) == 128 + signal.SIGTERM
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2]
    assert not (tmp_path / "out/validation.jsonl").exists()
    assert (tmp_path / "out/checkpoint-2/manifest.json").is_file()


def test_model_card_of_the_best_model(arguments, fake_losses, tmp_path):
    out = tmp_path / "out"
    fake_losses(3.0, 1.0, 2.0)
    assert train(arguments(out, load_best_model_at_end=True, save_steps=2)) == 0
    assert "| loss, all | 1 |" in (out / "README.md").read_text()

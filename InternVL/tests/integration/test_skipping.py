"""Images that fail during training: their records are skipped and logged, or the run stops."""

import json

import pytest
import torch
from helpers import SOURCE_ROOT, flags
from ranks import run_training
from small_sets import break_inside, noise, text_record, write_lines

from internvl_chat.data.dataset import TrainingData
from internvl_chat.model.io.weights import open_weights
from internvl_chat.train.internvl_chat_finetune import main as train


def shows(number: int) -> dict:
    return text_record(number, answer="a cat " * (1 + number), image=f"{number}.png")


class Folder:
    """A dataset of small images."""

    def __init__(self, path, tiny_model, records):
        self.path, self.tiny_model = path, tiny_model
        (path / "images").mkdir(parents=True)
        for number in range(20):
            noise(60, 30, seed=number).save(self.image(number))
        annotation = write_lines(path / "records.jsonl", records)
        entry = {"root": str(path / "images"), "annotation": str(annotation), "data_augment": False,
                 "repeat_time": 1}  # fmt: skip
        (path / "meta.json").write_text(json.dumps({"qa": entry}))

    def image(self, number):
        return self.path / f"images/{number}.png"

    def flags(self, out="out", **values):
        common = {"model_name_or_path": self.tiny_model, "meta_path": self.path / "meta.json",
                  "output_dir": self.path / out, "per_device_train_batch_size": 3, "max_steps": 2,
                  "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}  # fmt: skip
        return flags(**{**common, **values})

    def train(self, out="out", **values):
        return train(self.flags(out, **values))

    def ledger(self, out="out"):
        return [json.loads(line) for line in (self.path / out / "ledger.jsonl").read_text().splitlines()]

    def weights(self, out="out"):
        opened = open_weights(self.path / out / "model.safetensors")
        return {name: read() for name, read in opened.items()}


@pytest.fixture
def folder(tmp_path, tiny_model):
    def make(*records, name="data"):
        return Folder(tmp_path / name, tiny_model, list(records))

    return make


@pytest.fixture
def damaged(folder):
    """Nine records; the damage to the second image is detected only by decoding."""
    made = folder(*map(shows, range(9)))
    break_inside(made.image(1))
    return made


def test_unusable_image_ends_the_run_by_default(damaged, capfd):
    assert damaged.train() == 1
    assert "records.jsonl, line 2 (record 'r1'): the image" in (stderr := capfd.readouterr().err)
    assert "1.png cannot be decoded" in stderr
    assert "Traceback" not in stderr


def test_step_continues_without_the_skipped_record(damaged, folder, metrics, capfd):
    assert damaged.train(on_bad_record="skip", max_bad_fraction=0.2) == 0
    assert "record skipped: " in capfd.readouterr().err
    first, second = damaged.ledger()
    assert first["trained"] == [["qa", 0], ["qa", 2]]
    assert second["trained"] == [["qa", 3], ["qa", 4], ["qa", 5]]
    [skipped] = first["skipped"]
    assert (skipped["dataset"], skipped["index"], skipped["id"]) == ("qa", 1, "r1")
    assert "1.png cannot be decoded" in skipped["message"]
    assert "skipped" not in second
    assert [row["records"] for row in metrics(damaged.path / "out")] == [2, 3]

    # The step matches a step without the skipped record.
    damaged.train("one", on_bad_record="skip", max_bad_fraction=0.2, max_steps=1)
    never = folder(shows(0), shows(2), name="never")
    never.train("one", max_steps=1, per_device_train_batch_size=2)
    losses = [metrics(made.path / "one")[0]["loss"] for made in (damaged, never)]
    assert losses[0] == losses[1]
    weights = damaged.weights("one")
    assert all(torch.equal(weights[name], weight) for name, weight in never.weights("one").items())


@pytest.mark.parametrize("layout", ["single", "zero2"])
def test_step_without_usable_records_changes_nothing(folder, metrics, layout):
    values = (
        {}
        if layout == "single"
        else {"deepspeed": SOURCE_ROOT / f"internvl_chat/shell/deepspeed/{layout}.json"}
    )
    if values:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    made = folder(*map(shows, range(9)))
    result = run_training(*made.flags("before", max_steps=1, **values))
    assert result.returncode == 0, result.stderr
    for number in (3, 4, 5):
        break_inside(made.image(number))
    result = run_training(*made.flags(on_bad_record="skip", max_bad_fraction=0.5, **values))
    assert result.returncode == 0, result.stderr
    assert "step 2: no supervised tokens" in result.stderr
    row = metrics(made.path / "out")[1]
    assert (row["records"], row["loss"], row["skipped_because"]) == (0, None, "no supervised tokens")
    assert len(made.ledger()[1]["skipped"]) == 3
    before = made.weights("before")
    assert all(torch.equal(before[name], weight) for name, weight in made.weights().items())


def test_too_many_end_the_run(damaged, capfd):
    break_inside(damaged.image(5))
    assert damaged.train(on_bad_record="skip", max_bad_fraction=0.2) == 1
    stderr = capfd.readouterr().err
    assert (
        "2 of 9 records are excluded or skipped (22.22%), more than --max_bad_fraction 0.2 allows" in stderr
    )
    assert "records.jsonl, line 6 (record 'r5'): the image" in stderr
    assert "Traceback" not in stderr


def test_ledger_starts_with_excluded_records(folder):
    made = folder(*map(shows, [0, 1, 99, 2, 3, 4, 5]))
    assert made.train(on_bad_record="skip", max_bad_fraction=0.2) == 0
    start, *steps = made.ledger()
    assert start["step"] == 0
    [skipped] = start["skipped"]
    assert (skipped["dataset"], skipped["index"]) == ("qa", 2)
    assert "99.png does not exist" in skipped["message"]
    assert [index for row in steps for _, index in row["trained"]] == [0, 1, 3, 4, 5, 6]


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_repaired_image_does_not_shift_a_resumed_run(folder, strategy):
    made = folder(*map(shows, [0, 1, 99, 2, 3, 4, 5]))
    options = {"on_bad_record": "skip", "max_bad_fraction": 0.2, "save_steps": 1,
               "train_sampling_strategy": strategy}  # fmt: skip
    assert made.train("full", **options) == 0
    assert made.train("out", **options) == 0
    out = made.path / "out"
    for name in ("train_results.json", "checkpoint-2/manifest.json"):
        (out / name).unlink()
    noise(60, 30).save(made.image(99))
    assert made.train("out", **options) == 0
    assert made.ledger("out") == made.ledger("full")
    full = made.weights("full")
    assert all(torch.equal(full[name], weight) for name, weight in made.weights("out").items())


def test_skipped_records_count_across_restarts(damaged, capfd):
    """One record is skipped before the restart and one after it; together they exceed the limit."""
    options = {"on_bad_record": "skip", "max_bad_fraction": 0.2, "save_steps": 1, "max_steps": 3}
    assert damaged.train(**{**options, "max_steps": 1}) == 0
    (damaged.path / "out/train_results.json").unlink()
    break_inside(damaged.image(5))
    assert damaged.train(**options, allow_resume_changes=True) == 1
    assert "2 of 9 records are excluded or skipped" in capfd.readouterr().err


def test_a_bad_first_record_does_not_stop_the_sanity_check(folder, capfd):
    made = folder(*map(shows, [99, 0, 1, 2]))
    assert made.train(on_bad_record="skip", max_bad_fraction=0.3, sanity_check=True, max_steps=1) == 0
    assert "qa: first supervised span: 'a cat <|im_end|>'" in capfd.readouterr().err


def test_undecodable_first_record_does_not_stop_the_sanity_check(folder):
    made = folder(*map(shows, range(9)))
    break_inside(made.image(0))
    assert made.train(on_bad_record="skip", max_bad_fraction=0.3, sanity_check=True, max_steps=1) == 0


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_unplanned_records_are_detected(folder, monkeypatch, capfd, strategy):
    """The dataloader returns the wrong record."""
    made = folder(*map(shows, range(9)))
    original = TrainingData.__getitem__
    monkeypatch.setattr(
        TrainingData,
        "__getitem__",
        lambda self, key: original(self, key._replace(index=max(key.index - 1, 0))),
    )
    assert made.train(train_sampling_strategy=strategy) == 1
    assert "step 1: the dataloader returned different records than planned" in capfd.readouterr().err


@pytest.mark.slow
def test_two_ranks_exchange_skipped_records(damaged):
    argv = damaged.flags(on_bad_record="skip", max_bad_fraction=0.2, per_device_train_batch_size=1,
                          gradient_accumulation_steps=2)  # fmt: skip
    result = run_training(*argv, ranks=2)
    assert result.returncode == 0, result.stderr
    assert damaged.train("one", on_bad_record="skip", max_bad_fraction=0.2,
                          per_device_train_batch_size=4) == 0  # fmt: skip
    assert damaged.ledger() == damaged.ledger("one")
    assert damaged.ledger()[0]["skipped"][0]["index"] == 1

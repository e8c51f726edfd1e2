"""Validation: metrics, selection of the best model, and checks of the flags."""

import dataclasses
import json

import pytest
from helpers import flags
from small_sets import encoder, image_record, noise, text_record, write_set

from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.index.build import index_records
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.inference.engine import Prompt, last_question
from internvl_chat.train.arguments import parse_arguments
from internvl_chat.train.checkpoint.best import copy_best
from internvl_chat.train.checkpoint.manifest import write_manifest
from internvl_chat.train.checkpoint.run_folder import inspect_output_folder
from internvl_chat.train.checkpoint.state import TrainState
from internvl_chat.train.checks import check_configuration
from internvl_chat.train.validation import (
    Validation,
    metric_names,
    metrics_of,
    named_metrics,
    validation_specs,
)
from internvl_chat.utils.errors import ModelError, TrainingError, UsageError


def test_metrics_from_sums():
    # Two records with 4 and 6 tokens, losses 1 and 2 and equal weights; three answers.
    weighted = 4 * 0.25 * 1.0 + 6 / 6 * 2.0
    metrics = metrics_of([weighted, 2.0, 2.0, 10.0, 2.0, 1.5, 3.0, 1.0])
    assert metrics == {
        "records": 2, "tokens": 10, "loss": 1.5, "em": pytest.approx(200 / 3), "rougeL": 50.0, "generated": 3,
        "truncated": 1,
    }  # fmt: skip
    nothing = metrics_of([0.0] * 8)
    assert nothing == {
        "records": 0, "tokens": 0, "loss": None, "em": None, "rougeL": None, "generated": 0,
        "truncated": 0,
    }  # fmt: skip
    assert named_metrics(metrics | {"sets": {"qa": metrics, "empty": nothing}}) == {
        "eval_loss": 1.5, "eval_em": metrics["em"], "eval_rougeL": 50.0,
        "eval_qa_loss": 1.5, "eval_qa_em": metrics["em"], "eval_qa_rougeL": 50.0,
    }  # fmt: skip


def test_metric_names_match_the_metrics():
    assert metric_names(["a", "b"], generate=False) == ["eval_loss", "eval_a_loss", "eval_b_loss"]
    metrics = metrics_of([1.0] * 8)
    names = metric_names(["a", "b"], generate=True)
    assert sorted(names) == sorted(named_metrics(metrics | {"sets": {"a": metrics, "b": metrics}}))


def test_validation_specs_have_no_augmentation_or_repeats(tmp_path):
    spec = DatasetSpec("qa", tmp_path, tmp_path / "qa.jsonl", data_augment=True, repeat_time=3)
    part = dataclasses.replace(spec, repeat_time=0.5)
    found = validation_specs([spec, part])
    assert [s.data_augment for s in found] == [False, False]
    assert [s.repeat_time for s in found] == [1, 0.5]


def make_validation(tmp_path, records, **options) -> Validation:
    sets = [write_set(tmp_path, records, by=encoder(**options))]
    data = TrainingData(sets, lengths=[index.lengths for index in index_records(sets)])
    return Validation(
        data, sampler=None, reduction="sample", generate=0, samples=0, normalization="imagenet",
        options=None,
    )  # fmt: skip


def test_generation_indices_are_evenly_spaced(tmp_path):
    records = [text_record(number) for number in range(10)]
    expected = {0: [], 1: [0], 3: [0, 3, 6], 10: list(range(10)), 99: list(range(10))}
    validation = make_validation(tmp_path, records)
    for wanted, indices in expected.items():
        assert validation.generation_indices(0, wanted) == indices


def test_truncated_records_are_not_used_for_generation(tmp_path):
    records = [text_record(number, "a cat " * (400 if number == 0 else 1)) for number in range(3)]
    validation = make_validation(tmp_path, records, truncate_text=True)
    assert validation.generation_indices(0, 3) == [1, 2]


def test_last_question_includes_earlier_images(tmp_path):
    record = image_record(0, "a.png", "b.png")
    record["conversations"] += [{"from": "human", "value": "And why?"}, {"from": "gpt", "value": "On a mat."}]
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        noise(16, 16).save(tmp_path / "images" / name)
    records = write_set(tmp_path, [record])
    parsed = records.record(0)
    images = records.images(0, parsed)
    assert last_question(parsed, images) == (Prompt(parsed.messages[:3], tuple(images)), "On a mat.")
    # The image of a question without an answer comes after the last answer.
    record["conversations"].append({"from": "human", "value": "<image>?"})
    record["image"].append("a.png")
    parsed = write_set(tmp_path, [record], "more").record(0)
    assert last_question(parsed, [*images, images[0]])[0].images == tuple(images)


@pytest.fixture
def check(tiny_model, sample_data, tmp_path):
    """Check a command line and return the problems."""

    def problems(**values) -> list[str]:
        common = {
            "model_name_or_path": tiny_model,
            "meta_path": sample_data / "train.json",
            "output_dir": tmp_path / "out",
        }
        try:
            check_configuration(parse_arguments(flags(**common, **values)))
        except UsageError as error:
            return error.problems
        return []

    return problems


def test_flags_that_need_validation(check, sample_data):
    meta = sample_data / "held_out.json"
    for values in (
        {"eval_meta_path": meta}, {"eval_generate": 2}, {"early_stopping_patience": 1}, {"do_eval": True},
        {"metric_for_best_model": "eval_loss"},
    ):  # fmt: skip
        [problem] = check(**values)
        [(flag, value)] = values.items()
        assert problem == (f"--{flag} {value} has no effect without --eval_strategy steps (or epoch)")
    # transformers itself requires the same strategy for saving and validation.
    assert "save_strategy best has no effect" in check(save_strategy="best")[0]
    assert check(eval_strategy="steps") == ["--eval_strategy steps needs --eval_meta_path"]


def test_validation_problems_are_reported_together(check, sample_data, monkeypatch):
    monkeypatch.setattr("internvl_chat.train.checks.find_spec", lambda name: None)
    problems = check(
        eval_strategy="epoch", eval_meta_path=sample_data / "held_out.json", eval_generate=2,
        metric_for_best_model="eval_los",
    )  # fmt: skip
    assert problems == [
        "--eval_generate 2: rouge is not installed (pip install rouge)",
        "--metric_for_best_model eval_los: not computed; did you mean eval_loss?",
    ]


def test_generation_metrics_need_eval_generate(check, sample_data):
    common = {"eval_strategy": "steps", "eval_meta_path": sample_data / "held_out.json"}
    assert check(**common, metric_for_best_model="rougeL", eval_generate=1) == []
    [problem] = check(**common, metric_for_best_model="rougeL")
    assert problem == "--metric_for_best_model rougeL: not computed; add --eval_generate"
    [problem] = check(**common, metric_for_best_model="accuracy")
    assert problem.startswith("--metric_for_best_model accuracy: not computed; use one of eval_loss, eval_em")


def test_missing_validation_meta_file(check):
    with pytest.raises(ModelError, match=r"^--eval_meta_path: /no/meta\.json: no such meta file"):
        check(eval_strategy="steps", eval_meta_path="/no/meta.json")


@pytest.mark.parametrize(
    ("values", "metric", "greater"),
    [
        ({}, None, False),
        ({"early_stopping_patience": 2}, "eval_loss", False),
        ({"save_strategy": "best"}, "eval_loss", False),
        ({"load_best_model_at_end": True}, "eval_loss", False),
        ({"metric_for_best_model": "eval_em", "early_stopping_patience": 2}, "eval_em", True),
    ],
)
def test_default_metric_for_best_model(values, metric, greater):
    run = parse_arguments(flags(model_name_or_path="m", meta_path="d", output_dir="o", **values)).run
    assert (run.metric_for_best_model, run.greater_is_better) == (metric, greater)


def test_folder_with_validation_log_is_a_run(tmp_path):
    for name in ("metrics.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text('{"step": 1}\n{"step": 2}\n')
    assert inspect_output_folder(tmp_path, overwrite=True, resume=None).overwrite
    found = inspect_output_folder(tmp_path, overwrite=False, resume=None)
    found.open().release()
    assert not (tmp_path / "validation.jsonl").exists()


def test_missing_best_model(tmp_path):
    with pytest.raises(TrainingError, match="there was no validation"):
        copy_best(TrainState(step=3), tmp_path, None)
    with pytest.raises(TrainingError, match="checkpoint-2 is missing or damaged"):
        copy_best(TrainState(step=3, best_step=2), tmp_path, None)
    write_state(tmp_path / "checkpoint-2", best_step=2)
    with pytest.raises(TrainingError, match=r"no manifest\.json"):
        copy_best(TrainState(step=3, best_step=2), tmp_path, None)


def test_best_checkpoint_next_to_the_resumed_one(tmp_path):
    """Checkpoints that the first run wrote after the resumed step are ignored."""
    for step, best_step in ((2, 2), (3, 2), (4, 4)):
        write_state(tmp_path / f"first/checkpoint-{step}", best_step)
        write_manifest(tmp_path / f"first/checkpoint-{step}")
    second = tmp_path / "second"
    write_state(second / "checkpoint-5", best_step=2)
    assert copy_best(TrainState(step=5, best_step=2), second, tmp_path / "first/checkpoint-3") == 2
    write_state(second / "checkpoint-6", best_step=6)
    write_manifest(second / "checkpoint-6")
    assert copy_best(TrainState(step=6, best_step=6), second, tmp_path / "first/checkpoint-3") == 6


def write_state(checkpoint, best_step):
    """Create a checkpoint that contains only the training state."""
    checkpoint.mkdir(parents=True)
    state = TrainState(step=int(checkpoint.name.removeprefix("checkpoint-")), best_step=best_step)
    (checkpoint / "trainer_state.json").write_text(json.dumps(state.to_json()))


def test_last_question_has_an_answer_in_nfc(tmp_path):
    parsed = write_set(tmp_path, [text_record(0, "cafe\u0301")]).record(0)
    assert last_question(parsed, [])[1] == "caf\u00e9"


def test_last_question_has_a_supervised_answer(tmp_path):
    record = text_record(0, "right")
    record["conversations"] += [
        {"from": "human", "value": "And?"},
        {"from": "gpt", "value": "b", "weight": 0},
    ]
    parsed = write_set(tmp_path, [record]).record(0)
    assert last_question(parsed, []) == (Prompt(parsed.messages[:1]), "right")

"""Predictions on disk: format, resume, rejected input, and merging of ranks."""

import json

import pytest

from internvl_chat.eval.benchmarks.item import Figure, Item
from internvl_chat.eval.predictions import (
    PredictionLog,
    checkpoint_digest,
    image_digests,
    items_digest,
    merge_predictions,
    read_answers,
    task_digests,
)
from internvl_chat.utils.errors import DataError, UsageError

ITEMS = [Item("one", i, f"What {i}?", "That") for i in range(3)] + [
    Item("two", i, "Which?", "B", (Figure("a.png", "Fig-0"),), ("x", "y")) for i in range(2)
]
SETTINGS = {"model": "/here", "checkpoint": "m", "max_new_tokens": 8}


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_answer_is_a_line_with_its_question(tmp_path):
    with PredictionLog(tmp_path / "out", SETTINGS) as log:
        for item, answer in zip(ITEMS[:1], ["größer\nals"], strict=True):
            log.append(item, answer)
        for item, answer in zip(ITEMS[3:4], ["B"], strict=True):
            log.append(item, answer)
    first, second = rows(tmp_path / "out/predictions.jsonl")
    assert first == {
        "task": "one",
        "index": 0,
        "question": "What 0?",
        "images": [],
        "prediction": "größer\nals",
        "reference": "That",
        "truncated": False,
        "protocol": "standard",
    }
    assert second["images"] == ["a.png"] and second["reference"] == "B"


def test_resume_drops_an_incomplete_line(tmp_path):
    with PredictionLog(tmp_path, SETTINGS) as log:
        for item, answer in zip(ITEMS[:2], ["a", "b"], strict=True):
            log.append(item, answer)
    file = tmp_path / "predictions.jsonl"
    file.write_bytes(file.read_bytes() + b'{"task": "one", "index": 2, "prediction": "hal')
    with PredictionLog(tmp_path, SETTINGS) as log:
        assert log.done == {("one", 0): "a", ("one", 1): "b"}
        for item, answer in zip(ITEMS[2:3], ["c"], strict=True):
            log.append(item, answer)
    assert [row["prediction"] for row in rows(file)] == ["a", "b", "c"]


def test_merge_of_ranks_in_benchmark_order(tmp_path):
    with PredictionLog(tmp_path, SETTINGS, 0) as first, PredictionLog(tmp_path, SETTINGS, 1) as second:
        for item, answer in zip(ITEMS[2:3], ["c"], strict=True):
            first.append(item, answer)
        for item, answer in zip([ITEMS[4], ITEMS[1]], ["e", "b"], strict=True):
            second.append(item, answer)
    with PredictionLog(tmp_path, SETTINGS) as log:
        assert len(log.done) == 3
        for item, answer in zip([ITEMS[0]], ["a"], strict=True):
            log.append(item, answer)
    answers = merge_predictions(tmp_path, ITEMS)
    assert [row["prediction"] for row in rows(tmp_path / "predictions.jsonl")] == ["a", "b", "c", "e"]
    assert answers == {ITEMS[i].key: p for i, p in ((0, "a"), (1, "b"), (2, "c"), (4, "e"))}
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["evaluation.json", "predictions.jsonl"]
    assert merge_predictions(tmp_path, ITEMS) == answers


def test_settings_of_a_different_evaluation_are_rejected(tmp_path):
    with PredictionLog(tmp_path, SETTINGS):
        pass
    with pytest.raises(UsageError) as error:
        PredictionLog(tmp_path, {**SETTINGS, "checkpoint": "other", "base": None})
    assert "checkpoint was 'm', now 'other'" in str(error.value) and "tokens" not in str(error.value)
    with PredictionLog(tmp_path, {**SETTINGS, "model": "/moved"}) as log:
        assert not log.done


def test_predictions_without_settings_are_rejected(tmp_path):
    (tmp_path / "predictions.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"no evaluation\.json"):
        PredictionLog(tmp_path, SETTINGS)


def test_folder_is_locked(tmp_path):
    with PredictionLog(tmp_path, SETTINGS), pytest.raises(UsageError, match="another process is writing"):
        PredictionLog(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    "line",
    [
        "nothing",
        "[]",
        '{"task": "one", "index": 0}',
        '{"task": 1, "index": 0, "prediction": ""}',
        '{"task": "one", "index": true, "prediction": ""}',
    ],
)
def test_invalid_line(tmp_path, line):
    with PredictionLog(tmp_path, SETTINGS) as log:
        for item, answer in zip(ITEMS[:1], ["a"], strict=True):
            log.append(item, answer)
    with (tmp_path / "predictions.jsonl").open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(DataError, match=r"predictions\.jsonl, line 2: must be an object"):
        PredictionLog(tmp_path, SETTINGS)


def test_external_answers(tmp_path):
    file = tmp_path / "answers.jsonl"
    lines = [
        {"task": i.task, "index": i.index, "prediction": f"p{n}", "more": 1} for n, i in enumerate(ITEMS)
    ]
    file.write_text("\n\n".join(map(json.dumps, reversed(lines))))
    assert read_answers(file, ITEMS, ITEMS) == {item.key: f"p{n}" for n, item in enumerate(ITEMS)}


def test_external_answers_to_more_items(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text(
        "\n".join(json.dumps({"task": i.task, "index": i.index, "prediction": "p"}) for i in ITEMS)
    )
    assert read_answers(file, ITEMS[:2], ITEMS).keys() >= {item.key for item in ITEMS[:2]}


def test_external_answers_to_other_tasks_and_questions(tmp_path):
    file = tmp_path / "answers.jsonl"
    rows = [{"task": item.task, "index": item.index, "prediction": "p"} for item in ITEMS]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert len(read_answers(file, ITEMS[:3], ITEMS[:3], ["one"])) == 3
    rows[1]["question"] = "What 2?"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        DataError, match=r"line 2: one 1 has a different question from the benchmark: 'What 2\?'"
    ):
        read_answers(file, ITEMS, ITEMS)


def test_new_tasks_of_the_same_evaluation(tmp_path):
    one, two = task_digests(ITEMS[:3], {"one": None}), task_digests(ITEMS[3:], {"two": None})
    for questions in (one, two, one | two):
        with PredictionLog(tmp_path, {**SETTINGS, "questions": questions}):
            pass
    assert json.loads((tmp_path / "evaluation.json").read_text())["questions"] == one | two
    with pytest.raises(UsageError, match="the questions of two have changed"):
        PredictionLog(tmp_path, {**SETTINGS, "questions": one | {"two": "other"}})


def test_invalid_external_answers(tmp_path):
    file = tmp_path / "answers.jsonl"
    lines = [("one", 0), ("one", 0), ("one", 7), ("three", 0), ("two", 1)]
    rows = [json.dumps({"task": task, "index": index, "prediction": ""}) for task, index in lines]
    file.write_text("\n".join([*rows, "nothing"]))
    with pytest.raises(DataError) as error:
        read_answers(file, ITEMS, ITEMS)
    for message in (
        "line 2: one 0 is answered twice",
        "line 3: one 7 is not an item",
        "line 4: three 0 is not an item",
        "line 6: must be",
        "one has no answer for index 1, 2",
        "two has no answer for index 0",
    ):
        assert message in str(error.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_answers(tmp_path / "none", ITEMS, ITEMS)


def test_items_digest_depends_on_questions_and_prompts():
    system = {"one": "a", "two": None}
    digest = items_digest(ITEMS, system)
    assert items_digest(list(ITEMS), dict(system)) == digest
    assert items_digest(ITEMS, {**system, "two": "b"}) != digest
    assert items_digest(ITEMS[:-1], system) != digest
    assert items_digest([Item("one", 0, "What 0?", "Other"), *ITEMS[1:]], system) != digest


def test_replaced_images_are_rejected(tmp_path):
    def settings():
        return {**SETTINGS, "images": image_digests(items)}

    file = tmp_path / "a.png"
    file.write_bytes(b"thumbnail")
    items = [
        Item("one", 0, "?", "", (Figure("a.png", path=file),)),
        Item("two", 0, "?", "", (Figure("b", content=b"embedded"),)),
        Item("three", 0, "?", ""),
    ]
    assert image_digests(items).keys() == {"one", "two"}
    for _ in range(2):
        with PredictionLog(tmp_path / "out", settings()):
            pass
    file.write_bytes(b"THUMBNAIL")
    items[1] = Item("two", 0, "?", "", (Figure("b", content=b"other"),))
    with pytest.raises(UsageError, match="the images of one have changed; the images of two have changed"):
        PredictionLog(tmp_path / "out", settings())


def test_evaluation_without_image_digests_continues(tmp_path):
    for more in ({}, {"images": {"two": "1"}}, {"images": {"two": "1", "one": "2"}}):
        with PredictionLog(tmp_path, {**SETTINGS, **more}):
            pass
    with pytest.raises(UsageError, match="the images of one have changed"):
        PredictionLog(tmp_path, {**SETTINGS, "images": {"one": "3"}})


def test_answers_in_another_dtype_are_rejected(tmp_path):
    with PredictionLog(tmp_path, {**SETTINGS, "dtype": "float32"}) as log:
        log.check_dtype()
        log.append(ITEMS[0], "a")
    with PredictionLog(tmp_path, {**SETTINGS, "dtype": "bfloat16"}) as log:
        assert log.done  # scoring needs no device
        with pytest.raises(UsageError, match="started in float32 and would continue in bfloat16"):
            log.check_dtype()


def test_checkpoint_digest_depends_on_the_checkpoint(tiny_model, tmp_path):
    import shutil

    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    digest = checkpoint_digest(tiny_model)
    (copy / "metrics.json").write_text("{}")  # not part of the checkpoint
    assert checkpoint_digest(copy) == digest
    for name in ("model.safetensors", "preprocessing.json", "tokenizer.json", "config.json"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content + b" ")
        assert checkpoint_digest(copy) != digest, name
        (copy / name).write_bytes(content)
    assert checkpoint_digest(copy) == digest

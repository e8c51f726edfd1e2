"""Held-out records that also occur in the training data, including copies with renamed images."""

import json
import logging
import shutil

import pytest
from small_sets import noise, write_lines

from internvl_chat.data.audit.overlap import repeated_records, warn_about_overlap
from internvl_chat.data.dataset import TrainingData, build_sets
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.sources.meta import load_meta
from internvl_chat.data.sources.skip_policy import ExcludedRecord


@pytest.fixture
def data_of(tmp_path):
    """Build the data of a meta file with one dataset per keyword; images are `images/NAME.png`."""
    (tmp_path / "images").mkdir()
    for seed, name in enumerate("abc"):
        noise(30, 20, seed=seed).save(tmp_path / f"images/{name}.png")
    shutil.copy(tmp_path / "images/a.png", tmp_path / "images/copy_of_a.png")

    def build(excluded=(), **sets):
        meta = {}
        for name, records in sets.items():
            file = write_lines(tmp_path / f"{name}.jsonl", records)
            meta[name] = {"root": str(tmp_path / "images"), "annotation": str(file), "data_augment": False,
                          "repeat_time": 1}  # fmt: skip
        path = tmp_path / f"{'-'.join(sets)}.json"
        path.write_text(json.dumps(meta))
        encoder = RecordEncoder(None, Preprocessing(tile_size=56, tokens_per_tile=4))
        return TrainingData(build_sets(load_meta(path, tmp_path), encoder), excluded=excluded)

    return build


def record(question: str, *images: str, answer: str = "Yes", **more) -> dict:
    human = {"from": "human", "value": "<image>\n" * len(images) + question}
    messages = [human, {"from": "gpt", "value": answer}]
    return {"image": [f"{name}.png" for name in images], "conversations": messages, **more}


def test_copies_are_found(data_of):
    training = data_of(
        one=[record("Same?", "a"), record("Text?"), record("Same?", "b")], two=[record("Both?", "a", "b")]
    )
    held_out = data_of(
        held=[
            record("Same?", "copy_of_a", id="another id"),  # the same image with a different name
            record("Same?", "c"),  # the same question about a different image
            record("Text?", answer="No"),
            record(" Text? "),
            record("Both?", "b", "a"),  # a different order
            record("Both?", "copy_of_a", "b"),
        ]
    )
    assert list(repeated_records(training, held_out)) == [
        (("held", 0), ("one", 0)), (("held", 3), ("one", 1)), (("held", 5), ("two", 0))
    ]  # fmt: skip


def test_messages_in_another_format_are_equal(data_of):
    chat = [{"role": "user", "content": "<image>\nSame?"}, {"role": "assistant", "content": "Yes"}]
    held_out = data_of(held=[{"messages": chat, "images": ["a.png"]}])
    assert list(repeated_records(data_of(one=[record("Same?", "a")]), held_out)) == [
        (("held", 0), ("one", 0))
    ]


def test_records_that_are_not_used_are_not_compared(data_of):
    excluded = [ExcludedRecord("one", 0, "excluded")]
    training = data_of(one=[record("Text?"), record("Other?")], excluded=excluded)
    assert not list(repeated_records(training, data_of(held=[record("Text?")])))


def test_unreadable_images_are_not_equal(data_of):
    training = data_of(one=[record("Same?", "missing"), record("Same?", "a")])
    held_out = data_of(held=[record("Same?", "lost"), record("Same?", "copy_of_a")])
    assert list(repeated_records(training, held_out)) == [(("held", 1), ("one", 1))]


def test_warning_for_each_set(data_of, caplog, tmp_path):
    training = data_of(one=[record("First?"), record("Text?")])
    held_out = data_of(held=[record("New?"), record("Text?")], clean=[record("Also new?")])
    with caplog.at_level(logging.WARNING):
        warn_about_overlap(training, held_out)
    [message] = [entry.message for entry in caplog.records]
    assert message.startswith("validation: 1 of the 2 records in held also occur")
    assert f"{tmp_path}/held.jsonl, line 2 and {tmp_path}/one.jsonl, line 2" in message
    caplog.clear()
    warn_about_overlap(training, data_of(held=[record("New?")]))
    assert not caplog.records

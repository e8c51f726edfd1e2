"""Tests of error messages."""

import pickle

import pytest

from internvl_chat.utils.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("location", "text"),
    [
        ({}, "wrong"),
        ({"file": "a.jsonl"}, "a.jsonl: wrong"),
        ({"file": "a.jsonl", "line": 3}, "a.jsonl, line 3: wrong"),
        ({"file": "a.jsonl", "line": 3, "record": "r1"}, "a.jsonl, line 3 (record 'r1'): wrong"),
    ],
)
def test_location_of_a_data_error(location, text):
    error = DataError("wrong", kind="json", **location)
    assert str(error) == text
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.kind, vars(copy)) == (text, "json", vars(error))


def test_usage_error_lists_all_problems():
    assert str(UsageError("one")) == "one"
    error = UsageError(["one", "two"])
    assert str(error) == "2 problems:\n  1. one\n  2. two"
    assert error.exit_code == 2

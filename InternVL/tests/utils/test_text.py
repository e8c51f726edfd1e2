"""Singular and plural nouns."""

import pytest

from internvl_chat.utils.text import counted


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 errors"), (1, "1 error"), (2, "2 errors"), (12345, "12,345 errors")]
)
def test_counted(number, text):
    assert counted(number, "error") == text

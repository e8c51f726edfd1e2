"""Tests of Markdown tables."""

from internvl_chat.utils.markdown import markdown_table


def test_table():
    table = markdown_table(("task", "F1"), [("a|b\nc", 0.5)], left=1)
    assert table == "| task | F1 |\n| :-- | --: |\n| a\\|b c | 0.5 |"


def test_all_columns_are_left_aligned_by_default():
    assert markdown_table(("a", "b"), []) == "| a | b |\n| :-- | :-- |"

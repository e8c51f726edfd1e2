"""Tests of logging with multiple ranks."""

import logging

import pytest

from internvl_chat.utils.logging import configure_logging, get_logger


@pytest.mark.parametrize(
    ("rank", "messages"),
    [("0", ["INFO information", "WARNING warning"]), ("2", ["WARNING [rank 2] warning"])],
)
def test_ranks(monkeypatch, capsys, rank, messages):
    root = logging.getLogger("internvl_chat")
    before = root.handlers[:], root.level, root.propagate
    monkeypatch.setenv("RANK", rank)
    try:
        configure_logging()
        logger = get_logger("internvl_chat.test")
        logger.info("information")
        logger.warning("warning")
    finally:
        root.handlers[:], root.level, root.propagate = before[0], before[1], before[2]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == messages

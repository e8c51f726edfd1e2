"""Rows of `sessions.jsonl`."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from small_sets import encoder, text_record, write_set

from internvl_chat import __version__
from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.index.build import index_records
from internvl_chat.data.sources.skip_policy import ExcludedRecord
from internvl_chat.train.monitor import session as module
from internvl_chat.train.monitor.session import dataset_rows, git_commit, versions


@pytest.fixture
def data(tmp_path):
    """Three records of growing length, of which the second one is excluded."""
    sets = [write_set(tmp_path, [text_record(n, "a cat " * 10 * (n + 1)) for n in range(3)], by=encoder())]
    lengths = [index.lengths for index in index_records(sets)]
    excluded = [ExcludedRecord(sets[0].spec.name, 1, "broken")]
    return TrainingData(sets, lengths=lengths, excluded=excluded, max_bad_fraction=0.5)


def test_datasets(data):
    [row] = dataset_rows(data)
    tokens = data.lengths[0].tokens[[0, 2]]
    assert (row["records"], row["excluded"], row["records_per_epoch"]) == (3, 1, 2)
    assert (row["tokens"], row["longest"]) == (tokens.sum(), tokens.max())
    assert (row["tiles"], row["with_fewer_tiles"], row["truncated"]) == (0, 0, 0)
    assert Path(row["file"]).is_file()
    json.dumps(row)


def test_versions():
    found = versions()
    assert found["m3llm"] == __version__ and found["torch"].startswith(torch.__version__.split("+")[0])
    assert "missing" not in found.values()


def test_commit(tmp_path, monkeypatch):
    """The commit is that of this code, not of a repository in which the package is installed."""
    assert git_commit(tmp_path) is None
    commands = ("init -q", "add a", "-c user.name=a -c user.email=a@b commit -q -m a")
    (tmp_path / "a").write_text("1")
    for command in commands:
        subprocess.run(["git", "-C", str(tmp_path), *command.split()], check=True)
    assert git_commit(tmp_path) is None
    monkeypatch.setattr(module, "__file__", str(tmp_path / "session.py"))
    clean = git_commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == f"{clean}-dirty"

"""Training with images in folders, shards and object storage: same losses and records, despite an outage."""

import json
import re
from functools import cache

import pytest
from ranks import run_training
from s3_server import KEY, SECRET, S3Server, require_packages

from internvl_chat.cli import main as m3llm
from internvl_chat.train.internvl_chat_finetune import main as train

STEPS = 6


@pytest.fixture(scope="module")
def shards(augmented, tmp_path_factory):
    """Output of `m3llm data shard`."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    assert m3llm(["data", "shard", str(augmented), str(folder), "--shard_mb", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def undisturbed(small_run, tmp_path_factory):
    """Return a function that trains with images from a folder."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"

    @cache
    def get():
        assert train(small_run(folder, max_steps=STEPS, save_steps=2)) == 0
        return folder

    return get


@pytest.fixture
def server(tmp_path):
    """An S3 server of this test that is not started yet."""
    require_packages()
    server = S3Server(tmp_path)
    yield server
    server.stop()


def meta_with(root: str, source, file):
    """Write a copy of a meta file with another root."""
    entries = json.loads(source.read_text())
    file.write_text(json.dumps({name: {**entry, "root": root} for name, entry in entries.items()}))
    return file


def same_run(one, other, metrics):
    for key in ("step", "loss", "grad_norm", "learning_rate"):
        assert [row[key] for row in metrics(one)] == [row[key] for row in metrics(other)], key
    assert (one / "ledger.jsonl").read_text() == (other / "ledger.jsonl").read_text()


def test_shards(small_run, shards, undisturbed, tmp_path, metrics):
    meta = shards / "augmented.json"
    assert train(small_run(tmp_path / "run", meta_path=meta, max_steps=STEPS, dataloader_num_workers=1)) == 0
    same_run(tmp_path / "run", undisturbed(), metrics)


def test_resume_with_shards(small_run, shards, undisturbed, tmp_path, metrics):
    """A run that started with images from a folder resumes with shards."""
    checkpoint = undisturbed() / "checkpoint-4"
    meta = shards / "augmented.json"
    arguments = small_run(
        tmp_path / "run", meta_path=meta, max_steps=STEPS, resume_from_checkpoint=checkpoint
    )
    assert train(arguments) == 0
    expected = [(row["step"], row["loss"]) for row in metrics(undisturbed())]
    assert [(row["step"], row["loss"]) for row in metrics(tmp_path / "run")] == expected[4:]


@pytest.mark.slow
def test_outage(small_run, augmented, undisturbed, sample_data, server, tmp_path, metrics):
    """The server exits during training; the run fails after retries, and resumes when the server is back."""
    run = tmp_path / "run"
    variables = {
        **server.environment(),
        "M3LLM_CACHE": str(tmp_path / "cache"),
        # Large enough for a few images only, so that training downloads the others again.
        "M3LLM_CACHE_GB": "0.0004",
        "M3LLM_RETRY_SECONDS": "2",
    }
    server.start(run / "metrics.jsonl", 3)
    root = server.upload(sample_data / "images", "images")
    meta = meta_with(root, augmented, tmp_path / "meta.json")
    arguments = small_run(run, meta_path=meta, max_steps=STEPS, save_steps=2, dataloader_num_workers=1)
    failed = run_training(*arguments, environment=variables)
    assert failed.returncode == 1, failed.stderr
    assert "attempt 1 failed (Could not connect to the endpoint URL" in failed.stderr
    [line] = [line for line in failed.stderr.splitlines() if "check the network" in line]
    for text in (".jsonl, line ", "(record '", "run the same command again"):
        assert text in line, line
    assert re.search(rf"{root}\S* cannot be read after ", line), line
    assert "Traceback" not in failed.stderr
    assert server.process.wait() == 1
    assert 3 <= len(metrics(run)) < STEPS

    server.start()
    server.upload(sample_data / "images", "images")
    resumed = run_training(*arguments, environment=variables)
    assert resumed.returncode == 0, resumed.stderr
    same_run(run, undisturbed(), metrics)
    sessions = [json.loads(line)["step"] for line in (run / "sessions.jsonl").read_text().splitlines()]
    assert sessions[0] == 0 and sessions[1] in (2, 4)
    written = [file.read_bytes() for file in run.rglob("*") if file.is_file()]
    outputs = [failed.stderr.encode(), resumed.stderr.encode(), resumed.stdout.encode()]
    assert not any(secret.encode() in text for text in [*written, *outputs] for secret in (KEY, SECRET))


@pytest.mark.slow
def test_ranks_share_the_cache(small_run, shards, server, tmp_path, metrics):
    """Two ranks with two workers each train from remote shards, with the same losses as one rank."""
    server.start()
    root = server.upload(shards / "image-shards", "shards")
    meta = meta_with(root, shards / "augmented.json", tmp_path / "meta.json")
    ledgers = []
    variables = {**server.environment(), "M3LLM_CACHE": str(tmp_path / "cache"), "M3LLM_CACHE_GB": "0.001"}
    for ranks, folder in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        arguments = small_run(
            folder, meta_path=meta, data_root=shards, max_steps=STEPS, dataloader_num_workers=2,
            per_device_train_batch_size=1, gradient_accumulation_steps=4 // ranks,
        )  # fmt: skip
        result = run_training(*arguments, ranks=ranks, environment=variables)
        assert result.returncode == 0, result.stderr
        ledgers.append((folder / "ledger.jsonl").read_text())
    assert ledgers[0] == ledgers[1]
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)

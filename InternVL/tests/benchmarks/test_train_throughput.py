"""The benchmark of training at its smallest size: the same work for every preset, and what it writes."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import jobs
from benchmarks.ablations import ABLATIONS, LIGER, ablations
from benchmarks.flags import as_tokens
from benchmarks.jobs import Result
from benchmarks.own_records import COUNTS, write_own_records
from benchmarks.shapes import SHAPES
from benchmarks.train_throughput import check_same_work, format_table, main
from benchmarks.workload import Workload, prepare_workload, take_records
from internvl_chat.data.meta import load_meta
from internvl_chat.train.arguments import parse_arguments
from internvl_chat.utils.errors import UsageError

KEYS = {"preset", "recipe", "model", "device", "records_per_second", "tokens_per_second", "mfu",
        "peak_memory_gb", "epoch_hours"}  # fmt: skip


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "Example: python InternVL/benchmarks/train_throughput.py" in text
    assert "--child" not in text


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    return write_own_records(tmp_path_factory.mktemp("records"), context_tokens=0)


@pytest.mark.parametrize(
    "flags", [["--recipe", "full"], ["--recipe", "lora", "--peers"]], ids=["full", "lora"]
)
def test_presets_do_the_same_work(flags, records, tmp_path, capsys):
    out = tmp_path / "out.json"
    argv = ["--model", "smoke", "--device", "cpu", "--meta", str(records), "--steps", "1", "--warmup", "1"]
    assert main([*argv, "--threads", "1", "--json", str(out), *flags]) == 0
    written = json.loads(out.read_text())
    rows = {row["preset"]: row for row in written["rows"]}
    assert list(rows) == ["reference", "fast", *(["peer"] if "--peers" in flags else [])]
    for row in rows.values():
        assert row.keys() == KEYS
        assert (row["recipe"], row["model"], row["device"]) == (flags[1], "smoke", "cpu")
        assert min(row[key] for key in KEYS if "_" in key) > 0
        assert row["mfu"] is None
        assert row["epoch_hours"] == pytest.approx(237_748 / row["records_per_second"] / 3600)
    rates = [row["records_per_second"] for row in rows.values()]
    assert written["ratio"] == pytest.approx(rates[1] / rates[0])
    assert [rounds for (rounds,) in written["rounds"].values()] == rates
    losses = written["same_work"]["first_loss"]
    assert losses["fast"] == pytest.approx(losses["reference"], rel=1e-3)
    assert written["same_work"]["records"] == (16 if flags[1] == "lora" else 2)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(rows)
    assert table[1].split()[-1] == "1.00"


def test_presets_that_do_different_work_are_an_error():
    one = Result(seconds=1, records=2, tokens=100, flops=1, peak_flops=None, peak_memory=1, first_loss=7.0)
    check_same_work({"reference": one, "fast": dataclasses.replace(one, first_loss=7.005)})
    for change, message in (({"tokens": 101}, "of 101 tokens"), ({"first_loss": 7.1}, "the loss 7.1")):
        with pytest.raises(RuntimeError, match=message):
            check_same_work({"reference": one, "fast": dataclasses.replace(one, **change)})


def test_own_records_have_the_counts_of_the_real_ones(records, tmp_path):
    workload = prepare_workload(tmp_path, SHAPES["mid"], records=240, max_dynamic_patch=1, meta=str(records))
    mean = sum(counts.tokens for counts in COUNTS.values()) / len(COUNTS)
    supervised = sum(counts.supervised for counts in COUNTS.values()) / len(COUNTS)
    tiles = sum(counts.tiles for counts in COUNTS.values()) / len(COUNTS)
    found = workload.sizes
    assert len(found) == 240
    assert sum(size.tokens for size in found) / 240 == pytest.approx(mean, rel=0.05)
    assert sum(size.supervised for size in found) / 240 == pytest.approx(supervised, rel=0.1)
    assert sum(size.tiles for size in found) / 240 == pytest.approx(tiles, rel=0.05)
    workload.save(tmp_path / "workload.json")
    assert Workload.load(tmp_path / "workload.json") == workload


def test_any_stretch_of_records_has_the_mix_of_all(records):
    taken = take_records(load_meta(records, data_root=Path.cwd()), 60)
    images = [len(record.get("image", [])) for record in taken]
    for start in range(0, 60, 12):
        assert images[start : start + 12].count(0) == 2
        assert images[start : start + 12].count(1) == 2
    assert all(Path(name).is_absolute() for record in taken for name in record.get("image", []))


# Liger is refused without a GPU.
@pytest.mark.parametrize("lever", [name for name in ABLATIONS if name != LIGER])
def test_what_pulls_a_lever_is_known_to_the_trainer(lever, tmp_path):
    needed = {"model_name_or_path": "m", "meta_path": "m.json", "output_dir": str(tmp_path), "use_cpu": True}
    parse_arguments(as_tokens(needed | ABLATIONS[lever].flags))


def test_a_variant_that_fails_is_left_out_and_told(monkeypatch, capsys, tmp_path):
    """The others are shown all the same, and the exit code says so; a preset that fails ends it all."""
    result = Result(
        seconds=1.0, records=2, tokens=9, flops=1.0, peak_flops=None, peak_memory=1, first_loss=3.0
    )
    broken = "fast without packing"

    def run(job, script, number):
        if job.label == broken:
            raise RuntimeError(f"{job.label} ended with exit code 1")
        return result

    monkeypatch.setattr(jobs, "run_in_a_process", run)
    out = tmp_path / "rows.json"
    options = ["--model", "smoke", "--presets", "fast", "--device", "cpu", "--steps", "1", "--warmup", "0"]
    assert main([*options, "--ablate", "--repeats", "2", "--json", str(out)]) == 1
    assert capsys.readouterr().err.count(f"{broken} ended") == 1
    shown = [row["preset"] for row in json.loads(out.read_text())["rows"]]
    assert broken not in shown and len(shown) == len(ablations("lora", "cpu"))

    broken = "fast"
    assert main([*options, "--json", str(out)]) == 1
    assert "fast ended" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["lora", "full"])
def test_every_lever_off_does_the_same_work(recipe, tmp_path):
    """`check_same_work` compares the first losses of all."""
    out = tmp_path / "rows.json"
    options = ["--recipe", recipe, "--model", "smoke", "--presets", "fast", "--ablate", "--steps", "1"]
    assert main([*options, "--warmup", "0", "--device", "cpu", "--json", str(out)]) == 0
    found = [row["preset"] for row in json.loads(out.read_text())["rows"]]
    assert found == ["fast", *(f"fast {name}" for name in ablations(recipe, "cpu"))]


def test_a_meta_file_that_is_missing_is_named(capsys):
    assert main(["--model", "smoke", "--device", "cpu", "--meta", "nosuch.json"]) == 1
    assert "nosuch.json: no such meta file" in capsys.readouterr().err


def test_table_without_a_reference():
    row = dict.fromkeys(KEYS, 1.0) | {"preset": "fast", "recipe": "lora", "model": "mid", "device": "cuda"}
    assert format_table([row]).splitlines()[1].split()[-1] == "-"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    small = dataclasses.replace(SHAPES["smoke"], vocabulary=8)
    with pytest.raises(UsageError, match="tokens, but the model has 8"):
        prepare_workload(tmp_path, small, records=1, max_dynamic_patch=1)


def test_a_gpu_that_is_missing_is_told_at_once(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "--device cuda: torch finds no GPU" in capsys.readouterr().err


def test_unknown_preset_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--presets", "fastest"])
    assert "fastest is unknown" in capsys.readouterr().err

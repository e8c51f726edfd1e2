"""The training benchmark at small size: same work in all presets, and the report."""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers import rounding_bound, terms_of

from benchmarks import jobs
from benchmarks.jobs import Job, Result
from benchmarks.presets.ablations import ABLATIONS, LIGER, ablations
from benchmarks.presets.recipes import as_tokens, fast_flags
from benchmarks.shapes import SHAPES, default_dtype, weightless_model
from benchmarks.synthetic_records import COUNTS, write_synthetic_records
from benchmarks.train_throughput import check_same_work, format_table, main, measure
from benchmarks.workload import Workload, prepare_workload, take_records
from internvl_chat.data.sources.meta import load_meta
from internvl_chat.train.arguments import parse_arguments
from internvl_chat.utils import hardware
from internvl_chat.utils.errors import UsageError

KEYS = {"preset", "recipe", "model", "device", "dtype", "records_per_second", "tokens_per_second", "mfu",
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
    return write_synthetic_records(tmp_path_factory.mktemp("records"), context_tokens=0)


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    """Fake /proc/cpuinfo with the given instructions."""

    def pretend(*instructions: str) -> None:
        file = tmp_path / "cpuinfo"
        file.write_text(f"processor\t: 0\nflags\t\t: fpu avx2 {' '.join(instructions)}\n")
        monkeypatch.setattr(hardware, "_CPU_INFO", file)

    return pretend


@pytest.mark.parametrize(
    ("instructions", "device", "dtype"),
    [
        (["avx512f", "avx512_bf16"], "cpu", "bfloat16"),
        (["amx_bf16"], "cpu", "bfloat16"),
        (["avx512f", "avx512_vnni"], "cpu", "float32"),
        ([], "cpu", "float32"),
        ([], "cuda", "bfloat16"),
    ],
)
def test_default_dtype(cpu, instructions, device, dtype):
    cpu(*instructions)
    assert default_dtype(device) == dtype


def run_here(job: Job, script: Path, number: int) -> Result:
    """Run a job in this process; importing the libraries takes most of the time of a subprocess."""
    folder = Path(job.folder) / f"job{number}"
    folder.mkdir()
    file = folder / "job.json"
    file.write_text(json.dumps(dataclasses.asdict(job) | {"folder": str(folder)}))
    with (folder / "log.txt").open("w") as log, contextlib.redirect_stdout(log):
        assert measure(file) == 0
    return Result(**json.loads((folder / "result.json").read_text()))


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        (["--recipe", "full"], "bfloat16"),
        (["--recipe", "lora", "--peers"], "bfloat16"),
        pytest.param(["--recipe", "lora", "--peers"], "float32", marks=pytest.mark.slow),
    ],
    ids=["full", "lora", "lora without bf16 instructions"],
)
def test_presets_do_the_same_work(cpu, flags, dtype, records, tmp_path, capsys, monkeypatch):
    """One variant in subprocesses, as users run it."""
    if "--peers" in flags:
        monkeypatch.setattr(jobs, "run_in_subprocess", run_here)
    cpu(*(["avx512_bf16"] if dtype == "bfloat16" else []))
    out = tmp_path / "out.json"
    argv = ["--model", "smoke", "--device", "cpu", "--meta", str(records), "--steps", "1", "--warmup", "1"]
    assert main([*argv, "--threads", "1", "--json", str(out), *flags]) == 0
    written = json.loads(out.read_text())
    rows = {row["preset"]: row for row in written["rows"]}
    assert list(rows) == ["reference", "fast", *(["peer"] if "--peers" in flags else [])]
    for row in rows.values():
        assert row.keys() == KEYS
        assert (row["recipe"], row["model"], row["device"]) == (flags[1], "smoke", "cpu")
        assert row["dtype"] == dtype
        assert min(row[key] for key in KEYS if "_" in key) > 0
        assert row["mfu"] is None
        assert row["epoch_hours"] == pytest.approx(237_748 / row["records_per_second"] / 3600)
    rates = [row["records_per_second"] for row in rows.values()]
    assert written["ratio"] == pytest.approx(rates[1] / rates[0])
    assert [rounds for (rounds,) in written["rounds"].values()] == rates
    losses = written["same_work"]["first_loss"]
    shape = SHAPES["smoke"]
    terms = terms_of(weightless_model(shape)) + shape.vocabulary
    # In float32, only the summation order differs; a mean of losses is more precise than a bfloat16 loss.
    tolerance = 1e-3 if dtype == "bfloat16" else rounding_bound(terms, torch.float32, 1)
    assert losses["fast"] == pytest.approx(losses["reference"], rel=tolerance)
    assert written["arguments"]["dtype"] == dtype
    assert written["same_work"]["records"] == (16 if flags[1] == "lora" else 2)
    table, messages = (text.splitlines() for text in capsys.readouterr())
    assert ("This CPU has no bf16 instructions: all presets train in float32." in messages) == (
        dtype == "float32"
    )
    assert table[1].split()[4] == dtype
    assert len(table) == 1 + len(rows)
    assert table[1].split()[-1] == "1.00"


def test_different_work_is_an_error():
    one = Result(seconds=1, records=2, tokens=100, flops=1, peak_flops=None, peak_memory=1, first_loss=7.0)
    check_same_work({"reference": one, "fast": dataclasses.replace(one, first_loss=7.005)})
    for change, message in (({"tokens": 101}, "with 101 tokens"), ({"first_loss": 7.1}, "fast is 7.1")):
        with pytest.raises(RuntimeError, match=message):
            check_same_work({"reference": one, "fast": dataclasses.replace(one, **change)})


def test_peer_is_compared_by_the_loss_per_token():
    reference = Result(
        seconds=1, records=2, tokens=100, flops=1, peak_flops=None, peak_memory=1, first_loss=7.0,
        first_token_loss=8.0,
    )  # fmt: skip
    peer = dataclasses.replace(reference, first_loss=8.005, first_token_loss=8.005)
    check_same_work({"reference": reference, "peer": peer})
    with pytest.raises(RuntimeError, match=r"peer is 8\.10000, but that of reference is 8\.00000"):
        check_same_work({"reference": reference, "peer": dataclasses.replace(peer, first_token_loss=8.1)})


def test_synthetic_records_have_the_published_counts(records, tmp_path):
    workload = prepare_workload(tmp_path, SHAPES["mid"], records=240, max_dynamic_patch=1, meta=str(records))
    mean = sum(counts.tokens for counts in COUNTS.values()) / len(COUNTS)
    supervised = sum(counts.supervised for counts in COUNTS.values()) / len(COUNTS)
    tiles = sum(counts.tiles for counts in COUNTS.values()) / len(COUNTS)
    sizes = workload.sizes
    assert len(sizes) == 240
    assert sum(size.tokens for size in sizes) / 240 == pytest.approx(mean, rel=0.05)
    assert sum(size.supervised for size in sizes) / 240 == pytest.approx(supervised, rel=0.1)
    assert sum(size.tiles for size in sizes) / 240 == pytest.approx(tiles, rel=0.05)
    workload.save(tmp_path / "workload.json")
    assert Workload.load(tmp_path / "workload.json") == workload


def test_any_slice_has_the_same_mix_of_datasets(records):
    taken = take_records(load_meta(records, data_root=Path.cwd()), 60)
    images = [len(record.get("image", [])) for record in taken]
    for start in range(0, 60, 12):
        assert images[start : start + 12].count(0) == 2
        assert images[start : start + 12].count(1) == 2
    assert all(Path(name).is_absolute() for record in taken for name in record.get("image", []))


# Liger is rejected without a GPU.
@pytest.mark.parametrize("ablation", [name for name in ABLATIONS if name != LIGER])
def test_flags_of_ablations_are_valid(ablation, tmp_path):
    needed = {"model_name_or_path": "m", "meta_path": "m.json", "output_dir": str(tmp_path), "use_cpu": True}
    parse_arguments(as_tokens(needed | ABLATIONS[ablation].flags))


def test_failing_ablation_is_reported_and_skipped(monkeypatch, capsys, tmp_path):
    """Failing ablations are skipped and the exit code is 1; a failing preset ends the run."""
    result = Result(
        seconds=1.0, records=2, tokens=9, flops=1.0, peak_flops=None, peak_memory=1, first_loss=3.0
    )
    broken = "fast without packing"

    def run(job, script, number):
        if job.label == broken:
            raise RuntimeError(f"{job.label} failed with exit code 1")
        return result

    monkeypatch.setattr(jobs, "run_in_subprocess", run)
    out = tmp_path / "rows.json"
    options = ["--model", "smoke", "--presets", "fast", "--device", "cpu", "--steps", "1", "--warmup", "0"]
    assert main([*options, "--ablate", "--repeats", "2", "--json", str(out)]) == 1
    assert capsys.readouterr().err.count(f"{broken} failed") == 1
    shown = [row["preset"] for row in json.loads(out.read_text())["rows"]]
    assert broken not in shown and len(shown) == len(ablations("lora", "cpu", default_dtype("cpu")))

    broken = "fast"
    assert main([*options, "--json", str(out)]) == 1
    assert "fast failed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("recipe", ["lora", "full"])
def test_ablations_do_the_same_work(recipe, dtype, tmp_path):
    """`check_same_work` compares the first losses of all jobs."""
    out = tmp_path / "rows.json"
    options = ["--recipe", recipe, "--model", "smoke", "--presets", "fast", "--ablate", "--steps", "1"]
    options += ["--warmup", "0", "--device", "cpu", "--dtype", dtype]
    assert main([*options, "--json", str(out)]) == 0
    found = [row["preset"] for row in json.loads(out.read_text())["rows"]]
    assert found == ["fast", *(f"fast {name}" for name in ablations(recipe, "cpu", dtype))]


def test_float32_has_fewer_ablations():
    assert ablations("full", "cpu", "float32").keys() < ablations("full", "cpu", "bfloat16").keys()
    for ablation in ablations("full", "cpu", "float32").values():
        assert "weight_precision" not in ablation.flags
    assert "weight_precision" not in fast_flags("cpu", bf16=False)


def test_missing_meta_file(capsys):
    assert main(["--model", "smoke", "--device", "cpu", "--meta", "nosuch.json"]) == 1
    assert "nosuch.json: no such meta file" in capsys.readouterr().err


def test_table_without_a_reference():
    row = dict.fromkeys(KEYS, 1.0) | {"preset": "fast", "recipe": "lora", "model": "mid", "device": "cuda"}
    assert format_table([row]).splitlines()[1].split()[-1] == "-"


def test_tokenizer_with_too_many_tokens(tmp_path):
    small = dataclasses.replace(SHAPES["smoke"], vocabulary=8)
    with pytest.raises(UsageError, match=r"more than that of the model \(8\)"):
        prepare_workload(tmp_path, small, records=1, max_dynamic_patch=1)


def test_missing_gpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "--device cuda: no GPU available" in capsys.readouterr().err


def test_unknown_preset(capsys):
    with pytest.raises(SystemExit):
        main(["--presets", "fastest"])
    assert "unknown: fastest" in capsys.readouterr().err

"""The dry run of the largest pack: handling of out-of-memory errors, and no effect on training."""

import contextlib
import json
import logging
import os
import subprocess
import sys

import dry_run_ranks
import pytest
import torch
from dry_run_ranks import OUT, Device
from helpers import HANG_SECONDS, SOURCE_ROOT, flags

from internvl_chat.train.internvl_chat_finetune import main as train
from internvl_chat.train.loop import TrainingLoop
from internvl_chat.train.preflight import dry_run
from internvl_chat.train.preflight.dry_run import is_out_of_memory
from internvl_chat.utils.errors import TrainingError


def cpu_message() -> RuntimeError:
    """Return the error that torch raises when host memory is exhausted."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    return caught.value


def error_of(one: Device, **values) -> str:
    with pytest.raises(TrainingError) as caught:
        one.run(**values)
    return str(caught.value)


@pytest.mark.parametrize("sharded", [False, True])
def test_fitting_pack_is_run_once(sharded, caplog):
    device = Device(enough=0, start=3)
    with caplog.at_level(logging.INFO):
        assert device.run(sharded=sharded) == 3
    assert device.tried == [3]
    assert "dry run: planned 9.5e-07 GB, peak of the process" in caplog.text


@pytest.mark.parametrize(
    ("layers", "start", "enough", "tried"),
    [
        (8, 0, 1, [0, 2]),
        (8, 0, 5, [0, 2, 4, 6]),
        (8, 3, 8, [3, 5, 7, 8]),
        (3, 0, 3, [0, 1, 2, 3]),  # a quarter of three layers is one
        (1, 0, 1, [0, 1]),
        (28, 0, 10, [0, 7, 14]),
    ],
)
def test_more_layers_are_checkpointed_until_it_fits(layers, start, enough, tried):
    device = Device(enough, start)
    assert device.run(layers=layers) == tried[-1]
    assert device.tried == tried


def test_host_out_of_memory():
    error = cpu_message()
    assert is_out_of_memory(error)
    assert Device(2, error=error).run() == 2


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (5x4 and 3x2)"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
    ],
)
def test_out_of_memory_errors(error, counts):
    assert is_out_of_memory(error) == counts


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), ValueError("allocate memory"), TrainingError("x")]
)
def test_other_errors_pass_through(error, sharded):
    device = Device(8, error=error)
    with pytest.raises(type(error)) as caught:
        device.run(sharded=sharded)
    assert caught.value is error
    assert device.tried == [0]


def test_plan_is_shown_if_checkpointing_does_not_help():
    device = Device(enough=100)
    text = error_of(device)
    assert device.tried == [0, 2, 4, 6, 8]
    assert "the largest pack does not fit: CUDA out of memory. Tried to allocate 2.00 GiB.\n" in text
    assert "More lines" not in text
    assert "activations 7e-07" in text and "1234 tokens (56 supervised), 7 tiles" in text
    # The plan fits but the pack does not, so the suggested flags must need clearly less.
    assert "flags that would fit: --below 855 (8.55e-07 GB)" in text


@pytest.mark.parametrize("flag", ["True", "False"])
def test_explicit_grad_checkpoint_is_not_changed(flag):
    device = Device(enough=1)
    assert "does not fit" in error_of(device, grad_checkpoint=flag)
    assert device.tried == [0]


def test_a_sharded_model_is_never_run_again():
    device = Device(enough=1)
    assert "CUDA out of memory" in error_of(device, sharded=True)
    assert device.tried == [0]


def test_no_dry_run_with_deepspeed(caplog):
    """DeepSpeed frees gradients only in a step, so those of the dry run would add to the first step."""
    device = Device(enough=100, start=3)
    with caplog.at_level(logging.INFO):
        assert device.run(parallel="deepspeed", sharded=True) == 3
    assert not device.tried and "dry run skipped" in caplog.text


def test_all_ranks_retry_if_one_runs_out_of_memory(monkeypatch):
    """The pack fits on this rank immediately; another rank reports twice that it does not."""
    answers, own = iter([True, True, False]), []
    monkeypatch.setattr(dry_run, "any_rank", lambda flag: own.append(flag) or next(answers))
    device = Device(enough=0)
    assert device.run() == 4
    assert (device.tried, own) == ([0, 2, 4], [False] * 3)
    monkeypatch.setattr(dry_run, "any_rank", lambda flag: True)
    assert "another rank is out of memory" in error_of(Device(enough=0))


class Gpu:
    """Simulates a GPU with 1000 bytes and a given peak memory per pack."""

    def __init__(self, monkeypatch, device: Device, peak) -> None:
        for name in ("reset_peak_memory_stats", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak(device.checkpointed))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (300, 5000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 700)


@pytest.mark.parametrize(("loaded", "expected"), [(False, 4), (True, 0)])
def test_optimizer_state_counts_once_on_a_gpu(monkeypatch, caplog, loaded, expected):
    """The state exists from the first step on: 50 bytes plus a peak of 960 exceed the GPU's 1000.

    In a resumed run, the loaded state is already part of the peak.
    """
    device = Device(enough=0)
    Gpu(monkeypatch, device, lambda checkpointed: 960 if checkpointed < 4 else 950)
    with caplog.at_level(logging.INFO):
        assert device.run(device="cuda", loaded=loaded) == expected
    assert device.tried == list(range(0, expected + 1, 2))
    measured = "1e-06" if not loaded else "9.6e-07"
    assert f"dry run: planned 9.5e-07 GB, measured {measured} GB" in caplog.text


def test_pack_that_does_not_fit_next_to_the_optimizer_state(monkeypatch):
    device = Device(enough=0)
    Gpu(monkeypatch, device, lambda checkpointed: 960)
    assert "the largest pack does not fit: 1.01e-06 of 1e-06 GB" in error_of(
        device, device="cuda", sharded=True
    )
    assert device.tried == [0]


@pytest.mark.parametrize(("several", "measured"), [(False, 940), (True, 1000)])
def test_unreduced_ddp_gradients_in_the_peak(monkeypatch, caplog, several, measured):
    device = Device(enough=0)
    Gpu(monkeypatch, device, lambda checkpointed: 1000)
    with caplog.at_level(logging.INFO):
        assert device.run(device="cuda", loaded=True, parallel="ddp", several_packs=several) == 0
    assert f"measured {measured / 1e9:.4g} GB" in caplog.text


# ---- multiple ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """Results of the two ranks of `dry_run_ranks`."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, dry_run_ranks.__file__, str(folder)]
    started = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(2)]
    try:
        # Rank 0 waits for rank 1 until it is killed, as the launcher does.
        assert [process.wait(timeout=HANG_SECONDS) for process in reversed(started)] == [0, 0]
    finally:
        for process in started:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_both_ranks_checkpoint_the_same_layers(ranks):
    """Rank 1 needs four checkpointed layers, rank 0 none."""
    assert [found["replicated"] for found in ranks] == [[4, [0, 2, 4]]] * 2


def test_unreduced_gradients_are_not_bucket_views(ranks):
    """Before the last pack, gradients are stored next to DDP's buckets, as planned."""
    assert [found["storages"] for found in ranks] == [{"reduced": 1, "unreduced": 6}] * 2


def test_a_rank_of_a_sharded_model_does_not_wait_for_the_others(ranks):
    """Rank 1 ends with the plan, while rank 0 waits for it in FSDP's collective; neither tries again."""
    name, text, tried = ranks[1]["sharded"]
    assert (name, tried) == ("TrainingError", [0])
    assert "the largest pack does not fit: CUDA out of memory" in text and "memory plan in GB" in text
    name, text, tried = ranks[0]["sharded"]
    assert (name, tried) == ("RuntimeError", [0]) and "out of memory" not in text


# ---- through the training script


@pytest.fixture
def start(tiny_model, sample_data, tmp_path):
    """Train a few steps with adapters and dropout; return the exit code and the folder."""

    def run(name: str, **values):
        argv = {
            "model_name_or_path": tiny_model,
            "meta_path": sample_data / "train.json",
            "output_dir": tmp_path / name,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            "save_strategy": "no",
            "use_llm_lora": 4,
            "lora_dropout": 0.3,
            "freeze_llm": True,
            "seed": 5,
            **values,
        }
        return train(flags(**argv)), tmp_path / name

    return run


@pytest.mark.parametrize("bf16", [False, True])
def test_dry_run_does_not_affect_training(start, metrics, monkeypatch, capfd, bf16):
    """Losses with dropout are exactly the same, so weights and random state are unaffected."""
    code, out = start("with", bf16=bf16)
    assert code == 0
    assert "dry run: planned" in capfd.readouterr().err
    monkeypatch.setattr("internvl_chat.train.internvl_chat_finetune.run_dry_run", lambda *_: 0)
    code, other = start("without", bf16=bf16)
    assert code == 0
    assert "dry run: planned" not in capfd.readouterr().err
    losses = [[row["loss"] for row in metrics(folder)] for folder in (out, other)]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (out, other)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("flags_of_packs", "packs"), [({}, 1), ({"packing": False}, 2)])
def test_dry_run_with_accumulated_gradients(start, monkeypatch, flags_of_packs, packs):
    """With multiple packs per step, no gradients remain either."""
    seen = []
    original = TrainingLoop.forward_backward

    def forward_backward(loop, local_packs, weights, scale, **options):
        seen.append(len(local_packs))
        assert len(weights) == len(local_packs)
        assert all(p.grad is None for p in loop.strategy.model.parameters())
        return original(loop, local_packs, weights, scale, **options)

    monkeypatch.setattr(TrainingLoop, "forward_backward", forward_backward)
    assert start("out", **flags_of_packs)[0] == 0
    assert len(seen) == 5 and seen[0] == packs and set(seen[1:]) == {packs}


def test_dropout_affects_the_losses(start, metrics):
    """Ensures that the tests above would detect a change."""
    losses = [[row["loss"] for row in metrics(start(f"s{p}", lora_dropout=p)[1])] for p in (0.3, 0.0)]
    # Adapters start at zero, so the first losses are equal.
    assert losses[0][0] == losses[1][0] and losses[0][1:] != losses[1][1:]


class Scarce:
    """Memory that suffices for a pack if `enough` decoder layers are checkpointed."""

    def __init__(self, monkeypatch, enough: int) -> None:
        self.tried: list[int] = []
        original = TrainingLoop.forward_backward

        def forward_backward(loop, *arguments, **options):
            layers = loop.strategy.model.language_model.get_decoder().layers
            checkpointed = sum(getattr(layer, "gradient_checkpointing", False) for layer in layers)
            self.tried.append(checkpointed)
            result = original(loop, *arguments, **options)
            if checkpointed < enough:
                raise OUT
            return result

        monkeypatch.setattr(TrainingLoop, "forward_backward", forward_backward)


def test_scarce_memory_does_not_change_the_result(start, metrics, monkeypatch, capfd):
    code, plain = start("plain")
    assert code == 0
    scarce = Scarce(monkeypatch, enough=2)
    code, out = start("scarce")
    assert code == 0
    assert scarce.tried == [0, 1, 2] + [2] * 4
    assert "the largest pack does not fit: checkpointing 1 of 2 decoder layers" in capfd.readouterr().err
    rows = [metrics(folder) for folder in (plain, out)]
    for one, other in zip(*rows, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-6)


@pytest.mark.parametrize(("flag", "tried"), [("False", [0]), ("True", [2]), ("auto", [0, 1, 2])])
def test_run_that_does_not_fit_fails_before_the_first_step(start, monkeypatch, capfd, flag, tried):
    scarce = Scarce(monkeypatch, enough=3)
    code, out = start("out", grad_checkpoint=flag)
    assert code == TrainingError.exit_code
    error = capfd.readouterr().err
    assert "the largest pack does not fit: CUDA out of memory" in error and "flags that would fit:" in error
    assert "Traceback" not in error
    assert scarce.tried == tried
    assert not (out / "metrics.jsonl").exists()

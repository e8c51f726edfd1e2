"""The rehearsal of the largest pack: what is tried when memory runs out, and that it leaves no trace."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import flags
from transformers.training_args import OptimizerNames

from internvl_chat.data.dataset import Draw
from internvl_chat.data.length_cache import Lengths
from internvl_chat.data.order import StepSampler
from internvl_chat.data.packing import StepPlanner
from internvl_chat.model.checkpoint import load_model
from internvl_chat.train.freeze import set_trainable
from internvl_chat.train.internvl_chat_finetune import main as train
from internvl_chat.train.preflight.dry_run import Rehearsal, is_out_of_memory, plan_memory
from internvl_chat.train.preflight.memory import MemoryModel, PackSize
from internvl_chat.train.trainer import M3LLMTrainer
from internvl_chat.utils.errors import TrainingError

CPU = torch.device("cpu")


def cpu_message() -> RuntimeError:
    """What torch itself raises when the machine has no more memory."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    return caught.value


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")


class Device:
    """A device on which the pack fits once enough layers are recomputed."""

    def __init__(self, enough: int, start: int = 0, error: Exception = OUT) -> None:
        self.enough, self.recomputed, self.error = enough, start, error
        self.tried: list[int] = []

    def forward_backward(self) -> None:
        self.tried.append(self.recomputed)
        if self.recomputed < self.enough:
            raise self.error

    def recompute_layers(self, count: int) -> None:
        self.recomputed = count


def rehearsal(
    *, layers: int = 8, recomputed: int = 0, may_recompute: bool = True, precision: str = "master"
) -> Rehearsal:
    memory = MemoryModel(
        100, 10, {"master": 60, "stochastic": 40, "bf16": 20}, layers, 10.0, 1.0, 2.0, 3.0, 3.0
    )
    return Rehearsal(memory, [Draw(0, 0)], PackSize(1234, 56, 7), precision, recomputed, may_recompute)


def run(device: Device, anywhere=lambda value: value, **values) -> int:
    one = rehearsal(recomputed=device.recomputed, **values)
    return one.run(device.forward_backward, device.recompute_layers, anywhere, CPU)


def test_what_fits_is_run_once():
    device = Device(enough=0, start=3)
    assert run(device) == 3
    assert device.tried == [3]


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
def test_a_quarter_more_of_the_layers_is_recomputed_until_it_fits(layers, start, enough, tried):
    device = Device(enough, start)
    assert run(device, layers=layers) == tried[-1]
    assert device.tried == tried


def test_memory_that_the_machine_lacks_counts_too():
    error = cpu_message()
    assert is_out_of_memory(error)
    device = Device(2, error=error)
    assert run(device) == 2


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (5x4 and 3x2)"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
    ],
)
def test_which_errors_mean_that_memory_ran_out(error, counts):
    assert is_out_of_memory(error) == counts


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), ValueError("allocate memory"), TrainingError("x")]
)
def test_other_errors_pass_through(error):
    device = Device(8, error=error)
    with pytest.raises(type(error)) as caught:
        run(device)
    assert caught.value is error
    assert device.tried == [0]


def advice(device: Device, **values) -> str:
    with pytest.raises(TrainingError) as caught:
        run(device, **values)
    return str(caught.value)


def test_where_nothing_helps_the_flags_that_would_are_named():
    device = Device(enough=100)
    text = advice(device)
    assert device.tried == [0, 2, 4, 6, 8]
    assert "the largest pack (1234 tokens, 56 supervised, 7 tiles) does not fit into memory" in text
    flags_named = (
        "--max_packed_tokens",
        "--max_dynamic_patch",
        "--weight_precision stochastic",
        "--deepspeed",
    )
    for flag in flags_named:
        assert flag in text
    assert "--grad_checkpoint" not in text  # all layers are recomputed already


def test_layers_are_left_alone_where_the_flag_says_so():
    device = Device(enough=1)
    assert "--grad_checkpoint True" in advice(device, may_recompute=False)
    assert device.tried == [0]


@pytest.mark.parametrize(
    ("precision", "advised"), [("master", ["stochastic", "bf16"]), ("stochastic", ["bf16"]), ("bf16", [])]
)
def test_only_a_precision_that_saves_more_is_advised(precision, advised):
    told = advice(Device(enough=100), precision=precision)
    assert [
        name for name in ("master", "stochastic", "bf16") if f"--weight_precision {name}" in told
    ] == advised


def test_processes_go_on_alike_where_one_of_them_runs_out():
    """This one fits at once; another says twice that it does not."""
    answers = iter([True, True, False])
    device, own = Device(enough=0), []

    def anywhere(value: bool) -> bool:
        own.append(value)
        return next(answers)

    assert run(device, anywhere) == 4
    assert (device.tried, own) == ([0, 2, 4], [False] * 3)


def test_the_peak_with_the_state_of_the_optimizer_must_fit_on_a_gpu(monkeypatch):
    """The state is there from the first step on only: 60 - 10 bytes beside a peak of 960 are 1010 of 1000."""

    class Properties:
        total_memory = 1000

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    device = Device(enough=0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 960 if device.recomputed < 4 else 950)
    one = rehearsal()
    found = one.run(
        device.forward_backward, device.recompute_layers, lambda value: value, torch.device("cuda")
    )
    assert (found, device.tried) == (4, [0, 2, 4])


@pytest.mark.parametrize("others", [2**60, 0])
def test_processes_plan_alike(tiny_model, monkeypatch, others):
    """That with the least memory decides, or their weights would be stepped differently."""
    model = load_model(tiny_model, image_context_id=0, dtype=torch.bfloat16)
    set_trainable(model, freeze_backbone=True)
    tokens = np.array([20, 30, 40])
    data = SimpleNamespace(epoch_lengths=lambda: Lengths(tokens, tokens // 4, tokens * 0))
    run = SimpleNamespace(
        sharded=False, deepspeed=None, world_size=2, weight_precision="auto", processes_here=2,
        optim=OptimizerNames.ADAMW_TORCH, device=CPU, count_steps=lambda epoch_steps: epoch_steps,
    )  # fmt: skip
    args = SimpleNamespace(run=run, model=SimpleNamespace(grad_checkpoint="auto"))

    def gather(into: list, own: object) -> None:
        into[:] = [own, others if type(own) is int else own]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr("internvl_chat.train.preflight.dry_run.capacity", lambda device, processes: 2**60)
    sampler = StepSampler([3], step_records=3, planner=StepPlanner(1, tokens, tokens, 50))
    found = plan_memory(args, model, sampler, data)
    layers = len(model.language_model.get_decoder().layers)
    assert (found.precision, found.recomputed) == (("master", 0) if others else ("stochastic", layers))
    assert found.several


# ---- through the trainer


@pytest.fixture
def start(tiny_model, sample_data, tmp_path):
    """Train a few steps with adapters and dropout; returns the exit code and the folder."""

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


def without_rehearsal(monkeypatch) -> None:
    original = M3LLMTrainer.__init__

    def init(self, *args, **values) -> None:
        original(self, *args, **{**values, "rehearsal": None})

    monkeypatch.setattr(M3LLMTrainer, "__init__", init)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_rehearsal_leaves_no_trace(start, metrics, monkeypatch, capfd, bf16):
    """Not in weights, not in random numbers: losses with dropout are the same, bit for bit."""
    code, out = start("with", bf16=bf16)
    assert code == 0
    assert "largest pack:" in capfd.readouterr().err
    without_rehearsal(monkeypatch)
    code, other = start("without", bf16=bf16)
    assert code == 0
    assert "largest pack:" not in capfd.readouterr().err
    losses = [[row["loss"] for row in metrics(folder)] for folder in (out, other)]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (out, other)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("flags_of_packs", "packs"), [({}, 1), ({"packing": False}, 2)])
def test_a_pack_is_rehearsed_beside_the_gradients_of_another(start, monkeypatch, flags_of_packs, packs):
    """Where a step has several; nothing of them stays either."""
    seen = []
    original = M3LLMTrainer._forward_backward

    def forward_backward(trainer, model, share, weights, scale, synchronise=True):
        seen.append(len(share))
        assert len(weights) == len(share)
        assert all(p.grad is None for p in model.parameters())
        return original(trainer, model, share, weights, scale, synchronise)

    monkeypatch.setattr(M3LLMTrainer, "_forward_backward", forward_backward)
    assert start("out", **flags_of_packs)[0] == 0
    assert len(seen) == 5 and seen[0] == packs and set(seen[1:]) == {packs}


def test_dropout_decides_the_losses(start, metrics):
    """Or the test above would prove nothing."""
    losses = [[row["loss"] for row in metrics(start(f"s{p}", lora_dropout=p)[1])] for p in (0.3, 0.0)]
    # Adapters begin as nothing, so that the first loss is the same.
    assert losses[0][0] == losses[1][0] and losses[0][1:] != losses[1][1:]


class Scarce:
    """Memory that suffices for a pack if `enough` decoder layers are recomputed."""

    def __init__(self, monkeypatch, enough: int) -> None:
        self.tried: list[int] = []
        original = M3LLMTrainer._forward_backward

        def forward_backward(trainer, model, packs, weights, scale, synchronise=True):
            layers = trainer.accelerator.unwrap_model(trainer.model).language_model.get_decoder().layers
            recomputed = sum(getattr(layer, "gradient_checkpointing", False) for layer in layers)
            self.tried.append(recomputed)
            result = original(trainer, model, packs, weights, scale, synchronise)
            if recomputed < enough:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return result

        monkeypatch.setattr(M3LLMTrainer, "_forward_backward", forward_backward)


def test_a_run_for_which_memory_is_scarce_recomputes_and_ends_the_same(start, metrics, monkeypatch, capfd):
    code, plain = start("plain")
    assert code == 0
    scarce = Scarce(monkeypatch, enough=2)
    code, out = start("scarce")
    assert code == 0
    assert scarce.tried == [0, 1, 2] + [2] * 4
    error = capfd.readouterr().err
    assert "memory does not suffice: recomputing 1 decoder layers" in error
    assert "2 of 2 decoder layers recomputed" in error
    rows = [metrics(folder) for folder in (plain, out)]
    for one, other in zip(*rows, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("flag", "tried", "advised"), [("False", [0], True), ("True", [2], False), ("auto", [0, 1, 2], False)]
)
def test_a_run_that_does_not_fit_ends_before_its_first_step(start, monkeypatch, capfd, flag, tried, advised):
    scarce = Scarce(monkeypatch, enough=3)
    code, out = start("out", grad_checkpoint=flag)
    assert code == TrainingError.exit_code
    error = capfd.readouterr().err
    assert "does not fit into memory; what helps:" in error and "--max_packed_tokens" in error
    assert ("--grad_checkpoint True" in error) == advised
    assert "Traceback" not in error
    assert scarce.tried == tried
    assert not (out / "metrics.jsonl").exists()

"""FSDP2 and HSDP: distribution of the shards over the ranks, and offloading to host memory."""

import dataclasses

import pytest
import torch
from helpers import flags
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor

from internvl_chat.train import checks
from internvl_chat.train.arguments import parse_arguments
from internvl_chat.train.distributed.fsdp import FSDPStrategy
from internvl_chat.train.internvl_chat_finetune import main as train

CPU = torch.device("cpu")


class Blocks(nn.Module):
    """Model of two layers and a root weight."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.root = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x)) * self.root


def shards(num_shards, offload):
    """Return the layout, the rows of this rank's shard, the ranks of its replica, and the gradients.

    The gradients are those after each of two packs; None if they are not reduced yet.
    """
    torch.manual_seed(0)
    optimizer = lambda model: torch.optim.SGD(model.parameters())  # noqa: E731
    schedule = lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer)  # noqa: E731
    strategy = FSDPStrategy(Blocks(), optimizer, schedule, CPU, num_shards=num_shards, cpu_offload=offload)
    weight = strategy.model.blocks[0].weight
    assert isinstance(weight, DTensor)
    group, grads = torch.distributed.get_process_group_ranks(weight.device_mesh.get_group(-1)), []
    for last in (False, True):
        with strategy.gradient_sync(last):
            strategy.backward(strategy.wrapped(torch.ones(1, 8)).sum())
        grads.append(None if weight.grad is None else weight.grad.full_tensor())
    return strategy.name, weight.to_local().shape[0], group, grads


@pytest.mark.parametrize(
    ("num_shards", "offload", "name", "groups"),
    [(4, False, "fsdp", [[0, 1, 2, 3]] * 4), (2, True, "hsdp", [[0, 1], [0, 1], [2, 3], [2, 3]])],
)
def test_shards_of_four_ranks(num_shards, offload, name, groups):
    found = run_ranks(4, shards, num_shards, offload)
    assert [layout for layout, *_ in found] == [name] * 4
    assert [rows for _, rows, *_ in found] == [8 // num_shards] * 4
    assert [group for _, _, group, _ in found] == groups
    torch.manual_seed(0)
    model = Blocks()
    model(torch.ones(1, 8)).sum().backward()
    for *_, (first, second) in found:
        # With offload, the first pack's gradients are reduced, too, and leave the GPU.
        assert (first is not None) == offload
        torch.testing.assert_close(second, 2 * model.blocks[0].weight.grad)


def test_nodes_must_have_the_same_number_of_ranks(monkeypatch):
    needed = {"output_dir": "out", "meta_path": "meta.json", "model_name_or_path": "model"}
    run = parse_arguments(flags(**needed, parallel="hsdp")).run
    run = dataclasses.replace(run, world_size=6, local_world_size=2)
    for sizes, expected in (
        ([2, 2, 4, 4, 4, 4], "all nodes must have the same number of ranks, found 2, 4"),
        ([1] * 6, "with one rank per node"),
    ):
        monkeypatch.setattr(checks.distributed, "all_gather_object", lambda _, sizes=sizes: sizes)
        [problem] = checks.sharding_problems(run)
        assert problem.startswith(f"--parallel hsdp: {expected}")
    monkeypatch.setattr(checks.distributed, "all_gather_object", lambda _: [2] * 6)
    assert not list(checks.sharding_problems(run))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cpu_offload_on_a_gpu_gives_the_same_losses(tiny_model, sample_data, tmp_path, metrics):
    losses = {}
    for offload in (False, True):
        values = {"parallel": "fsdp", "cpu_offload": True} if offload else {}
        words = flags(
            model_name_or_path=tiny_model, meta_path=sample_data / "train.json", use_cpu=False, max_steps=3,
            per_device_train_batch_size=4, output_dir=tmp_path / str(offload), **values,
        )  # fmt: skip
        assert train(words) == 0
        losses[offload] = [row["loss"] for row in metrics(tmp_path / str(offload))]
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)

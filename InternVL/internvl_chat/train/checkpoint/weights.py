"""Collect the weights for a checkpoint: select the tensors to copy on each rank; gather them on rank 0."""

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from internvl_chat.model.io.adapter import adapter_weights
from internvl_chat.model.lora.injection import lora_layers
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.distributed.strategy import local_shard
from internvl_chat.utils import distributed

# Placements of FSDP2 and HSDP.
_PLACEMENTS = ((Shard(0),), (Replicate(), Shard(0)))


class WeightGatherer:
    """Collects the weights for each checkpoint; gathers FSDP2 shards on the CPU with gloo.

    With HSDP, the ranks of the first replica send their shards.

    Args:
        group: gloo group that is not used elsewhere while `gather` runs; None in a single-rank run.
    """

    def __init__(self, model: InternVLChatModel, group: dist.ProcessGroup | None) -> None:
        self._model, self._group, self._is_main = model, group, distributed.rank() == 0
        self._full: dict[str, Tensor] = {}
        self._unique: dict[str, Tensor] = {}
        self._first_name: dict[str, str] = {}
        self._trained: set[str] = set()
        self._has_frozen = False

    @property
    def nbytes(self) -> int:
        """Size in bytes of all weights selected by `prepare`, including the shards of other ranks."""
        return sum(weight.nbytes for weight in self._unique.values())

    def prepare(self) -> dict[str, Tensor]:
        """Select the weights to save; return the trainable tensors that this rank must copy.

        These are the rank's shards (with HSDP, only in the first replica) and, on rank 0, unsharded weights.
        """
        weights = dict(self._model.state_dict(keep_vars=True))
        if lora_layers(self._model):
            saved = adapter_weights(self._model, weights)
            weights = {name: weight for name, weight in weights.items() if name in saved}
        # Tied weights are copied once.
        first: dict[int, str] = {}
        self._first_name = {name: first.setdefault(id(weight), name) for name, weight in weights.items()}
        self._unique = {name: weights[name].detach() for name in first.values()}
        self._trained = {name for name in self._unique if weights[name].requires_grad}
        sharded = {name: weight for name, weight in self._unique.items() if isinstance(weight, DTensor)}
        if self._is_main:
            new = sharded.keys() - self._full.keys()
            self._full |= {name: torch.empty(sharded[name].shape, dtype=sharded[name].dtype) for name in new}
        return {
            name: local_shard(weight)
            for name, weight in self._unique.items()
            if name in self._trained
            and (self._is_main or (name in sharded and distributed.rank() < _num_shards(sharded[name])))
        }

    def gather(self, copies: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return all selected weights, keyed by name, on rank 0 and an empty dict on other ranks.

        Collective: call on all ranks. Frozen weights are gathered only by the first call.

        Args:
            copies: copies of the tensors that `prepare` returned.

        Raises:
            AgreedError: a shard is missing, or a weight is not sharded along dimension 0 only.
        """
        for name, weight in self._unique.items():
            if isinstance(weight, DTensor) and (name in self._trained or not self._has_frozen):
                self._gather_shards(name, weight, copies)
        self._has_frozen = True
        if not self._is_main:
            return {}
        weights = {**self._unique, **copies, **self._full}
        return {name: weights[first] for name, first in self._first_name.items()}

    def _gather_shards(self, name: str, weight: DTensor, copies: dict[str, Tensor]) -> None:
        error, shard = None, torch.empty(0)
        try:
            if weight.placements not in _PLACEMENTS:
                raise NotImplementedError(f"{name} has placements {weight.placements}; expected Shard(0)")
            if distributed.rank() < _num_shards(weight):
                shard = (copies[name] if name in self._trained else local_shard(weight)).cpu().contiguous()
        except Exception as failure:
            error = failure
        distributed.agree(error, group=self._group)
        if not self._is_main:
            if shard.numel():
                dist.send(shard, dst=0, group=self._group)
            return
        first, *others = self._full[name].split(-(-len(weight) // _num_shards(weight)))
        first.copy_(shard)
        for rank, part in enumerate(others, start=1):
            dist.recv(part, src=rank, group=self._group)


def _num_shards(weight: DTensor) -> int:
    """Return the number of ranks across which a weight is sharded: with HSDP, the ranks of one replica."""
    return weight.device_mesh.size(-1)

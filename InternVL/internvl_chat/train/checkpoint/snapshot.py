"""Copies of a run's tensors in host memory: what a checkpoint is made from while training goes on."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_Place = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


def copy_to_host(tree: Any, fixed: Iterable[Tensor] = ()) -> Any:
    """Return dictionaries, lists and tuples as they are, with all tensors in them copied to host memory.

    Tensors that share their memory, as tied weights do, are one tensor in the copy too. On a GPU the copies
    are complete when this returns.

    Args:
        tree: tensors, and what holds them; anything else in it is taken over.
        fixed: tensors that nobody changes; they stay where they are instead of being copied.
    """
    copies = {_place(tensor): tensor.detach() for tensor in fixed}

    def copy(tensor: Tensor) -> Tensor:
        place = _place(tensor)
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        return copies[place]

    return _map_tensors(copy, tree)


def bytes_to_copy(tree: Any, fixed: Iterable[Tensor] = ()) -> int:
    """Return the host memory that `copy_to_host` takes for the same arguments."""
    places = {_place(tensor): tensor.nbytes for tensor in _tensors(tree)}
    kept = {_place(tensor) for tensor in fixed}
    return sum(size for place, size in places.items() if place not in kept)


def _place(tensor: Tensor) -> _Place:
    """Return what two tensors have in common only if they are the same numbers in the same memory."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_map_tensors(function, value) for value in tree)
    return tree


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(value)

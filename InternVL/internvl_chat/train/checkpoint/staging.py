"""Buffers in host memory for copies of tensors, from which a checkpoint is written in the background."""

from collections.abc import Mapping

import torch
from torch import Tensor

from internvl_chat.utils import distributed
from internvl_chat.utils.hardware import available_host_memory
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Buffers are parts of blocks of up to this size: torch rounds each pinned allocation up to a power of two.
_BLOCK_BYTES = 2**32
_ALIGNMENT = 64
# Free memory required, relative to the size of the buffers; the margin is left for training.
_FREE_FACTOR = 1.2


class HostBuffers:
    """Host buffers, one per tensor name; reused by later saves if the shape and dtype are the same.

    Args:
        device: device of the tensors to copy. For a GPU, the buffers are pinned and the copies run on a
            separate stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self._warned = False

    def fit(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether the missing buffers fit in this rank's share of free memory; if not, warn once."""
        needed = _FREE_FACTOR * sum(tensor.nbytes for tensor in self._missing(tensors).values())
        free = available_host_memory() / distributed.local_world_size()
        if needed > free and not self._warned:
            self._warned = True
            logger.warning(
                "training pauses while checkpoints are written: copying the state needs %.1f GB of host "
                "memory, but only %.1f GB are free for this rank", needed / 1e9, free / 1e9,
            )  # fmt: skip
        return needed <= free

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to their buffers and return these; copies from a GPU are asynchronous."""
        self._allocate(self._missing(tensors))
        with self.stream():
            for name, tensor in tensors.items():
                self._buffers[name].copy_(tensor, non_blocking=True)
            if self._stream is not None:
                self._copied = torch.cuda.Event(blocking=True)
                self._copied.record()
        return {name: self._buffers[name] for name in tensors}

    def stream(self) -> torch.cuda.StreamContext:
        """Return a context manager that selects the copy stream; it has no effect on a CPU."""
        return torch.cuda.stream(self._stream)

    def wait_for_training(self) -> None:
        """Make the copy stream wait for the work that the current stream has queued so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def block_current_stream(self) -> None:
        """Make the current GPU stream wait for the copies, without blocking the CPU."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def synchronize(self) -> None:
        """Wait until the copies are complete."""
        if self._copied is not None:
            self._copied.synchronize()

    def _missing(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        buffers = self._buffers
        return {
            name: tensor
            for name, tensor in tensors.items()
            if name not in buffers
            or (buffers[name].shape, buffers[name].dtype) != (tensor.shape, tensor.dtype)
        }

    def _allocate(self, tensors: Mapping[str, Tensor]) -> None:
        """Allocate a buffer for each tensor, in shared blocks."""
        offsets: dict[str, tuple[int, int]] = {}
        sizes: list[int] = [0]
        for name, tensor in tensors.items():
            size = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            if sizes[-1] and sizes[-1] + size > _BLOCK_BYTES:
                sizes.append(0)
            offsets[name] = len(sizes) - 1, sizes[-1]
            sizes[-1] += size
        blocks = [self._block(size) for size in sizes]
        for name, (number, offset) in offsets.items():
            tensor = tensors[name]
            flat = blocks[number][offset : offset + tensor.nbytes]
            self._buffers[name] = flat.view(tensor.dtype).view(tensor.shape)

    def _block(self, size: int) -> Tensor:
        if self._stream is not None:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                logger.warning(
                    "cannot pin memory (%s); checkpoints are copied through pageable memory", error
                )
        return torch.empty(size, dtype=torch.uint8)

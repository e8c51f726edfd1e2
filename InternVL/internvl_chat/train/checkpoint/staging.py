"""Copies of tensors in host memory that is reused from checkpoint to checkpoint, pinned for a GPU."""

from collections.abc import Mapping

import torch
from torch import Tensor

from internvl_chat.utils import distributed
from internvl_chat.utils.hardware import available_host_memory
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Buffers share blocks of this size: torch rounds each pinned block up to a power of two.
_BLOCK_BYTES = 2**32
_ALIGNMENT = 64
# Buffers are made only if this many times their size is free: training may need more memory, too.
_FREE_FACTOR = 1.2


class HostBuffers:
    """One host buffer for each name, kept for the next copy of the same shape and dtype.

    Args:
        device: of the tensors that are copied. On a GPU copies run on a stream of their own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self._warned = False

    def have_room(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether the buffers that are missing fit into this rank's share of the free memory."""
        needed = _FREE_FACTOR * sum(tensor.nbytes for tensor in self._missing(tensors).values())
        free = available_host_memory() / distributed.local_world_size()
        if needed > free and not self._warned:
            self._warned = True
            logger.warning(
                "training waits while checkpoints are written: copying the state would take %.1f GB of host "
                "memory, and %.1f GB are free for this rank", needed / 1e9, free / 1e9,
            )  # fmt: skip
        return needed <= free

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Start to copy tensors to the host; on a CPU they are copied on return."""
        self._allocate(self._missing(tensors))
        with self.stream():
            for name, tensor in tensors.items():
                self._buffers[name].copy_(tensor, non_blocking=True)
            if self._stream is not None:
                self._copied = torch.cuda.Event(blocking=True)
                self._copied.record()
        return {name: self._buffers[name] for name in tensors}

    def stream(self) -> torch.cuda.StreamContext:
        """Return the context that runs GPU work on the stream of the copies; does nothing on a CPU."""
        return torch.cuda.stream(self._stream)

    def follow_training(self) -> None:
        """Let later work on the stream run after the GPU work that training has launched so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def block_device(self) -> None:
        """Let later GPU work, such as the optimizer's, wait for the copies; this thread goes on."""
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
        """Make a buffer for each tensor."""
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
                logger.warning("checkpoints are copied through pageable memory, slowly: %s", error)
        return torch.empty(size, dtype=torch.uint8)

"""Decoding attention over a padded KV cache.

Answers of similar length share a bank: key and value tensors with one slot per answer. All slots of a bank
have the same capacity.

An answer is bitwise independent of its slot and of the other answers.

In a decoding step on a GPU, each layer makes one SDPA call per bank, with a mask that hides the padding:

- The mask makes SDPA use the memory-efficient kernel. The flash kernel does not support masks, and its
  results depend on the number of slots, which determines how it splits the keys.
- The memory-efficient kernel processes each slot and key head in blocks of 64 or 128 keys. The number of keys
  is padded to a multiple of `_BLOCK`, and thus of both sizes, so all blocks are full.
- A fully masked key block has no effect, because its weights are exp(-inf) = 0. Unused positions are filled
  with zeros, because 0 times NaN or infinity would be NaN.

On a CPU, each layer makes one SDPA call per answer, which is not slower than a joint call. In a joint call,
the last bits of a product could depend on the thread that computes an answer, because the threads' buffers
are aligned differently in memory.

Shapes: W rows of a step, S slots, H query heads, K key/value heads, G = H / K, L tokens, D features per head.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from internvl_chat.model.attention import pinned_sdpa, varlen_attention

_CACHED = "cached"
_BLOCK = 512
_ONE_CALL_PER_ANSWER = ("cpu",)


class _Bank:
    """KV cache for a group of answers, one slot per answer; all slots have the same capacity.

    Attributes:
        capacity: maximum number of tokens per slot.
        slots: number of allocated slots; a layer's tensors grow to this size at its next `write`.
        layers: keys and values of each layer, (S, K, capacity, D).
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.slots = capacity, 0
        self.used: set[int] = set()
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def write(self, slot: int, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store a prompt's keys and values, each (K, L, D), in a slot, and zero the rest of the slot."""
        old = self.layers.get(layer)
        missing = self.slots - (len(old[0]) if old else 0)
        if missing:
            keys, values = (x.new_zeros(missing, len(x), self.capacity, x.shape[2]) for x in (key, value))
            self.layers[layer] = (
                (torch.cat((old[0], keys)), torch.cat((old[1], values))) if old else (keys, values)
            )
        for stored, x in zip(self.layers[layer], (key, value), strict=True):
            stored[slot, :, : x.shape[1]] = x
            stored[slot, :, x.shape[1] :] = 0


@dataclass
class Slot:
    """Part of the cache that stores one answer.

    Attributes:
        length: number of stored tokens; updated by the caller after all layers have run.
    """

    bank: _Bank
    index: int
    length: int = 0

    def release(self) -> None:
        """Mark the slot as free for a new answer."""
        self.bank.used.remove(self.index)


class KVCache:
    """Allocates slots up to a memory limit.

    Args:
        rows: maximum number of slots in use.
        max_tokens: maximum number of tokens to allocate memory for, including free slots. An answer that
            needs more is accepted while the cache is empty.
    """

    def __init__(self, rows: int, max_tokens: int) -> None:
        self.rows, self.max_tokens = rows, max_tokens
        self.banks: list[_Bank] = []

    @property
    def tokens(self) -> int:
        """Number of tokens for which memory is allocated."""
        return sum(bank.capacity * bank.slots for bank in self.banks)

    def reserve(self, tokens: int) -> Slot | None:
        """Return a slot for a prompt and answer of up to `tokens` tokens; None if there is no memory left."""
        blocks = -(-tokens // _BLOCK)
        capacity = _BLOCK << (blocks - 1).bit_length()  # powers of two keep the number of banks small
        bank = next((b for b in self.banks if b.capacity == capacity), None) or _Bank(capacity)
        if len(bank.used) == bank.slots:
            self.banks = [b for b in self.banks if b.used]
            room = (self.max_tokens - self.tokens) // capacity
            if room < 1 and self.banks:
                return None
            bank.slots += max(1, min(bank.slots, room, self.rows - bank.slots))
            self.banks = [*(b for b in self.banks if b is not bank), bank]
        index = min(set(range(bank.slots)) - bank.used)
        bank.used.add(index)
        return Slot(bank, index)


class Prefill:
    """Forward pass over the tokens of one prompt."""

    def __init__(self, slot: Slot) -> None:
        self.slots = [slot]


class DecodeStep:
    """Forward pass over the newest token of each answer.

    Args:
        rows: slot of each row; None for an empty row, whose attention output is 0.
    """

    def __init__(self, rows: Sequence[Slot | None]) -> None:
        self.slots = [slot for slot in rows if slot is not None]
        row_of = {id(slot): row for row, slot in enumerate(rows)}
        banks = {id(slot.bank): slot.bank for slot in self.slots}
        self.parts = [
            _BankStep(bank, {row_of[id(slot)]: slot for slot in self.slots if slot.bank is bank})
            for bank in banks.values()
        ]


class _BankStep:
    """Rows of a decoding step whose slots are in the same bank."""

    def __init__(self, bank: _Bank, rows: dict[int, Slot]) -> None:
        self.bank, self.rows = bank, rows
        self._indices: dict[torch.device, _Indices] = {}
        self._masks: dict[tuple[torch.device, torch.dtype, int | None], torch.Tensor] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
        out: torch.Tensor,
    ) -> None:
        """Store the new keys and values of the bank's rows, compute attention and write it to `out`.

        Args:
            query: (W, H, 1, D).
            key: (W, K, 1, D).
            value: (W, K, 1, D).
            window: number of tokens that a token attends to, including itself; None for all.
            out: (W, H, 1, D).
        """
        heads, device = key.shape[1], query.device
        if device not in self._indices:
            self._indices[device] = _Indices.of(self.rows, heads, self.bank.capacity, device)
        indices = self._indices[device]
        stored = self.bank.layers[layer]
        for cached, new in zip(stored, (key, value), strict=True):
            newest = new.flatten(0, 2).index_select(0, indices.sources)
            cached.view(-1, cached.shape[3]).index_copy_(0, indices.targets, newest)
        # The G query heads of a key head are passed as G queries, which avoids repeating the keys.
        if device.type in _ONE_CALL_PER_ANSWER:
            for row, slot in self.rows.items():
                end = slot.length + 1
                seen = slice(0 if window is None else max(0, end - window), end)
                keys, values = (cached[slot.index : slot.index + 1, :, seen] for cached in stored)
                queries = query[row].view(1, heads, -1, query.shape[3])  # (1, K, G, D)
                attended = F.scaled_dot_product_attention(queries, keys, values, scale=scaling)
                out[row] = attended.reshape(out.shape[1:])
            return
        mask = self._mask(device, query.dtype, window)
        keys, values = (cached[: len(mask), :, : mask.shape[3]] for cached in stored)
        queries = query.index_select(0, indices.row_of_slot)
        queries = queries.view(len(mask), heads, -1, query.shape[3])  # (S, K, G, D)
        with pinned_sdpa(device):
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
        attended = attended.reshape(len(mask), *out.shape[1:])
        out.index_copy_(0, indices.rows, attended.index_select(0, indices.slots))

    def _mask(self, device: torch.device, dtype: torch.dtype, window: int | None) -> torch.Tensor:
        """Return the additive mask, (S, 1, 1, L): 0 for visible tokens, -inf for hidden ones."""
        key = (device, dtype, window)
        if key not in self._masks:
            length = -(-(1 + max(slot.length for slot in self.rows.values())) // _BLOCK) * _BLOCK
            distance = self._indices[device].newest[:, None] - torch.arange(length, device=device)
            hidden = distance < 0
            if window is not None:
                hidden |= distance >= window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
            self._masks[key] = mask[:, None, None]
        return self._masks[key]


class _Indices(NamedTuple):
    """Index tensors that map n rows of a decoding step to the slots of a bank, and slots to rows.

    S is the number of slots up to the last one in use.

    Attributes:
        rows: (n,) index of each row in the step.
        slots: (n,) slot of each row.
        row_of_slot: (S,) row of each slot; 0 for a free slot.
        newest: (S,) position of the newest token; -1 for a free slot.
        sources: (n * K,) index of each row's key heads in the flattened keys of the step.
        targets: (n * K,) index at which each of these key heads is stored in the flattened bank.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    row_of_slot: torch.Tensor
    newest: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def of(cls, rows: dict[int, Slot], heads: int, capacity: int, device: torch.device) -> "_Indices":
        """Build the index tensors on a device; `heads` is K."""
        slots = [slot.index for slot in rows.values()]
        row_of_slot, newest = [0] * (1 + max(slots)), [-1] * (1 + max(slots))
        for row, slot in rows.items():
            row_of_slot[slot.index], newest[slot.index] = row, slot.length
        sources = [row * heads + head for row in rows for head in range(heads)]
        targets = [
            (slot.index * heads + head) * capacity + slot.length
            for slot in rows.values()
            for head in range(heads)
        ]
        lists = (list(rows), slots, row_of_slot, newest, sources, targets)
        joined = torch.tensor([number for numbers in lists for number in numbers], device=device)  # one copy
        return cls(*joined.split([len(numbers) for numbers in lists]))


@contextlib.contextmanager
def cached_attention(language_model: PreTrainedModel) -> Iterator[None]:
    """Use cached attention in a language model while the context is active.

    The forward pass then requires the argument `kv_pass` (see `_attend`).
    """
    config = language_model.config
    before = config._attn_implementation
    config._attn_implementation = _CACHED
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kv_pass: Prefill | DecodeStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Compute attention over the KV cache, in transformers' calling convention.

    Args:
        query: (1, H, L, D) in a prefill, (W, H, 1, D) in a decoding step.
        key: (1, K, L, D) or (W, K, 1, D).
        value: (1, K, L, D) or (W, K, 1, D).
        kv_pass: prefill or decoding step; determines the slots to read and write.
        scaling: scaling factor of the attention scores.
        sliding_window: number of tokens that a token attends to, including itself.
        options: additional arguments for `varlen_attention`.

    Returns:
        (1, L, H, D) or (W, 1, H, D), and None in place of the attention weights.
    """
    layer = cast(int, module.layer_idx)
    if isinstance(kv_pass, Prefill):
        [slot] = kv_pass.slots
        slot.bank.write(slot.index, layer, key[0], value[0])
        return varlen_attention(
            module, query, key, value, None, scaling=scaling, sliding_window=sliding_window, **options
        )
    out = torch.zeros_like(query)
    for part in kv_pass.parts:
        part.attend(layer, query, key, value, scaling, sliding_window, out)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_CACHED, _attend)

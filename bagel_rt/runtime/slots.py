"""The KV cache: one buffer per layer for all contexts, handed out in contiguous slot ranges.

A context owns no memory of its own: it is a prefix of a :class:`SlotRange`, an append-only slot range. Clones share the
range; the longest one may append in place, because the others never look past their own length. A context is copied
only where it outgrows its range, or where a shorter clone appends; snapshots for guidance cost nothing.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

GROWTH = 4096  # minimum slots by which the buffers grow on CUDA, where growing invalidates captured graphs


class KVCache:
    """Keys (after QK-norm and RoPE) and values of every layer, [layers, slots, kv_heads, head_dim] each.

    The buffers grow when no free range is long enough. Slot numbers stay valid; tensors taken before do not.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        slots: int = 0,
    ) -> None:
        self._shape = (kv_heads, head_dim)
        self._free: list[tuple[int, int]] = []  # disjoint (start, length), sorted, never adjacent
        self._returned: list[tuple[int, int]] = []  # released since; a finalizer may append at any moment
        self._tracking: weakref.WeakSet[SlotRange] | None = None  # collects the ranges that are allocated
        self.moved: list[Callable[[], None]] = []  # called whenever the buffers are replaced
        self.slots = 0
        self.k = torch.empty(layers, 0, *self._shape, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self._replace(self.k, self.v)
        self._grow(slots)

    @property
    def free_slots(self) -> int:
        """Slots that no range holds."""
        self._merge_returned()
        return sum(length for _, length in self._free)

    def allocate(self, length: int) -> int:
        """Take ``length`` contiguous free slots; returns the first. The cache grows by at least a half if it must."""
        self._merge_returned()
        for index, (start, room) in enumerate(self._free):
            if room >= length:
                if room == length:
                    del self._free[index]
                else:
                    self._free[index] = (start + length, room - length)
                return start
        at_end = self._free[-1][1] if self._free and sum(self._free[-1]) == self.slots else 0
        self._grow(max(length - at_end, self.slots // 2, GROWTH * self.k.is_cuda))
        return self.allocate(length)

    def release(self, start: int, length: int) -> None:
        """Free a range. Safe to call from a finalizer: the next allocation merges it."""
        self._returned.append((start, length))

    @contextmanager
    def track(self, ranges: "weakref.WeakSet[SlotRange]") -> Iterator[None]:
        """Track allocations made inside this block. An inner block takes over from the one around it."""
        before, self._tracking = self._tracking, ranges
        try:
            yield
        finally:
            self._tracking = before

    def trim(self) -> None:
        """Free the buffers if no range holds a slot."""
        if self.free_slots == self.slots > 0:
            self._free, self.slots = [], 0
            self._replace(*(buffer.new_empty(buffer.shape[0], 0, *self._shape) for buffer in (self.k, self.v)))

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy ``length`` slots of every layer."""
        for buffer in (self.k, self.v):
            buffer[:, target : target + length] = buffer[:, source : source + length]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(k, v) of one layer, [slots, kv_heads, head_dim] each."""
        return self._layers[index]

    def _merge_returned(self) -> None:
        if not self._returned:
            return
        ranges = self._free
        while self._returned:
            ranges.append(self._returned.pop())
        self._free = []
        for start, length in sorted(ranges):
            if self._free and sum(self._free[-1]) == start:
                self._free[-1] = (self._free[-1][0], self._free[-1][1] + length)
            else:
                self._free.append((start, length))

    def _grow(self, length: int) -> None:
        if length > 0:
            old = (self.k, self.v)
            shape = (self.k.shape[0], self.slots + length, *self._shape)
            grown = [buffer.new_empty(shape) for buffer in old]  # may run out of memory: nothing has changed so far
            for new, buffer in zip(grown, old, strict=True):
                new[:, : self.slots] = buffer
            self.slots += length
            self._returned.append((self.slots - length, length))
            self._merge_returned()
            self._replace(*grown)

    def _replace(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k, v
        self._layers = list(zip(k.unbind(0), v.unbind(0), strict=True))
        for call in self.moved:
            call()


class Holder(Protocol):
    """A context: it uses the first ``length`` slots of a range."""

    length: int


class SlotRange:
    """An append-only slot range that contexts share as prefixes.

    Its slots return to the cache when it is collected or when ``release()`` is called, after which it must not be used.
    """

    def __init__(self, cache: KVCache, capacity: int) -> None:
        self.start = cache.allocate(capacity)
        self.capacity = capacity
        self.holders: weakref.WeakSet[Holder] = weakref.WeakSet()  # the contexts in this range
        self.release = weakref.finalize(self, cache.release, self.start, capacity)  # runs once, now or at the end
        if cache._tracking is not None:
            cache._tracking.add(self)

    def can_extend(self, length: int, extra: int) -> bool:
        """Whether a context of ``length`` can write ``extra`` slots in place: they exist and no context is longer."""
        return length + extra <= self.capacity and all(holder.length <= length for holder in self.holders)

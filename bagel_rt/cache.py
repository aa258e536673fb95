"""The KV cache: one buffer per layer for all contexts, handed out in contiguous slot ranges.

A context owns no memory of its own: it is a prefix of a :class:`Storage`, an append-only slot range. Clones share the
storage; the longest one may append in place, because the others never look past their own length. Only a shorter clone
that appends gets a copy of its prefix, so snapshots for guidance cost nothing.
"""

import weakref

import torch


class KVCache:
    """Keys (after QK-norm and RoPE) and values of every layer, [layers, slots, kv_heads, head_dim] each.

    The buffers grow when no free range is long enough; slot numbers stay valid, tensors held from before do not.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device, slots: int = 0):
        self._shape = (kv_heads, head_dim)
        self._free: list[tuple[int, int]] = []  # disjoint (start, length), sorted, never adjacent
        self.slots = 0
        self.k = torch.empty(layers, 0, *self._shape, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self._grow(slots)

    @property
    def free_slots(self) -> int:
        """Slots that no storage holds."""
        return sum(length for _, length in self._free)

    def allocate(self, length: int) -> int:
        """First slot of a range of ``length`` free slots; the cache grows when there is none."""
        for index, (start, room) in enumerate(self._free):
            if room >= length:
                if room == length:
                    del self._free[index]
                else:
                    self._free[index] = (start + length, room - length)
                return start
        at_end = self._free[-1][1] if self._free and sum(self._free[-1]) == self.slots else 0
        self._grow(length - at_end)
        return self.allocate(length)

    def release(self, start: int, length: int) -> None:
        """Give a range back."""
        self._free.append((start, length))
        merged = []
        for begin, room in sorted(self._free):
            if merged and sum(merged[-1]) == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            elif room:
                merged.append((begin, room))
        self._free = merged

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy ``length`` slots of every layer."""
        for buffer in (self.k, self.v):
            buffer[:, target : target + length] = buffer[:, source : source + length]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(k, v) of one layer, [slots, kv_heads, head_dim] each."""
        return self._layers[index]

    def _grow(self, length: int) -> None:
        if length > 0:
            for name in ("k", "v"):
                old = getattr(self, name)
                new = old.new_empty(old.shape[0], self.slots + length, *self._shape)
                new[:, : self.slots] = old
                setattr(self, name, new)
            self.slots += length
            self.release(self.slots - length, length)
        self._layers = list(zip(self.k.unbind(0), self.v.unbind(0), strict=True))


class Storage:
    """An append-only slot range that contexts share as prefixes. Its slots return to the cache when it is collected."""

    def __init__(self, cache: KVCache, capacity: int):
        self.start = cache.allocate(capacity)
        self.capacity = capacity
        self.holders: weakref.WeakSet = weakref.WeakSet()  # contexts (anything with a ``length``) living here
        weakref.finalize(self, cache.release, self.start, capacity)

    def can_extend(self, length: int, extra: int) -> bool:
        """Whether a holder of that length may write ``extra`` more slots in place: room, and nobody lives there."""
        return length + extra <= self.capacity and all(holder.length <= length for holder in self.holders)

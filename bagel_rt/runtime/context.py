"""Contexts: sequences of texts and images in the KV cache, and the packed forward that extends them."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from bagel_rt.runtime.batch import ForwardBatch
from bagel_rt.runtime.interface import Model
from bagel_rt.runtime.plan import Plan, Segment, build_plan
from bagel_rt.runtime.slots import KVCache, SlotRange

MAX_ROWS = 1 << 15  # rows per packed forward if the work can be split: more rows need memory and add no speed


@dataclass(frozen=True, eq=False)
class ContentRows:
    """The n rows that a content appends to a context, in order.

    Attributes:
        gen: bool [n], which rows use the generation expert.
        positions: int64 [n], RoPE positions.
        causal: row i sees the rows up to i; otherwise every row sees all n. Both see the whole context.
        advance: number of RoPE positions by which the context advances.
        recomputed: bool [n], the rows that each denoising step embeds again.
    """

    gen: np.ndarray
    positions: np.ndarray
    causal: bool
    advance: int
    recomputed: np.ndarray

    def segment(self, key_start: int, visible: int, write: int) -> Segment:
        """The planner's segment of these rows (see ``bagel_rt.runtime.plan``)."""
        return Segment("causal" if self.causal else "full", self.gen, key_start, visible, write)


class Content(Protocol):
    """An input of a model, such as tokens or an image. Hashable; equal contents have equal keys and values."""

    def rows(self, position: int) -> ContentRows:
        """The rows to append to a context whose next RoPE position is ``position``."""


@dataclass(frozen=True)
class DecodedText:
    """Generated tokens that stay in a context, in the order in which they were fed."""

    ids: tuple[int, ...]


class Context:
    """A sequence of contents: a prefix of a slot range, the next RoPE position, and the contents themselves.

    Attributes:
        length: tokens in the KV cache.
        position: RoPE position of the next token.
        history: the contents, in order. Two contexts of equal history hold equal keys and values.
    """

    def __init__(self, cache: KVCache, capacity: int = 0) -> None:
        """An empty context. The first content allocates at least ``capacity`` slots."""
        self.cache = cache
        self.capacity = capacity
        self.range: SlotRange | None = None
        self.length = 0
        self.position = 0
        self.history: tuple[Content | DecodedText, ...] = ()

    @property
    def key_start(self) -> int:
        """Slot of the first token."""
        return self.range.start if self.range else 0

    def clone(self) -> "Context":
        """An independent context that shares the slots."""
        twin = Context(self.cache)
        twin.length, twin.position, twin.history = self.length, self.position, self.history
        if self.range:
            twin._attach(self.range)
        return twin

    def same_as(self, other: "Context") -> bool:
        """Whether both have the same contents; images count as the same only if they are the same encoding."""
        return self.history == other.history and self.position == other.position

    def fits(self, extra: int) -> bool:
        """Whether ``extra`` tokens can be appended without moving the context."""
        return self.range is not None and self.range.can_extend(self.length, extra)

    def extend(self, extra: int) -> int:
        """Append ``extra`` slots and return the first. Copies the context if it cannot grow in place."""
        if not self.fits(extra):
            moved = SlotRange(self.cache, max(self.length + extra, self.capacity, 1))
            if self.range:
                self.cache.copy(self.range.start, moved.start, self.length)
            self._attach(moved)
        self.length += extra
        return self.key_start + self.length - extra

    def borrow(self, extra: int) -> "Context":
        """A holder of ``extra`` slots for tokens that see this context but never become part of it.

        The slots directly follow the context if those are free, otherwise they are elsewhere. They are the last slots
        of the holder and are freed when it is dropped.
        """
        holder = self.clone() if self.fits(extra) else Context(self.cache)
        holder.extend(extra)
        return holder

    def _attach(self, slots: SlotRange) -> None:
        if self.range:
            self.range.holders.discard(self)
        self.range = slots
        slots.holders.add(self)


class Prefill:
    """Collects appends to any contexts and runs them as one packed forward.

    Contexts advance at once, so that they can be cloned between appends; their keys and values are valid after
    :meth:`run`. Use it under ``torch.inference_mode()``.
    """

    def __init__(self, model: Model, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self._contents: list[Content] = []
        self._segments: list[Segment] = []
        self._positions: list[np.ndarray] = []
        self._ranges: list[SlotRange | None] = []  # keeps the slots of pending segments allocated

    def append(self, context: Context, content: Content) -> None:
        """Append a content to a context. ValueError if it has no rows."""
        rows = content.rows(context.position)
        count = len(rows.gen)
        if not count:
            raise ValueError(f"a content must have rows, got {content!r}. Frame it with its start and end token.")
        pending = sum(len(segment.gen) for segment in self._segments)
        if (context.length and not context.fits(count)) or pending + count > MAX_ROWS:
            self.run()  # moving a context copies its keys, so they must be computed first; also bounds memory
        visible = context.length
        write = context.extend(count)
        self._segments.append(rows.segment(context.key_start, visible, write))
        self._positions.append(rows.positions)
        self._contents.append(content)
        self._ranges.append(context.range)
        context.position += rows.advance
        context.history += (content,)

    def run(self) -> tuple[torch.Tensor, Plan] | None:
        """Compute the pending contents.

        Returns:
            Hidden states [T, H] before the final norm, in the plan's packed order, and the plan; None if nothing was
            pending.
        """
        if not self._segments:
            return None
        model, plan, contents = self.model, build_plan(self._segments), self._contents
        batch = ForwardBatch.from_plan(plan, np.concatenate(self._positions), model.rope)
        self._contents, self._segments, self._positions = [], [], []
        hidden = model.embed(contents)[torch.from_numpy(plan.order).to(model.device)]
        hidden = model.transformer.forward(hidden, batch, self.cache)
        self._ranges = []
        return hidden, plan

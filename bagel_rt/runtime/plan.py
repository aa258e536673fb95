"""The plan of one packed forward: the order of the rows, their cache slots, and the keys that each row sees.

A forward packs *segments* (runs of tokens of one kind, from any number of contexts) expert-major: rows [0, G) belong
to the generation expert, rows [G, T) to the understanding expert, each part in segment order. Keys live in cache
slots; a context occupies the slots from its ``key_start`` on. A segment is stored directly *behind* the keys that it
sees (write == key_start + visible) or *apart* from them, anywhere else. The generalized causal mask (semantics: Deng et
al. 2025, arXiv:2505.14683) then needs two spans per row: a *prefix* [start, start + limit), of which each row has its
own limit, and an *own* span [own_start, own_end), which all rows of the segment see. Segment of n rows, row i:

    mode    stored  start      limit            own span                         for
    causal  behind  key_start  visible + i + 1  -                                text
    full    behind  key_start  visible + n      -                                images
    full    apart   key_start  visible          [write, write + n)               latents being denoised
    causal  apart   write      i + 1            [key_start, key_start + visible) the same, of causal models

The last line swaps the roles: the segment itself is the prefix with a limit per row, and every row sees the whole
context.

Attention works on *query blocks*: at most ``block_q`` packed rows that share an expert, a prefix start and an own
span. A plan consists of numpy arrays, built on the host. Two implementations build the same plan bit for bit:
:func:`plan_reference` (numpy) and ``bagel_rt._C`` (C++, optional, about forty times faster). :func:`build_plan` uses
the extension if it is installed; ``BAGEL_RT_EXTENSION=0`` in the environment forces numpy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import NamedTuple

import numpy as np

from bagel_rt.kernels.attention_tiles import MAX_BLOCK_ROWS
from bagel_rt.kernels.extension import EXTENSION, EXTENSION_ERROR  # noqa: F401

MODES = ("causal", "full")
MAX_SLOTS = 2**31 - 1
"""Slots and key counts are int32 on the device."""


class Segment(NamedTuple):
    """A run of n tokens of one kind, in one context.

    Attributes:
        mode: one of :data:`MODES`.
        gen: bool [n], which rows use the generation expert.
        key_start: first slot of the context.
        visible: number of the context's keys that the segment sees.
        write: slot of the first row's key and value.
    """

    mode: str
    gen: np.ndarray
    key_start: int
    visible: int
    write: int


@dataclass(frozen=True, eq=False)
class Plan:
    """One packed forward of T rows, built by :func:`build_plan`.

    Attributes:
        G: number of generation rows.
        order: int64 [T], packed row -> row in segment order.
        limits: int32 [T], number of keys of the prefix that each packed row sees.
        slots: int64 [T], the cache slot that each packed row's key and value are written to.
        blocks: int32 [n, 7], the query blocks. Columns: row_start, row_end (packed rows); key_start (slot); full_end,
            part_end (keys counted from key_start: those below full_end are visible to every row, those in
            [full_end, part_end) to the rows with a larger limit, the rest to none); own_start, own_end (slots that
            every row sees as well; both 0 if there are none). Blocks cover [0, T) in order, each row once, and never
            cross G.
    """

    G: int
    order: np.ndarray
    limits: np.ndarray
    slots: np.ndarray
    blocks: np.ndarray

    def __eq__(self, other: object) -> bool:
        """Same rows, same blocks."""
        if not isinstance(other, Plan):
            return NotImplemented
        return all(np.array_equal(value, getattr(other, name)) for name, value in vars(self).items())


def _checked(segments: Sequence[Segment], block_q: int) -> list[Segment]:
    """Check segments and convert their numbers to int. Raises as :func:`build_plan` does."""
    if not 1 <= index(block_q) <= MAX_BLOCK_ROWS:
        raise ValueError(f"block_q must be from 1 to {MAX_BLOCK_ROWS}, got {block_q}.")
    checked = []
    for number, (mode, gen, *numbers) in enumerate(segments):
        if mode not in MODES:
            raise ValueError(f"mode of segment {number} must be {' or '.join(MODES)}, got {mode!r}.")
        if not isinstance(gen, np.ndarray) or gen.dtype != bool or gen.ndim != 1:
            raise ValueError(f"gen of segment {number} must be a one-dimensional numpy array of bool, got {gen!r}.")
        if not gen.size:
            raise ValueError(f"segment {number} must have rows, got none. Leave it out.")
        key_start, visible, write = map(index, numbers)
        place = f"key_start={key_start}, visible={visible}, write={write}"
        if min(key_start, visible, write) < 0:
            raise ValueError(f"the numbers of segment {number} must not be negative, got {place}.")
        if max(key_start + visible, write) + gen.size > MAX_SLOTS:
            raise ValueError(f"segment {number} must end by slot {MAX_SLOTS}, got {place} with {gen.size} rows.")
        checked.append(Segment(mode, gen, key_start, visible, write))
    ranges = sorted((segment.write, segment.write + segment.gen.size, i) for i, segment in enumerate(checked))
    for (start, end, first), (next_start, next_end, second) in pairwise(ranges):
        if next_start < end:
            raise ValueError(
                f"segments must write disjoint slots, got [{start}, {end}) for segment {first} and "
                f"[{next_start}, {next_end}) for segment {second}."
            )
    return checked


def _table_row(segment: Segment) -> tuple[int, bool, int, int, int, int, int, int]:
    """(rows, causal, keys of the prefix before its own, limit of a row that is not causal, write, start, own span)."""
    mode, gen, key_start, visible, write = segment
    n, causal, apart = gen.size, mode == "causal", write != key_start + visible
    if apart and causal:
        own = (key_start, key_start + visible) if visible else (0, 0)
        return n, causal, 0, 0, write, write, *own
    own = (write, write + n) if apart else (0, 0)
    return n, causal, visible, visible if apart else visible + n, write, key_start, *own


def plan_reference(segments: Sequence[Segment], block_q: int = 128) -> Plan:
    """:func:`build_plan` in numpy, with or without the extension."""
    checked = _checked(segments, block_q)
    table = np.array([_table_row(segment) for segment in checked], np.int64).reshape(-1, 8)
    sizes = table[:, 0]
    row = np.arange(sizes.sum())
    i = row - np.repeat(np.cumsum(sizes) - sizes, sizes)  # row within its segment
    _, causal, seen, last_limit, write, *span_columns = np.repeat(table, sizes, axis=0).T
    gen = np.concatenate([segment.gen for segment in checked] or [np.zeros(0, bool)])

    G = int(np.count_nonzero(gen))
    order = np.argsort(~gen, kind="stable")
    limits = np.where(causal, seen + i + 1, last_limit)[order].astype(np.int32)
    spans = np.stack(span_columns, axis=1)[order]

    begins_run = np.ones(len(row), bool)
    begins_run[1:] = (spans[1:] != spans[:-1]).any(axis=1)
    begins_run[G : G + 1] = True
    run_start = np.maximum.accumulate(np.where(begins_run, row, 0))
    starts = np.flatnonzero((row - run_start) % block_q == 0)
    key_start, own_start, own_end = spans[starts].T
    full_end, part_end = np.minimum.reduceat(limits, starts), np.maximum.reduceat(limits, starts)
    ends = np.append(starts, len(row))[1:]
    blocks = np.stack([starts, ends, key_start, full_end, part_end, own_start, own_end], axis=1).astype(np.int32)
    return Plan(G, order, limits, (write + i)[order], blocks)


def build_plan(segments: Sequence[Segment], block_q: int = 128) -> Plan:
    """Plan one packed forward.

    Consecutive packed rows of one expert with the same prefix start and own span form a run (segments of one context
    that follow each other share it); a run is cut into blocks every ``block_q`` rows from its first row.

    Args:
        segments: in the order their rows are given; may be empty.
        block_q: maximum rows of a query block, from 1 to 128, the limit of the attention kernels.

    Raises:
        ValueError: block_q out of range, an unknown mode, gen not bool [n], no rows, a negative number, a slot beyond
            int32, or overlapping writes; the message names the segment by its position.
    """
    if EXTENSION is None:
        return plan_reference(segments, block_q)
    return Plan(*EXTENSION.build_plan(_checked(segments, block_q), block_q))


def visibility(plan: Plan, slots_total: int | None = None) -> np.ndarray:
    """The dense mask, bool [T, S]: packed row r sees cache slot s. Reads the blocks as an attention kernel does.

    S is ``slots_total``, by default the end of the last slot that the plan reads or writes.

    Raises:
        ValueError: ``slots_total`` is too small for the plan.
    """
    rows = np.repeat(plan.blocks, plan.blocks[:, 1] - plan.blocks[:, 0], axis=0).astype(np.int64)
    _, _, key_start, full_end, part_end, own_start, own_end = rows.T[:, :, None]
    needed = max(int(ends.max(initial=0)) for ends in (key_start + part_end, own_end, plan.slots + 1))
    if slots_total is None:
        slots_total = needed
    elif slots_total < needed:
        raise ValueError(f"slots_total must be at least {needed}, the slots of the plan, got {slots_total}.")
    slot = np.arange(slots_total)
    key = slot - key_start
    prefix = (key < full_end) | ((key < part_end) & (key < plan.limits[:, None]))
    return ((key >= 0) & prefix) | ((slot >= own_start) & (slot < own_end))

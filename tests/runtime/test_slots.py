"""The KV cache's slot ranges and the contexts that share them."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bagel_rt.runtime.context import Context
from bagel_rt.runtime.slots import KVCache


def make_cache(slots=0):
    return KVCache(2, 1, 4, torch.float32, "cpu", slots)


def fill(cache, start, length, value):
    cache.k[:, start : start + length] = value
    cache.v[:, start : start + length] = -value


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=40), st.integers(0, 20))
def test_ranges_are_disjoint_and_all_slots_are_accounted_for(actions, slots):
    cache, allocated = make_cache(slots), []
    for allocates, number in actions:
        if allocates or not allocated:
            allocated.append((cache.allocate(number), number))
        else:
            cache.release(*allocated.pop(number % len(allocated)))
        slots_in_use = sorted(slot for start, length in allocated for slot in range(start, start + length))
        assert len(slots_in_use) == len(set(slots_in_use)) and (not slots_in_use or slots_in_use[-1] < cache.slots)
        assert cache.free_slots == cache.slots - len(slots_in_use)
    for start, length in allocated:
        cache.release(start, length)
    assert not cache.slots or cache.allocate(cache.slots) == 0, "released ranges did not join again"


def test_growing_keeps_keys_and_values():
    cache = make_cache(3)
    fill(cache, cache.allocate(3), 3, 7.0)
    cache.allocate(5)
    assert cache.slots == 8 and cache.k.shape == (2, 8, 1, 4)
    assert (cache.k[:, :3] == 7).all() and (cache.v[:, :3] == -7).all()
    assert cache.layer(1)[0].data_ptr() == cache.k[1].data_ptr(), "layer views are those of the grown buffer"


def test_clones_share_slots_and_the_longest_grows_in_place():
    cache = make_cache(20)
    context = Context(cache, capacity=10)
    start = context.extend(4)
    snapshot = context.clone()
    assert context.extend(3) == start + 4 and context.range is snapshot.range
    assert (snapshot.length, context.length) == (4, 7)
    assert cache.free_slots == 10


def test_shorter_clone_is_copied_when_it_grows():
    cache = make_cache(20)
    context = Context(cache, capacity=10)
    fill(cache, context.extend(4), 4, 1.0)
    snapshot = context.clone()
    fill(cache, context.extend(3), 3, 2.0)
    fill(cache, snapshot.extend(2), 2, 3.0)
    assert snapshot.range is not context.range
    keys = cache.k[0, :, 0, 0]
    assert keys[context.key_start :][:7].tolist() == [1, 1, 1, 1, 2, 2, 2]
    assert keys[snapshot.key_start :][:6].tolist() == [1, 1, 1, 1, 3, 3]


def test_tail_is_free_after_the_longer_clone_is_dropped():
    cache = make_cache(20)
    context = Context(cache, capacity=10)
    context.extend(4)
    longer = context.clone()
    longer.extend(5)
    assert not context.fits(1)
    del longer
    assert context.fits(6) and not context.fits(7)


def test_borrowed_slots_of_two_clones_are_disjoint():
    cache = make_cache()
    context = Context(cache, capacity=20)
    context.extend(4)
    first, second = context.borrow(5), context.clone().borrow(5)
    ranges = [set(range(h.key_start + h.length - 5, h.key_start + h.length)) for h in (first, second)]
    assert not ranges[0] & ranges[1]
    assert first.range is context.range, "the first one fits right behind the context"


@pytest.mark.parametrize("capacity", [0, 1, 50])
def test_dropping_every_context_frees_every_slot(capacity):
    cache = make_cache()
    context = Context(cache, capacity=capacity)
    context.extend(3)
    twin = context.clone()
    twin.extend(4), context.extend(2)
    holder = Context(cache).borrow(6)
    assert cache.free_slots < cache.slots
    del context, twin, holder
    gc.collect()
    assert cache.free_slots == cache.slots


def test_failed_growth_changes_nothing(monkeypatch):
    cache = make_cache(4)
    fill(cache, cache.allocate(4), 4, 5.0)
    real, made = torch.Tensor.new_empty, []

    def fails_second(self, *shape, **options):
        made.append(shape)
        if len(made) == 2:
            raise torch.OutOfMemoryError("no memory")
        return real(self, *shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", fails_second)
    with pytest.raises(torch.OutOfMemoryError):
        cache.allocate(3)
    monkeypatch.undo()
    assert (cache.slots, cache.free_slots, cache.k.shape[1], cache.v.shape[1]) == (4, 0, 4, 4)
    cache.allocate(3)
    assert (cache.k[:, :4] == 5).all() and (cache.v[:, :4] == -5).all()


def test_release_during_an_allocation_is_not_lost():
    cache = make_cache(10)
    first = cache.allocate(4)

    class Releases(int):  # compares as a number and, as a finalizer may, returns a range meanwhile
        def __le__(self, other):
            cache.release(first, 4)
            return int(self) <= other

    second = cache.allocate(Releases(6))
    assert second == 4 and cache.free_slots == 4
    assert cache.allocate(4) == first

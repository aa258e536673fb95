"""How calls are timed, without a GPU: what a clock has it do, in which order, and what it makes of the times."""

import weakref
from pathlib import Path

import pytest
import torch

from benchmarks import measure

CPU = torch.device("cpu")


@pytest.fixture
def happened(monkeypatch):
    """What a clock has a GPU do."""
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("event")

        def synchronize(self):
            happened.append("wait")

        def elapsed_time(self, end):
            return 0.25

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: happened.append("wait"))
    monkeypatch.setattr("torch.cuda._sleep", lambda cycles: happened.append("sleep"))
    monkeypatch.setattr("torch.sum", lambda buffer: happened.append("read"))
    return happened


def test_a_call_by_itself_is_timed_behind_reads_that_empty_the_cache(happened):
    assert measure.Clock(CPU, 0, 1)._behind_reads([lambda: happened.append("call")]) == 250
    assert happened == ["read"] * 3 + ["event", "call", "event", "wait"]


def test_calls_in_rotation_follow_each_other_and_share_the_time(happened):
    clock, calls = measure.Clock(CPU, 0, 1), [lambda: happened.append("first"), lambda: happened.append("second")]
    clock._spin = 1.0
    assert clock._rotated(calls) == 125
    assert happened == ["wait", "first", "second", "sleep", "event", "first", "second", "event", "wait"]


def test_outputs_of_a_rotation_live_until_its_end(happened):
    clock, alive = measure.Clock(CPU, 0, 1), []

    def call():
        made = torch.ones(3)
        alive.append(weakref.ref(made))
        happened.append(sum(tensor() is not None for tensor in alive))
        return made

    clock._spin = 1.0
    clock._rotated([call] * 3)
    assert [count for count in happened if isinstance(count, int)] == [1, 2, 3, 1, 2, 3]


def test_small_calls_rotate_through_more_than_the_cache():
    clock = measure.Clock(CPU)
    assert clock.sets(1) == 1  # a CPU
    clock.cache = 50
    assert [clock.sets(size) for size in (1, 10, 33, 99, 100, 1000)] == [16, 10, 4, 2, 1, 1]


def test_the_clock_repeats_as_often_as_told_and_takes_the_median(monkeypatch):
    calls, now = [], iter([0, 0, 5e-6, 0, 1e-6, 0, 3e-6])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now))
    assert measure.Clock(CPU, 1.0, 3).microseconds(lambda: calls.append(1)) == pytest.approx(3)
    assert len(calls) == 5


def test_a_tree_without_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "ROOT", Path(tmp_path))
    assert measure.git_state() == "unknown"

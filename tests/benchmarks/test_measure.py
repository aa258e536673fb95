"""The timing method without a GPU: order of flushes, spins, events and calls, and the reported median."""

import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import measure

CPU = torch.device("cpu")


@pytest.fixture
def trace(monkeypatch):
    """The operations that a timer issues to the GPU, in order."""
    trace = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            trace.append("event")

        def synchronize(self):
            trace.append("wait")

        def elapsed_time(self, end):
            return 0.25

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: trace.append("wait"))
    monkeypatch.setattr("torch.cuda._sleep", lambda cycles: trace.append("sleep"))
    monkeypatch.setattr("torch.sum", lambda buffer: trace.append("read"))
    return trace


def test_single_call_is_timed_after_l2_flush(trace):
    assert measure.Timer(CPU, 0, 1)._after_flush([lambda: trace.append("call")]) == 250
    assert trace == ["read"] * 3 + ["event", "call", "event", "wait"]


def test_rotating_calls_run_back_to_back_after_spin(trace):
    timer, calls = measure.Timer(CPU, 0, 1), [lambda: trace.append("first"), lambda: trace.append("second")]
    timer._cycles_per_us = 1.0
    assert timer._rotating(calls) == 125
    assert trace == ["wait", "first", "second", "sleep", "event", "first", "second", "event", "wait"]


def test_rotating_calls_keep_outputs_alive(trace):
    timer, alive = measure.Timer(CPU, 0, 1), []

    def call():
        output = torch.ones(3)
        alive.append(weakref.ref(output))
        trace.append(sum(tensor() is not None for tensor in alive))
        return output

    timer._cycles_per_us = 1.0
    timer._rotating([call] * 3)
    assert [count for count in trace if isinstance(count, int)] == [1, 2, 3, 1, 2, 3]


def test_num_copies_is_twice_l2():
    timer = measure.Timer(CPU)
    assert timer.num_copies(1) == 1  # a CPU
    timer.l2_bytes = 50
    assert [timer.num_copies(size) for size in (1, 10, 33, 99, 100, 1000)] == [16, 10, 4, 2, 1, 1]


def test_timer_repeats_and_takes_median(monkeypatch):
    calls, now = [], iter([0, 0, 5e-6, 0, 1e-6, 0, 3e-6])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now))
    assert measure.Timer(CPU, 1.0, 3).microseconds(lambda: calls.append(1)) == pytest.approx(3)
    assert len(calls) == 5


def test_git_state_outside_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "ROOT", Path(tmp_path))
    assert measure.git_state() == "unknown"


def test_gpu_state_queries_by_uuid_or_pci_address(monkeypatch):
    queries = []
    monkeypatch.setattr(measure, "_output_of", lambda *command: queries.append(command[-1]) or "535; 1980 MHz")
    for properties in (SimpleNamespace(uuid="1b2c"), SimpleNamespace(pci_domain_id=0, pci_bus_id=26, pci_device_id=0)):
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda device, properties=properties: properties)
        assert measure.gpu_state(torch.device("cuda")) == "535; 1980 MHz"
    assert queries == ["--id=GPU-1b2c", "--id=00000000:1a:00.0"]

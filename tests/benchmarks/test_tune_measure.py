"""How the tuner judges and times candidates, and what bad ones cost it; without a GPU."""

import math
import multiprocessing
import os
import time
from copy import deepcopy
from functools import partial
from threading import Thread
from types import SimpleNamespace

import pytest
import torch

from bagel_rt.kernels import backend, configs, extension
from benchmarks import tune_measure
from benchmarks.tune_measure import TORCH, measure_class, measurements, relative_error
from benchmarks.workloads import Workload


def test_relative_error():
    one = torch.tensor([3.0, 4.0, -math.inf])
    assert relative_error(one, one) == 0
    assert relative_error(torch.tensor([3.0, 4.5, -math.inf]), one) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, math.nan, -math.inf]), one) == math.inf
    assert relative_error(torch.tensor([3.0, 4.0, 5.0]), one) == math.inf
    assert relative_error(torch.zeros(2), one) == math.inf


def by_rows(x):
    """An op whose kernel is right, wrong, unfinished or broken for its tiles."""
    if backend.backend() == "reference":
        return x + 1
    rows = configs.tiles("rms_norm", "wide", x.device)["ROWS"]
    if rows == 3:
        raise RuntimeError("out of resources")
    return x + 1 if rows == 1 else torch.full_like(x, math.nan) if rows == 4 else x + rows


def test_candidates_that_fail_or_are_wrong_get_a_reason_instead_of_a_time(monkeypatch):
    monkeypatch.delenv("BAGEL_RT_BACKEND", raising=False)
    workload = Workload("four sums", "rms_norm", 0, 8, lambda tensors: (by_rows, (tensors(64),), {}), torch.float32)
    device = torch.device("cpu")
    architecture, before = configs.architecture(device), deepcopy(configs.TABLE)
    tiles = {index: {"ROWS": rows, "num_warps": 4} for index, rows in enumerate((1, 2, 3, 4, 1))}
    results = list(measurements(("rms_norm", "wide"), workload, tiles, architecture, device))
    found = {index: result for index, result in results if result is not None}
    assert [index for index, result in results if result is None] == [TORCH, 0, 1, 2, 3, 4]
    assert found[TORCH] > 0 and found[0] > 0 and found[4] > 0
    assert found[1].startswith("ValueError: wrong by") and found[3].startswith("ValueError: wrong by inf")
    assert found[2] == "RuntimeError: out of resources"
    assert configs.TABLE == before and backend.backend() == "auto"


def test_what_a_call_leaves_unwritten_is_not_taken_from_the_call_before():
    buffer = torch.empty(8)

    def writes(x):
        if backend.backend() == "reference":
            return buffer.copy_(x)
        return buffer if configs.tiles("rms_norm", "wide", x.device)["ROWS"] == 2 else buffer.copy_(x)

    workload = Workload("lazy", "rms_norm", 0, 8, lambda tensors: (writes, (tensors(8),), {}), torch.float32)
    device = torch.device("cpu")
    tiles = {0: {"ROWS": 1, "num_warps": 4}, 1: {"ROWS": 2, "num_warps": 4}}
    results = dict(measurements(("rms_norm", "wide"), workload, tiles, configs.architecture(device), device))
    assert results[0] > 0 and results[1].startswith("ValueError: wrong by")


def test_what_moves_its_latents_is_judged_by_one_step_from_where_they_began():
    def moves(x):
        if backend.backend() == "reference" or configs.tiles("cfg_euler_step", "narrow", x.device)["ELEMENTS"] == 64:
            x.add_(1)

    workload = Workload("moves", "cfg_euler_step", 0, 8, lambda tensors: (moves, (tensors(8),), {}), torch.float32)
    device, tiles = torch.device("cpu"), {0: {"ELEMENTS": 64}, 1: {"ELEMENTS": 128}, 2: {"ELEMENTS": 64}}
    results = dict(measurements(("cfg_euler_step", "narrow"), workload, tiles, configs.architecture(device), device))
    assert results[0] > 0 and results[1].startswith("ValueError: wrong by") and results[2] > 0


def test_tiles_of_triton_kernels_are_tried_without_the_extension(monkeypatch):
    loaded, seen = object(), []
    monkeypatch.setattr(extension, "EXTENSION", loaded)

    def look(x):
        seen.append(extension.EXTENSION)
        return x + 1

    workload = Workload("looks", "decode_attention", 0, 8, lambda tensors: (look, (tensors(8),), {}), torch.float32)
    device, tiles = torch.device("cpu"), {0: {"ROWS": 1, "num_warps": 4}}
    list(measurements(("rms_norm", "wide"), workload, tiles, configs.architecture(device), device))
    assert seen[0] is loaded and seen[-1] is None and extension.EXTENSION is loaded


def test_memory_that_happens_to_hold_the_right_values_does_not_make_a_kernel_right():
    size = 5 << 20  # 40 MiB: glibc takes that much from the system each time, and it comes as zeros

    def writes_zeros(x):
        y = torch.empty(size, dtype=torch.float64)
        done = backend.backend() == "reference" or configs.tiles("rms_norm", "wide", x.device)["ROWS"] == 1
        return y.zero_() if done else y

    workload = Workload("zeros", "rms_norm", 0, 8, lambda tensors: (writes_zeros, (tensors(1),), {}), torch.float32)
    device = torch.device("cpu")
    tiles = {0: {"ROWS": 1, "num_warps": 4}, 1: {"ROWS": 2, "num_warps": 4}}
    results = dict(measurements(("rms_norm", "wide"), workload, tiles, configs.architecture(device), device))
    assert results[0] > 0 and results[1].startswith("ValueError: wrong by inf")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_process_that_hangs_or_ends_is_told_from_one_that_is_done(monkeypatch):
    monkeypatch.setattr(tune_measure, "PATIENCE", 0.2)
    job = ("rms_norm", "wide"), "a", {}, "sm_90"

    def collect(*messages, closes):
        ours, theirs = multiprocessing.Pipe()

        def serve():
            assert theirs.recv() == job
            for message in messages:
                theirs.send(message)
            if closes:
                theirs.close()

        times, failures = {TORCH: {}}, {}
        Thread(target=serve).start()
        return *tune_measure._collect(ours, job, times, failures), times, failures

    assert collect((TORCH, 2.0), (0, None), closes=False)[:2] == (0, "hangs for 0 s")
    assert collect((TORCH, 2.0), (0, None), closes=True)[:2] == (0, "ends the process")
    done = collect((TORCH, 2.0), (0, None), (0, 1.5), (1, None), (1, "wrong"), None, closes=True)
    assert done == (1, "", {TORCH: {"a": 2.0}, 0: {"a": 1.5}}, {1: "wrong"})


def serve_by_rows(connection):
    """In place of a measuring process: a candidate's ROWS are its time, but 3 ends the process and 4 hangs."""
    while True:
        _, workload, tiles, _ = connection.recv()
        for index, candidate in {TORCH: {"ROWS": 9}, **tiles}.items():
            connection.send((index, None))
            if candidate["ROWS"] == 3:
                os._exit(1)
            if candidate["ROWS"] == 4:
                time.sleep(60)
            connection.send((index, float(candidate["ROWS"]) * (2 if workload == "b" else 1)))
        connection.send(None)


@pytest.fixture
def started(monkeypatch):
    """Measuring processes are of :func:`serve_by_rows`; the list of those that were started."""
    processes, context = [], multiprocessing.get_context("fork")

    def start():
        ours, theirs = context.Pipe()
        process = context.Process(target=serve_by_rows, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        return process, ours

    monkeypatch.setattr(tune_measure, "_start", start)
    monkeypatch.setattr(tune_measure, "PATIENCE", 1.0)
    return processes


SIZES = [Workload(name, "rms_norm", 0, 8, build=None) for name in ("a", "b", "c")]


def test_one_process_measures_a_class_until_a_candidate_ends_it(started):
    tiles = [{"ROWS": rows} for rows in (5, 6)]
    times, failures = measure_class(("rms_norm", "wide"), SIZES, tiles, "sm_90")
    assert times == {i: {"a": t, "b": 2 * t, "c": t} for i, t in ((TORCH, 9), (0, 5), (1, 6))}
    assert failures == {} and len(started) == 1 and not started[0].is_alive()


def test_bad_and_hopeless_candidates_cost_themselves_only(started):
    tiles = [{"ROWS": rows} for rows in (3, 5, 4, 8, 6)]
    times, failures = measure_class(("rms_norm", "wide"), SIZES, tiles, "sm_90")
    assert times.keys() == {TORCH, 1, 4} and all(len(by_workload) == 3 for by_workload in times.values())
    assert failures == {
        0: "ends the process on a",
        2: "hangs for 1 s on a",
        3: "1.6 x the time of the fastest, on a",
    }
    assert len(started) == 3 and not any(process.is_alive() for process in started)


def test_at_the_end_of_its_time_what_was_finished_counts(started, monkeypatch):
    seconds = iter([0, 2])  # the clock after each workload

    def hopeless(times):
        clock.monotonic = partial(int, next(seconds))
        return {}

    clock = SimpleNamespace(monotonic=float)
    monkeypatch.setattr(tune_measure, "hopeless", hopeless)
    monkeypatch.setattr(tune_measure, "time", clock)
    tiles = [{"ROWS": rows} for rows in (5, 6)]
    times, failures = measure_class(("rms_norm", "wide"), SIZES, tiles, "sm_90", 1.0)
    assert times == {i: {"a": t, "b": 2 * t} for i, t in ((TORCH, 9), (0, 5), (1, 6))} and failures == {}
    with pytest.raises(RuntimeError, match="the time was up before a was finished"):
        measure_class(("rms_norm", "wide"), SIZES, tiles, "sm_90", 0.0)
    assert not any(process.is_alive() for process in started)

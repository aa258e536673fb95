"""The tuner's checks and timing of candidates, including crashes and hangs, without a GPU."""

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
from benchmarks.tune_measure import TORCH, measure_candidates, measure_class, relative_error
from benchmarks.workloads import OpWorkload


def test_relative_error():
    one = torch.tensor([3.0, 4.0, -math.inf])
    assert relative_error(one, one) == 0
    assert relative_error(torch.tensor([3.0, 4.5, -math.inf]), one) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, math.nan, -math.inf]), one) == math.inf
    assert relative_error(torch.tensor([3.0, 4.0, 5.0]), one) == math.inf
    assert relative_error(torch.zeros(2), one) == math.inf


def by_rows(x):
    """An op whose kernel is correct, wrong, incomplete or failing, depending on its tiles."""
    if backend.backend() == "reference":
        return x + 1
    rows = configs.tiles("rms_norm", "wide", x.device)["ROWS"]
    if rows == 3:
        raise RuntimeError("out of resources")
    return x + 1 if rows == 1 else torch.full_like(x, math.nan) if rows == 4 else x + rows


def test_failing_and_wrong_candidates_have_a_reason_instead_of_a_time(monkeypatch):
    monkeypatch.delenv("BAGEL_RT_BACKEND", raising=False)
    workload = OpWorkload("four sums", "rms_norm", 0, 8, lambda tensors: (by_rows, (tensors(64),), {}), torch.float32)
    device = torch.device("cpu")
    architecture, before = configs.architecture(device), deepcopy(configs.TABLE)
    tiles = {index: {"ROWS": rows, "num_warps": 4} for index, rows in enumerate((1, 2, 3, 4, 1))}
    results = list(measure_candidates(("rms_norm", "wide"), workload, tiles, architecture, device))
    outcomes = {index: result for index, result in results if result is not None}
    assert [index for index, result in results if result is None] == [TORCH, 0, 1, 2, 3, 4]
    assert outcomes[TORCH] > 0 and outcomes[0] > 0 and outcomes[4] > 0
    assert outcomes[1].startswith("ValueError: relative error") and outcomes[3].startswith(
        "ValueError: relative error inf"
    )
    assert outcomes[2] == "RuntimeError: out of resources"
    assert configs.TABLE == before and backend.backend() == "auto"


def test_unwritten_output_of_reused_buffer_is_wrong():
    buffer = torch.empty(8)

    def writes(x):
        if backend.backend() == "reference":
            return buffer.copy_(x)
        return buffer if configs.tiles("rms_norm", "wide", x.device)["ROWS"] == 2 else buffer.copy_(x)

    workload = OpWorkload("lazy", "rms_norm", 0, 8, lambda tensors: (writes, (tensors(8),), {}), torch.float32)
    device = torch.device("cpu")
    tiles = {0: {"ROWS": 1, "num_warps": 4}, 1: {"ROWS": 2, "num_warps": 4}}
    results = dict(measure_candidates(("rms_norm", "wide"), workload, tiles, configs.architecture(device), device))
    assert results[0] > 0 and results[1].startswith("ValueError: relative error")


def test_in_place_step_starts_from_the_same_latents():
    def moves(x):
        if backend.backend() == "reference" or configs.tiles("cfg_euler_step", "narrow", x.device)["ELEMENTS"] == 64:
            x.add_(1)

    workload = OpWorkload("moves", "cfg_euler_step", 0, 8, lambda tensors: (moves, (tensors(8),), {}), torch.float32)
    device, tiles = torch.device("cpu"), {0: {"ELEMENTS": 64}, 1: {"ELEMENTS": 128}, 2: {"ELEMENTS": 64}}
    results = dict(
        measure_candidates(("cfg_euler_step", "narrow"), workload, tiles, configs.architecture(device), device)
    )
    assert results[0] > 0 and results[1].startswith("ValueError: relative error") and results[2] > 0


def test_candidates_run_without_the_extension(monkeypatch):
    loaded, seen = object(), []
    monkeypatch.setattr(extension, "EXTENSION", loaded)

    def look(x):
        seen.append(extension.EXTENSION)
        return x + 1

    workload = OpWorkload("looks", "decode_attention", 0, 8, lambda tensors: (look, (tensors(8),), {}), torch.float32)
    device, tiles = torch.device("cpu"), {0: {"ROWS": 1, "num_warps": 4}}
    list(measure_candidates(("rms_norm", "wide"), workload, tiles, configs.architecture(device), device))
    assert seen[0] is loaded and seen[-1] is None and extension.EXTENSION is loaded


def test_unwritten_new_tensor_is_wrong():
    size = 5 << 20  # 40 MiB: glibc maps new, zeroed pages for blocks of this size

    def writes_zeros(x):
        y = torch.empty(size, dtype=torch.float64)
        done = backend.backend() == "reference" or configs.tiles("rms_norm", "wide", x.device)["ROWS"] == 1
        return y.zero_() if done else y

    workload = OpWorkload("zeros", "rms_norm", 0, 8, lambda tensors: (writes_zeros, (tensors(1),), {}), torch.float32)
    device = torch.device("cpu")
    tiles = {0: {"ROWS": 1, "num_warps": 4}, 1: {"ROWS": 2, "num_warps": 4}}
    results = dict(measure_candidates(("rms_norm", "wide"), workload, tiles, configs.architecture(device), device))
    assert results[0] > 0 and results[1].startswith("ValueError: relative error inf")
    assert not torch.are_deterministic_algorithms_enabled()


def test_collect_distinguishes_hang_crash_and_completion(monkeypatch):
    monkeypatch.setattr(tune_measure, "HANG_TIMEOUT", 0.2)
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

    assert collect((TORCH, 2.0), (0, None), closes=False)[:2] == (0, "no result for 0 s")
    assert collect((TORCH, 2.0), (0, None), closes=True)[:2] == (0, "process crashed")
    done = collect((TORCH, 2.0), (0, None), (0, 1.5), (1, None), (1, "wrong"), None, closes=True)
    assert done == (1, "", {TORCH: {"a": 2.0}, 0: {"a": 1.5}}, {1: "wrong"})


def serve_by_rows(connection):
    """A fake measuring process: ROWS is the time of a candidate; 3 crashes the process and 4 hangs."""
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
    """Runs :func:`serve_by_rows` in measuring processes; the value lists the started ones."""
    processes, context = [], multiprocessing.get_context("fork")

    def start():
        ours, theirs = context.Pipe()
        process = context.Process(target=serve_by_rows, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        return process, ours

    monkeypatch.setattr(tune_measure, "_start_process", start)
    monkeypatch.setattr(tune_measure, "HANG_TIMEOUT", 1.0)
    return processes


SIZES = [OpWorkload(name, "rms_norm", 0, 8, build=None) for name in ("a", "b", "c")]


def test_one_process_measures_a_whole_class(started):
    tiles = [{"ROWS": rows} for rows in (5, 6)]
    times, failures = measure_class(("rms_norm", "wide"), SIZES, tiles, "sm_90")
    assert times == {i: {"a": t, "b": 2 * t, "c": t} for i, t in ((TORCH, 9), (0, 5), (1, 6))}
    assert failures == {} and len(started) == 1 and not started[0].is_alive()


def test_crashing_hanging_and_slow_candidates_are_dropped(started):
    tiles = [{"ROWS": rows} for rows in (3, 5, 4, 8, 6)]
    times, failures = measure_class(("rms_norm", "wide"), SIZES, tiles, "sm_90")
    assert times.keys() == {TORCH, 1, 4} and all(len(by_workload) == 3 for by_workload in times.values())
    assert failures == {
        0: "process crashed on a",
        2: "no result for 1 s on a",
        3: "1.6x the time of the fastest on a",
    }
    assert len(started) == 3 and not any(process.is_alive() for process in started)


def test_deadline_keeps_finished_workloads(started, monkeypatch):
    seconds = iter([0, 2])  # the clock after each workload

    def too_slow(times):
        clock.monotonic = partial(int, next(seconds))
        return {}

    clock = SimpleNamespace(monotonic=float)
    monkeypatch.setattr(tune_measure, "too_slow", too_slow)
    monkeypatch.setattr(tune_measure, "time", clock)
    tiles = [{"ROWS": rows} for rows in (5, 6)]
    times, failures = measure_class(("rms_norm", "wide"), SIZES, tiles, "sm_90", 1.0)
    assert times == {i: {"a": t, "b": 2 * t} for i, t in ((TORCH, 9), (0, 5), (1, 6))} and failures == {}
    with pytest.raises(RuntimeError, match="time limit reached before a was finished"):
        measure_class(("rms_norm", "wide"), SIZES, tiles, "sm_90", 0.0)
    assert not any(process.is_alive() for process in started)

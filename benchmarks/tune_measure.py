"""Check and time the tuner's candidates (:mod:`benchmarks.tune`) on the GPU.

Measuring runs in a subprocess, because a candidate can fault or hang. A faulting candidate then only costs its own
result, a hanging one also ``HANG_TIMEOUT`` seconds.
"""

import math
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch

from bagel_rt.check.case import Values
from bagel_rt.kernels import backend, configs, extension
from benchmarks.compiling import terminate
from benchmarks.measure import Timer
from benchmarks.workloads import ALL_WORKLOADS, OpWorkload

HANG_TIMEOUT = 60.0
"""Seconds without a result after which a candidate counts as hung."""

MAX_SLOWDOWN = 1.5
"""A candidate slower than the fastest one by more than this factor is not measured on the remaining sizes."""

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""Maximum relative L2 error of each output against torch in the same dtype."""

TORCH = -1
"""Index that represents torch among the candidates."""

ClassKey = tuple[str, str]
"""(op, shape class): key of a table entry."""


def measure_candidates(
    name: ClassKey, workload: OpWorkload, tiles: dict[int, dict], architecture: str, device: torch.device
) -> Iterator[tuple[int, float | str | None]]:
    """Measure torch, then each candidate in ``tiles`` (by index), through the public op with a patched table entry.

    Yields (index, None) before and (index, microseconds or error message) after each, so that the parent process knows
    which candidate was running when this one faults or hangs.
    """
    torch.manual_seed(0)
    function, arguments, options = workload.build(Values(device, workload.dtype))
    latents = arguments[0].clone() if workload.op == "cfg_euler_step" else None
    timer = Timer(device, seconds=0.05, max_repeats=20)
    entry = configs.TABLE[name[0]][architecture][name[1]]
    before, loaded = entry["tiles"], extension.EXTENSION

    def call():
        return function(*arguments, **options)

    try:
        backend.choose_backend("reference")
        outputs = _collect_outputs(call, arguments, workload, latents)
        expected = [output.clone() for output in outputs]
        yield TORCH, None
        yield TORCH, timer.microseconds(call)
        backend.choose_backend("triton")
        extension.EXTENSION = None  # otherwise ops would use its kernels instead of the Triton kernels under test
        for index, candidate in tiles.items():
            yield index, None
            entry["tiles"] = candidate
            for output in outputs:
                output.fill_(math.nan)  # elements that this candidate does not write must not look correct
            try:
                with nan_in_new_tensors():
                    outputs = _collect_outputs(call, arguments, workload, latents)
                worst = max(map(relative_error, outputs, expected))
                if worst > TOLERANCE[workload.dtype]:
                    raise ValueError(f"relative error {worst:.1e} on {workload.name}")
                yield index, timer.microseconds(call)
            except Exception as error:  # any error of compiler, launch or comparison
                yield index, f"{type(error).__name__}: {error}"[:300]
                if device.type == "cuda":
                    torch.cuda.synchronize()  # raises, which ends the process, if the CUDA context is corrupt
    finally:
        entry["tiles"], extension.EXTENSION = before, loaded
        backend.choose_backend(None)


@contextmanager
def nan_in_new_tensors() -> Iterator[None]:
    """Context in which torch fills new tensors with NaN, so that stale outputs in reused blocks cannot look correct."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)  # required by the fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills


def _collect_outputs(call, arguments: tuple, workload: OpWorkload, latents: torch.Tensor | None) -> list[torch.Tensor]:
    """Run a call and return everything it writes: outputs and caches, or the new latents of the in-place step."""
    if latents is not None:
        arguments[0].copy_(latents)
        call()
        return [arguments[0].clone()]
    outputs = call()
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if workload.op == "qk_norm_rope":
        outputs += arguments[6:8]
    return [output for output in outputs if all(output is not argument for argument in arguments[:6])]


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """||output - expected|| / ||expected|| over finite elements; infinite if the non-finite elements differ."""
    finite = expected.isfinite()
    if output.shape != expected.shape or not torch.equal(output.isfinite(), finite):
        return math.inf
    output, expected = output[finite].double(), expected[finite].double()
    return ((output - expected).norm() / expected.norm().clamp(min=1e-30)).item()


MeasureJob = tuple[ClassKey, str, dict[int, dict], str]
"""Message to a measuring process: class, workload name, candidates by index, architecture."""


def measure_class(
    name: ClassKey, workloads: list[OpWorkload], tiles: list[dict], architecture: str, deadline: float = math.inf
) -> tuple[dict[int, dict[str, float]], dict[int, str]]:
    """Measure the candidates of a class on all its workloads.

    One subprocess measures. If a candidate crashes or hangs, it is replaced and the remaining candidates continue. At
    ``deadline`` (``time.monotonic``) only the finished workloads are returned.

    Returns:
        Microseconds by index (a candidate's or ``TORCH``) and workload name, and the reasons why the other candidates
        were dropped.

    Raises:
        RuntimeError: torch cannot be measured, or no workload was finished in time.
    """
    times, failures, finished, process, connection = {TORCH: {}}, {}, [], None, None
    try:
        for workload in workloads:
            while (remaining := _remaining(tiles, times, failures, workload.name)) or workload.name not in times[TORCH]:
                if process is None:
                    process, connection = _start_process()
                job = name, workload.name, remaining, architecture
                current, failure = _collect(connection, job, times, failures, deadline)
                if not failure:
                    break
                terminate([process])
                process = None
                if time.monotonic() >= deadline:
                    if not finished:
                        raise RuntimeError(f"time limit reached before {workload.name} was finished")
                    return _complete_times(times, failures, finished), failures
                if current in (None, TORCH):
                    raise RuntimeError(f"cannot measure {workload.name}: {failure}")
                failures.setdefault(current, f"{failure} on {workload.name}")
            finished.append(workload.name)
            times = _complete_times(times, failures, finished)
            failures |= too_slow(times)
    finally:
        if process is not None:
            terminate([process])
    return _complete_times(times, failures, finished), failures


def _remaining(tiles: list[dict], times: dict, failures: dict, workload: str) -> dict[int, dict]:
    """Candidates by index that have neither failed nor been timed on the workload."""
    return {i: t for i, t in enumerate(tiles) if i not in failures and workload not in times.get(i, {})}


def _start_process() -> tuple[multiprocessing.Process, Connection]:
    """Start a measuring process (:func:`_serve`) and return it with its connection."""
    context = multiprocessing.get_context("spawn")  # CUDA cannot be reinitialized in a forked process
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(connection: Connection) -> None:
    while True:
        name, workload, tiles, architecture = connection.recv()
        [workload] = [known for known in ALL_WORKLOADS if known.name == workload]
        with torch.set_grad_enabled(workload.op == "attention_backward"):
            for message in measure_candidates(name, workload, tiles, architecture, torch.device("cuda")):
                connection.send(message)
        torch.cuda.empty_cache()  # the next workload has another size
        connection.send(None)


def _collect(
    connection: Connection, job: MeasureJob, times: dict, failures: dict, deadline: float = math.inf
) -> tuple[int | None, str]:
    """Send a job and store its results in ``times`` and ``failures``.

    Returns:
        The index of the last candidate that was started, and why the job ended early (empty if it did not).
    """
    current, (_, workload, _, _) = None, job
    try:
        connection.send(job)
        while True:
            wait = min(HANG_TIMEOUT, deadline - time.monotonic())
            if wait <= 0 or not connection.poll(wait):
                return current, f"no result for {HANG_TIMEOUT:.0f} s"
            message = connection.recv()
            if message is None:
                return current, ""
            current, result = message
            if isinstance(result, str):
                failures[current] = result
            elif result is not None:
                times.setdefault(current, {})[workload] = result
    except (EOFError, ConnectionError):
        return current, "process crashed"


def _complete_times(times: dict, failures: dict, workloads: list[str]) -> dict[int, dict[str, float]]:
    """The times on ``workloads`` of the candidates that have not failed and were timed on all of them."""
    return {
        index: {name: by_workload[name] for name in workloads}
        for index, by_workload in times.items()
        if index not in failures and by_workload.keys() >= set(workloads)
    }


def too_slow(times: dict[int, dict[str, float]]) -> dict[int, str]:
    """Candidates slower than ``MAX_SLOWDOWN`` times the fastest, with the reason."""
    means = {index: geometric_mean(by_workload) for index, by_workload in times.items() if index != TORCH}
    fastest = min(means.values(), default=0)
    return {
        index: f"{mean / fastest:.1f}x the time of the fastest on {', '.join(times[index])}"
        for index, mean in means.items()
        if mean > MAX_SLOWDOWN * fastest
    }


def geometric_mean(times: dict[str, float]) -> float:
    """Geometric mean of one candidate's times over all workloads."""
    return math.exp(sum(map(math.log, times.values())) / len(times))

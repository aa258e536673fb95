"""Measures candidates of the tuner (:mod:`benchmarks.tune`) on the GPU: right or wrong, and how fast.

In a process of its own, for a candidate may fault, or hang. What it costs then is itself and ``PATIENCE`` seconds.
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
from benchmarks.compiling import stop
from benchmarks.measure import Clock
from benchmarks.workloads import ALL_WORKLOADS, Workload

PATIENCE = 60.0
"""Seconds without a result after which a candidate counts as hanging."""

HOPELESS = 1.5
"""A candidate that takes this many times what the fastest one does is not measured on the sizes that follow."""

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""Largest relative L2 error against torch in the same dtype, each output by itself."""

TORCH = -1
"""Stands for torch among the indexes of candidates."""

Name = tuple[str, str]
"""An op of the table and one of its shape classes."""


def measurements(
    name: Name, workload: Workload, tiles: dict[int, dict], architecture: str, device: torch.device
) -> Iterator[tuple[int, float | str | None]]:
    """(index, None) before and (index, microseconds or why there are none) after each candidate, torch first.

    ``tiles`` are the candidates by index. Each is tried through the public op, by way of the table.
    """
    torch.manual_seed(0)
    function, arguments, options = workload.build(Values(device, workload.dtype))
    latents = arguments[0].clone() if workload.op == "cfg_euler_step" else None
    clock = Clock(device, seconds=0.05, most=20)
    entry = configs.TABLE[name[0]][architecture][name[1]]
    before, loaded = entry["tiles"], extension.EXTENSION

    def call():
        return function(*arguments, **options)

    try:
        backend.choose_backend("reference")
        outputs = _written(call, arguments, workload, latents)
        expected = [output.clone() for output in outputs]
        yield TORCH, None
        yield TORCH, clock.microseconds(call)
        backend.choose_backend("triton")
        extension.EXTENSION = None  # or its kernels would run in place of those whose tiles are tried
        for index, candidate in tiles.items():
            yield index, None
            entry["tiles"] = candidate
            for output in outputs:
                output.fill_(math.nan)  # what a candidate leaves unwritten shall not be right from the one before
            try:
                with nan_in_new_tensors():
                    outputs = _written(call, arguments, workload, latents)
                worst = max(map(relative_error, outputs, expected))
                if worst > TOLERANCE[workload.dtype]:
                    raise ValueError(f"wrong by {worst:.1e} on {workload.name}")
                yield index, clock.microseconds(call)
            except Exception as error:  # whatever a compiler, a launch or a comparison may raise
                yield index, f"{type(error).__name__}: {error}"[:300]
                if device.type == "cuda":
                    torch.cuda.synchronize()  # raises, and so ends the process, if the candidate broke the context
    finally:
        entry["tiles"], extension.EXTENSION = before, loaded
        backend.choose_backend(None)


@contextmanager
def nan_in_new_tensors() -> Iterator[None]:
    """Within, memory that torch hands out holds NaN, and not the right values of an output that was there before."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills only where this is set
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills


def _written(call, arguments: tuple, workload: Workload, latents: torch.Tensor | None) -> list[torch.Tensor]:
    """Everything that a call wrote: its outputs, and caches among its arguments; or where it moved ``latents`` to."""
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
    """L2 norm of the difference over that of ``expected``; infinite if others than expected are not finite."""
    finite = expected.isfinite()
    if output.shape != expected.shape or not torch.equal(output.isfinite(), finite):
        return math.inf
    output, expected = output[finite].double(), expected[finite].double()
    return ((output - expected).norm() / expected.norm().clamp(min=1e-30)).item()


Job = tuple[Name, str, dict[int, dict], str]
"""Class, name of the workload, candidates by index, architecture: what a measuring process is sent."""


def measure_class(
    name: Name, workloads: list[Workload], tiles: list[dict], architecture: str, deadline: float = math.inf
) -> tuple[dict[int, dict[str, float]], dict[int, str]]:
    """Microseconds of each candidate and of ``TORCH`` by workload, and the reasons against the other candidates.

    One process measures; a new one goes on behind a candidate that ended it or hangs. At ``deadline``, of
    ``time.monotonic``, the workloads that were finished are all there is.

    Raises:
        RuntimeError: torch cannot be measured, or no workload was finished in time.
    """
    times, failures, finished, process, connection = {TORCH: {}}, {}, [], None, None
    try:
        for workload in workloads:
            while (left := _left(tiles, times, failures, workload.name)) or workload.name not in times[TORCH]:
                if process is None:
                    process, connection = _start()
                job = name, workload.name, left, architecture
                tried, stopped = _collect(connection, job, times, failures, deadline)
                if not stopped:
                    break
                stop([process])
                process = None
                if time.monotonic() >= deadline:
                    if not finished:
                        raise RuntimeError(f"the time was up before {workload.name} was finished")
                    return _of_workloads(times, failures, finished), failures
                if tried in (None, TORCH):
                    raise RuntimeError(f"{workload.name} cannot be measured: {stopped}")
                failures.setdefault(tried, f"{stopped} on {workload.name}")
            finished.append(workload.name)
            times = _of_workloads(times, failures, finished)
            failures |= hopeless(times)
    finally:
        if process is not None:
            stop([process])
    return _of_workloads(times, failures, finished), failures


def _left(tiles: list[dict], times: dict, failures: dict, workload: str) -> dict[int, dict]:
    """The candidates that neither failed nor have a time on the workload, by index."""
    return {i: t for i, t in enumerate(tiles) if i not in failures and workload not in times.get(i, {})}


def _start() -> tuple[multiprocessing.Process, Connection]:
    """A process that measures what it is sent (:func:`_serve`)."""
    context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
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
            for message in measurements(name, workload, tiles, architecture, torch.device("cuda")):
                connection.send(message)
        torch.cuda.empty_cache()  # the next one is of another size
        connection.send(None)


def _collect(
    connection: Connection, job: Job, times: dict, failures: dict, deadline: float = math.inf
) -> tuple[int | None, str]:
    """Send a job and sort what comes into ``times`` and ``failures``: the last candidate tried, why it ended early."""
    tried, (_, workload, _, _) = None, job
    try:
        connection.send(job)
        while True:
            wait = min(PATIENCE, deadline - time.monotonic())
            if wait <= 0 or not connection.poll(wait):
                return tried, f"hangs for {PATIENCE:.0f} s"
            message = connection.recv()
            if message is None:
                return tried, ""
            tried, result = message
            if isinstance(result, str):
                failures[tried] = result
            elif result is not None:
                times.setdefault(tried, {})[workload] = result
    except (EOFError, ConnectionError):
        return tried, "ends the process"


def _of_workloads(times: dict, failures: dict, workloads: list[str]) -> dict[int, dict[str, float]]:
    """Of ``times`` those of candidates without a failure, on these workloads."""
    return {
        index: {name: by_workload[name] for name in workloads}
        for index, by_workload in times.items()
        if index not in failures and by_workload.keys() >= set(workloads)
    }


def hopeless(times: dict[int, dict[str, float]]) -> dict[int, str]:
    """Candidates that are slower than ``HOPELESS`` allows, and by how much."""
    means = {index: geometric_mean(by_workload) for index, by_workload in times.items() if index != TORCH}
    fastest = min(means.values(), default=0)
    return {
        index: f"{mean / fastest:.1f} x the time of the fastest, on {', '.join(times[index])}"
        for index, mean in means.items()
        if mean > HOPELESS * fastest
    }


def geometric_mean(times: dict[str, float]) -> float:
    """Of the times of one candidate."""
    return math.exp(sum(map(math.log, times.values())) / len(times))

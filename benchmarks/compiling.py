"""Compile the kernels that ops launch, for any architecture, without a GPU.

Ops are called on CPU tensors whose memory is never accessed, under a Triton driver that compiles every launch but
executes none. A compiler may abort its process or hang on unsupported input, so each job runs in a subprocess
(:func:`run_in_processes`).
"""

import math
import multiprocessing
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from bagel_rt.check.case import Values
from bagel_rt.kernels import backend, configs
from benchmarks.workloads import OpWorkload


@dataclass(frozen=True)
class DeviceLimits:
    """Hardware limits of one architecture; shared memory in bytes."""

    shared_per_block: int
    shared_per_multiprocessor: int
    warps: int  # per multiprocessor
    blocks: int  # per multiprocessor
    multiprocessors: int  # of the GPU named in the comment


REGISTERS = 65536  # 32-bit, per multiprocessor

DEVICE_LIMITS = {  # CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
    "sm_80": DeviceLimits(163 << 10, 164 << 10, 64, 32, 108),  # A100
    "sm_89": DeviceLimits(99 << 10, 100 << 10, 48, 24, 142),  # L40S
    "sm_90": DeviceLimits(227 << 10, 228 << 10, 64, 32, 132),  # H100, H200
    "sm_100": DeviceLimits(227 << 10, 228 << 10, 64, 32, 148),  # B200
}


@dataclass
class Kernel:
    """Resource usage and instructions of a compiled kernel, or the ``error`` of its compilation.

    Attributes:
        tiles: launch arguments, an entry of the table.
        workloads: names of the workloads that launch it.
        dots: ``tl.dot`` calls as (M, N, K, operand dtype).
        registers: per thread; for a warp-specialized kernel, the number at launch.
        serialized: wgmma that ptxas serialized (its notes C7510 and similar).
        blocks_per_multiprocessor: occupancy, limited by registers, shared memory and warps.
    """

    architecture: str
    op: str
    shape_class: str
    tiles: dict | None
    workloads: list[str]
    name: str = ""
    hash: str = ""
    error: str = ""
    dots: list[tuple[int, int, int, str]] = field(default_factory=list)
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    warps: int = 0
    wgmma: int = 0
    tcgen05: int = 0
    mma: int = 0
    tma_loads: int = 0
    tma_stores: int = 0
    cp_async: int = 0
    serialized: int = 0
    blocks_per_multiprocessor: int = 0


def blocks_per_multiprocessor(architecture: str, registers: int, shared_bytes: int, warps: int) -> int:
    """Number of blocks of a kernel that are resident on one multiprocessor at the same time.

    Registers are allocated per warp in units of 256, shared memory per block in units of 128 bytes, and the system
    reserves another 1 KiB of shared memory per block.
    """
    limits = DEVICE_LIMITS[architecture]
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    shared = -(-(shared_bytes + 1024) // 128) * 128
    by_registers = REGISTERS // per_warp // warps
    return min(limits.blocks, limits.warps // warps, by_registers, limits.shared_per_multiprocessor // shared)


def read_kernel(compiled, log: str, **launch) -> Kernel:
    """Extract a :class:`Kernel` from a ``triton.CompiledKernel`` and the log of ``ptxas -v``."""
    ptx, ttir, metadata = compiled.asm["ptx"], compiled.asm["ttir"], compiled.metadata
    dots = re.findall(r"tt\.dot [^\n]*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>", ttir)
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", ptx)
    registers, warps = int(re.search(r"Used (\d+) registers", log)[1]), int(threads[1]) // 32
    return Kernel(
        **launch,
        name=metadata.name,
        hash=compiled.hash,
        dots=sorted({(int(m), int(n), int(k), dtype) for m, k, dtype, n in dots}),
        registers=registers,
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill stores", log))),
        shared_bytes=metadata.shared,
        warps=warps,
        wgmma=ptx.count("wgmma.mma_async"),
        tcgen05=ptx.count("tcgen05.mma"),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        tma_loads=len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx)),
        tma_stores=len(re.findall(r"cp\.(?:reduce\.)?async\.bulk\.tensor\.\dd\.global", ptx)),
        cp_async=len(re.findall(r"cp\.async\.c[ag]", ptx)),
        serialized=len(re.findall(r"C75\d\d", log)),
        blocks_per_multiprocessor=blocks_per_multiprocessor(launch["architecture"], registers, metadata.shared, warps),
    )


class CompilingDriver:
    """The part of the Triton driver interface that compilation uses."""

    def __init__(self, architecture: str):
        self.capability = int(architecture.removeprefix("sm_"))

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # Triton's in-memory cache is keyed by device: use one per architecture

    def get_current_stream(self, device):
        return 0


@contextmanager
def _patched(owner, name: str, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class TorchFallback(Exception):
    """The table's entry is null: the op uses torch for this class, so there is no kernel to compile."""


@contextmanager
def intercept_launches(architecture: str, launch: Callable, tiles: dict | None = None) -> Iterator[dict]:
    """Context in which ops on CPU tensors select kernels as on a GPU of ``architecture`` but execute none.

    Each launch calls ``launch(entry, compile_kernel)`` instead. ``entry``, also the context's value, is the table entry
    that the op looked up last: {"op", "shape_class", "tiles"}. ``compile_kernel(force=False)`` returns the compiled
    kernel, from Triton's cache unless ``force`` is set.

    Args:
        architecture: key of ``DEVICE_LIMITS``.
        launch: called for each launch.
        tiles: {(op, shape class): launch arguments} that override the table.
    """
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run, look_up, last_entry = JITFunction.run, configs.tiles, {}

    def tiles_of(op, shape_class, device):
        entry = (tiles or {}).get((op, shape_class)) or look_up(op, shape_class, device)
        last_entry.update(op=op, shape_class=shape_class, tiles=entry)
        if not entry:
            raise TorchFallback
        return dict(entry)

    def instead(function, *args, grid, warmup, **kwargs):
        def compile_kernel(force=False):
            if force:
                function.device_caches.clear()
            with knobs.compilation.scope():
                knobs.compilation.always_compile = force
                return run(function, *args, grid=grid, warmup=True, **kwargs)

        return launch(last_entry, compile_kernel)

    previous = backend._override  # not backend(), which falls back to the environment's value
    with ExitStack() as stack:
        for replacement in (
            (driver, "_active", CompilingDriver(architecture)),
            (JITFunction, "run", instead),
            (backend, "INTERPRETED", True),  # allows kernels for CPU tensors
            (configs, "architecture", lambda device: architecture),
            (configs, "multiprocessors", lambda device: DEVICE_LIMITS[architecture].multiprocessors),
            (configs, "tiles", tiles_of),
        ):
            stack.enter_context(_patched(*replacement))
        stack.callback(backend.choose_backend, previous)
        backend.choose_backend("triton")
        yield last_entry


def _call(workload: OpWorkload) -> None:
    function, arguments, options = workload.build(Values("cpu", workload.dtype, random=False))
    with suppress(TorchFallback):
        function(*arguments, **options)


def shape_classes(workload: OpWorkload, architecture: str) -> list[tuple[str, str]]:
    """The distinct (op, shape class) entries of the table that ``workload`` looks up, in order.

    The list ends with the first class that uses torch: the CPU tensors hold no result to continue with.
    """
    seen = {}
    with intercept_launches(
        architecture, lambda entry, _: seen.setdefault((entry["op"], entry["shape_class"]))
    ) as last:
        _call(workload)
    return list(dict.fromkeys([*seen, (last["op"], last["shape_class"])] if last else seen))


def shape_classes_of(
    workloads: Iterable[OpWorkload], architecture: str, workers: int, deadline: float = math.inf
) -> list[tuple[OpWorkload, list]]:
    """Each workload with its :func:`shape_classes`. Failures are printed to stderr and give an empty list."""
    workloads, by_name = list(workloads), {}
    jobs = [(workload, architecture) for workload in workloads]
    for (workload, _), names in run_in_processes(shape_classes, jobs, workers, deadline):
        if isinstance(names, ChildProcessError):
            print(f"{workload.name}: cannot determine its shape classes: {names}", file=sys.stderr, flush=True)
        else:
            by_name[workload.name] = names
    return [(workload, by_name.get(workload.name, [])) for workload in workloads]


def compile_workload(architecture: str, workload: OpWorkload, tiles: dict | None = None) -> list[Kernel]:
    """All kernels that ``workload`` launches. A compiler error becomes the ``error`` of the last one."""
    kernels, entry = [], {}
    common = dict(architecture=architecture, workloads=[workload.name])

    def launch(entry, compile_kernel):
        compiled, log = _compile_with_log(compile_kernel)
        kernels.append(read_kernel(compiled, log, **common, **entry))
        return compiled

    try:
        with intercept_launches(architecture, launch, tiles) as entry:
            _call(workload)
    except Exception as error:  # a candidate can raise any compiler error
        entry = entry or dict(op=workload.op, shape_class="", tiles=None)
        kernels.append(Kernel(**common, **entry, error=f"{type(error).__name__}: {error}"[:500]))
    return kernels


def _compile_with_log(compile_kernel) -> tuple:
    """A compiled kernel and its ptxas log.

    Triton's cache holds the kernel but not the log, so the log is stored next to it. A kernel that was cached without
    a log is compiled again.
    """
    from triton import knobs
    from triton.runtime.cache import get_cache_manager

    for force in (False, True):
        with knobs.nvidia.scope(), redirect_stdout(StringIO()) as output:
            knobs.nvidia.dump_ptxas_log = True
            compiled = compile_kernel(force)
        cache, log = get_cache_manager(compiled.hash), output.getvalue()
        if "registers" in log:
            cache.put(log, "ptxas.log", binary=False)
            return compiled, log
        if cached := cache.get_file("ptxas.log"):
            return compiled, Path(cached).read_text()
    raise RuntimeError(f"ptxas printed no log for {compiled.metadata.name}")


JOB_TIMEOUT = 300.0
"""Timeout of one job of :func:`run_in_processes`, in seconds. Compilation takes a few, but can hang on some input."""


def run_in_processes(
    work: Callable, jobs: Iterable[tuple], workers: int, deadline: float = math.inf
) -> Iterator[tuple[tuple, object]]:
    """Yield (job, ``work(*job)``) in order of completion. Each job runs in a forked process, ``workers`` at a time.

    If a job raises, its process exits or it exceeds ``JOB_TIMEOUT``, the result is a :class:`ChildProcessError`. At
    ``deadline`` (``time.monotonic``) running jobs are terminated and no others are started.
    """
    from triton.runtime.cache import triton_key

    triton_key()  # hashes Triton's sources; cached here once, before forking
    jobs, running = iter(jobs), {}
    context = multiprocessing.get_context("fork")  # children inherit the imported torch
    try:
        while True:
            while len(running) < workers and time.monotonic() < deadline and (job := next(jobs, None)) is not None:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work_and_send, args=(sender, work, job), daemon=True)
                process.start()
                sender.close()
                running[receiver] = job, process, min(deadline, time.monotonic() + JOB_TIMEOUT)
            if not running:
                return
            soonest = min(until for *_, until in running.values())
            for receiver in wait(list(running), max(soonest - time.monotonic(), 0)):
                job, process, _ = running.pop(receiver)
                yield job, _receive(receiver, process)
            for receiver in [key for key, (*_, until) in running.items() if until <= time.monotonic()]:
                job, process, until = running.pop(receiver)
                terminate([process])
                reason = "time limit reached" if until == deadline else f"compilation exceeded {JOB_TIMEOUT:.0f} s"
                yield job, ChildProcessError(reason)
    finally:
        terminate([process for _, process, _ in running.values()])


def _receive(receiver: Connection, process) -> object:
    try:
        return receiver.recv()
    except EOFError:
        process.join(1)
        return ChildProcessError(f"the compiler process exited with code {process.exitcode}")
    finally:
        process.join(1)
        terminate([process])


def terminate(processes: list) -> None:
    """Send SIGTERM, then SIGKILL.

    SIGTERM lets a process terminate its own children, such as ptxas. The waits are bounded because the driver can keep
    even a killed process alive for a while.
    """
    for name, seconds in (("terminate", 1.0), ("kill", 5.0)):
        processes = [process for process in processes if process.is_alive()]
        for process in processes:
            getattr(process, name)()
        until = time.monotonic() + seconds
        for process in processes:
            process.join(max(until - time.monotonic(), 0))


def _work_and_send(sender: Connection, work: Callable, job: tuple) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # SystemExit makes subprocess.run kill its child
    torch.set_num_threads(1)
    try:
        result = work(*job)
    except Exception as error:  # any error of an op; compile_workload handles those of compilers
        result = ChildProcessError(f"{type(error).__name__}: {error}"[:500])
    sender.send(result)
    sender.close()


def compile_all(
    jobs: Iterable[tuple], workers: int, deadline: float = math.inf
) -> Iterator[tuple[tuple, list[Kernel]]]:
    """Yield (job, kernels) in order of completion, where a job is the arguments of :func:`compile_workload`."""
    for job, kernels in run_in_processes(compile_workload, jobs, workers, deadline):
        if isinstance(kernels, ChildProcessError):
            architecture, workload, tiles = job
            (op, shape_class), entry = next(iter((tiles or {}).items()), ((workload.op, ""), None))
            kernels = [Kernel(architecture, op, shape_class, entry, [workload.name], error=str(kernels))]
        yield job, kernels

"""Compiles what the ops launch, for any architecture, on a machine without a GPU.

Ops are called on CPU tensors whose memory is never touched, under a Triton driver that compiles every launch and
launches nothing. Compilers may abort on what they cannot do, so callers do this in processes of their own
(:func:`in_processes`).
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
from benchmarks.workloads import Workload


@dataclass(frozen=True)
class Limits:
    """Of one architecture; shared memory in bytes, the rest a count."""

    shared_per_block: int
    shared_per_multiprocessor: int
    warps: int  # per multiprocessor
    blocks: int  # per multiprocessor
    multiprocessors: int  # of the card named below


REGISTERS = 65536  # 32-bit, per multiprocessor

LIMITS = {  # CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
    "sm_80": Limits(163 << 10, 164 << 10, 64, 32, 108),  # A100
    "sm_89": Limits(99 << 10, 100 << 10, 48, 24, 142),  # L40S
    "sm_90": Limits(227 << 10, 228 << 10, 64, 32, 132),  # H100, H200
    "sm_100": Limits(227 << 10, 228 << 10, 64, 32, 148),  # B200
}


@dataclass
class Kernel:
    """A compiled kernel and what was asked of it, or the ``error`` instead.

    Attributes:
        tiles: its entry of the table.
        dots: matrix products in the source as (rows, columns, depth, operand dtype).
        registers: per thread; of a warp-specialised kernel what it starts with.
        serialised: matrix products that ptxas made wait for one another (its notes C7510 and the like).
        blocks_per_multiprocessor: the most that fit at once, by registers, shared memory and warps.
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
    serialised: int = 0
    blocks_per_multiprocessor: int = 0


def blocks_per_multiprocessor(architecture: str, registers: int, shared_bytes: int, warps: int) -> int:
    """How many blocks of a kernel fit on a multiprocessor at once.

    Registers are handed out to warps by 256, shared memory by 128 bytes, of which the system takes 1 KiB a block.
    """
    limits = LIMITS[architecture]
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    shared = -(-(shared_bytes + 1024) // 128) * 128
    by_registers = REGISTERS // per_warp // warps
    return min(limits.blocks, limits.warps // warps, by_registers, limits.shared_per_multiprocessor // shared)


def read_kernel(compiled, log: str, **asked) -> Kernel:
    """The facts of a ``triton.CompiledKernel`` and of what ``ptxas -v`` printed about it."""
    ptx, ttir, metadata = compiled.asm["ptx"], compiled.asm["ttir"], compiled.metadata
    dots = re.findall(r"tt\.dot [^\n]*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>", ttir)
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", ptx)
    registers, warps = int(re.search(r"Used (\d+) registers", log)[1]), int(threads[1]) // 32
    return Kernel(
        **asked,
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
        serialised=len(re.findall(r"C75\d\d", log)),
        blocks_per_multiprocessor=blocks_per_multiprocessor(asked["architecture"], registers, metadata.shared, warps),
    )


class CompilingDriver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, architecture: str):
        self.capability = int(architecture.removeprefix("sm_"))

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # Triton keeps compiled kernels by device: one for each architecture

    def get_current_stream(self, device):
        return 0


@contextmanager
def _replaced(owner, name: str, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class LeftToTorch(Exception):
    """The table gives this class to torch: there is nothing to launch."""


@contextmanager
def launches(architecture: str, launch: Callable, tiles: dict | None = None) -> Iterator[dict]:
    """Within, ops given CPU tensors choose what they would on a GPU of ``architecture`` and launch nothing.

    Instead ``launch(asked, run)`` is called, where ``run(afresh)`` returns the compiled kernel, from Triton's cache if
    it is there and ``afresh`` false. ``asked`` is the entry that the op looked up last: its op, shape_class and tiles.
    ``tiles`` are tried in place of the table's for the classes named: {(op, shape class): tiles}.
    """
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run, look_up, asked = JITFunction.run, configs.tiles, {}

    def tiles_of(op, shape_class, device):
        entry = (tiles or {}).get((op, shape_class)) or look_up(op, shape_class, device)
        asked.update(op=op, shape_class=shape_class, tiles=entry)
        if entry is None:
            raise LeftToTorch
        return dict(entry)

    def instead(function, *args, grid, warmup, **kwargs):
        def compiled(afresh=False):
            if afresh:
                function.device_caches.clear()
            with knobs.compilation.scope():
                knobs.compilation.always_compile = afresh
                return run(function, *args, grid=grid, warmup=True, **kwargs)

        return launch(asked, compiled)

    previous = backend._chosen  # backend() would also tell the environment's, which is not to outlive a change of it
    with ExitStack() as stack:
        for replacement in (
            (driver, "_active", CompilingDriver(architecture)),
            (JITFunction, "run", instead),
            (backend, "INTERPRETED", True),  # what lets a CPU tensor have a kernel
            (configs, "architecture", lambda device: architecture),
            (configs, "multiprocessors", lambda device: LIMITS[architecture].multiprocessors),
            (configs, "tiles", tiles_of),
        ):
            stack.enter_context(_replaced(*replacement))
        stack.callback(backend.choose_backend, previous)
        backend.choose_backend("triton")
        yield asked


def _call(workload: Workload) -> None:
    function, arguments, options = workload.build(Values("cpu", workload.dtype, random=False))
    with suppress(LeftToTorch):
        function(*arguments, **options)


def classes(workload: Workload, architecture: str) -> list[tuple[str, str]]:
    """The (op, shape class) entries of the table that ``workload`` looks up, in order, each once.

    One that is given to torch ends the list: what would come behind it needs its result.
    """
    seen = {}
    with launches(architecture, lambda asked, run: seen.setdefault((asked["op"], asked["shape_class"]))) as asked:
        _call(workload)
    return list(dict.fromkeys([*seen, (asked["op"], asked["shape_class"])] if asked else seen))


def classes_of(
    workloads: Iterable[Workload], architecture: str, workers: int, deadline: float = math.inf
) -> list[tuple[Workload, list]]:
    """Each workload with its :func:`classes`, in their order; those that fail are told on stderr and have none."""
    workloads, found = list(workloads), {}
    jobs = [(workload, architecture) for workload in workloads]
    for (workload, _), names in in_processes(classes, jobs, workers, deadline):
        if isinstance(names, ChildProcessError):
            print(f"{workload.name}: which classes it belongs to is unknown: {names}", file=sys.stderr, flush=True)
        else:
            found[workload.name] = names
    return [(workload, found.get(workload.name, [])) for workload in workloads]


def compile_workload(architecture: str, workload: Workload, tiles: dict | None = None) -> list[Kernel]:
    """Every kernel that ``workload`` launches. An error of the compiler is its last kernel's ``error``."""
    kernels, asked = [], {}
    whose = dict(architecture=architecture, workloads=[workload.name])

    def launch(asked, run):
        compiled, log = _with_log(run)
        kernels.append(read_kernel(compiled, log, **whose, **asked))
        return compiled

    try:
        with launches(architecture, launch, tiles) as asked:
            _call(workload)
    except Exception as error:  # whatever a compiler may raise on a candidate
        asked = asked or dict(op=workload.op, shape_class="", tiles=None)
        kernels.append(Kernel(**whose, **asked, error=f"{type(error).__name__}: {error}"[:500]))
    return kernels


def _with_log(run) -> tuple:
    """A compiled kernel and what ptxas said of it; Triton caches kernels without, so it is put beside them."""
    from triton import knobs
    from triton.runtime.cache import get_cache_manager

    for afresh in (False, True):
        with knobs.nvidia.scope(), redirect_stdout(StringIO()) as output:
            knobs.nvidia.dump_ptxas_log = True
            compiled = run(afresh)
        cache, log = get_cache_manager(compiled.hash), output.getvalue()
        if "registers" in log:
            cache.put(log, "ptxas.log", binary=False)
            return compiled, log
        if cached := cache.get_file("ptxas.log"):
            return compiled, Path(cached).read_text()
    raise RuntimeError(f"ptxas printed nothing about {compiled.metadata.name}")


PATIENCE = 300.0
"""Seconds that one job of :func:`in_processes` may take. A compiler takes a few; on some input it never ends."""


def in_processes(
    work: Callable, jobs: Iterable[tuple], workers: int, deadline: float = math.inf
) -> Iterator[tuple[tuple, object]]:
    """(job, ``work(*job)``) as they end, each in a forked process, ``workers`` side by side.

    Where a job raises, ends its process or takes longer than ``PATIENCE``, there is a :class:`ChildProcessError` in
    place of the result. At ``deadline``, of ``time.monotonic``, what runs is stopped and no other job is begun.
    """
    from triton.runtime.cache import triton_key

    triton_key()  # reads all of Triton: once, before the processes part
    jobs, running = iter(jobs), {}
    context = multiprocessing.get_context("fork")  # with torch imported already
    try:
        while True:
            while len(running) < workers and time.monotonic() < deadline and (job := next(jobs, None)) is not None:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work_and_send, args=(sender, work, job), daemon=True)
                process.start()
                sender.close()
                running[receiver] = job, process, min(deadline, time.monotonic() + PATIENCE)
            if not running:
                return
            soonest = min(until for *_, until in running.values())
            for receiver in wait(list(running), max(soonest - time.monotonic(), 0)):
                job, process, _ = running.pop(receiver)
                yield job, _received(receiver, process)
            for receiver in [late for late, (*_, until) in running.items() if until <= time.monotonic()]:
                job, process, until = running.pop(receiver)
                stop([process])
                reason = "the time was up" if until == deadline else f"the compiler took more than {PATIENCE:.0f} s"
                yield job, ChildProcessError(reason)
    finally:
        stop([process for _, process, _ in running.values()])


def _received(receiver: Connection, process) -> object:
    try:
        return receiver.recv()
    except EOFError:
        process.join(1)
        return ChildProcessError(f"the compiler ended its process (exit code {process.exitcode})")
    finally:
        process.join(1)
        stop([process])


def stop(processes: list) -> None:
    """End processes: first so that they may end their own, such as ptxas, then at once; a driver may hold one still."""
    for name, seconds in (("terminate", 1.0), ("kill", 5.0)):
        processes = [process for process in processes if process.is_alive()]
        for process in processes:
            getattr(process, name)()
        until = time.monotonic() + seconds
        for process in processes:
            process.join(max(until - time.monotonic(), 0))


def _work_and_send(sender: Connection, work: Callable, job: tuple) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, at which subprocess.run ends what it runs
    torch.set_num_threads(1)
    try:
        result = work(*job)
    except Exception as error:  # whatever an op may raise; of what compilers raise compile_workload knows more
        result = ChildProcessError(f"{type(error).__name__}: {error}"[:500])
    sender.send(result)
    sender.close()


def compile_all(
    jobs: Iterable[tuple], workers: int, deadline: float = math.inf
) -> Iterator[tuple[tuple, list[Kernel]]]:
    """(job, its kernels) as they end, for jobs that are arguments of :func:`compile_workload`."""
    for job, kernels in in_processes(compile_workload, jobs, workers, deadline):
        if isinstance(kernels, ChildProcessError):
            architecture, workload, tiles = job
            (op, shape_class), entry = next(iter((tiles or {}).items()), ((workload.op, ""), None))
            kernels = [Kernel(architecture, op, shape_class, entry, [workload.name], error=str(kernels))]
        yield job, kernels

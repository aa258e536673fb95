"""Static buffers that outlive a request, and the CUDA graphs captured over them.

A denoising step or a decoded token is a few hundred launches that differ only in the contents of their buffers. On CUDA
the first one runs eagerly, which compiles its kernels, the second is captured, and later ones are replayed in one
launch. Only the contents of the buffers may change between replays, so everything that varies (timestep, slots,
lengths, guidance, the token) is in a buffer. On other devices, with ``graphs=False`` or with ``BAGEL_RT_GRAPHS=0`` in
the environment, every step runs eagerly.
"""

import gc
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch

from bagel_rt.kernels.backend import backend
from bagel_rt.kernels.configs import supports

LIMIT = 16  # static buffers kept of one kind of work: a server sees a few image sizes and batch sizes
B = TypeVar("B")
Work = Callable[[], object]  # reads and writes static buffers; its result is ignored


class Captured(Protocol):
    """Captured work."""

    def replay(self) -> None:
        """Run the work again on the same addresses."""


class StaticBuffers(Generic[B]):
    """The buffers of one structure of work and the graphs captured over them.

    Attributes:
        buffers: what the work reads and writes; allocated once.
        graphs: name of the work -> the captured work.
        warmed_up: names of the work that has run eagerly.
    """

    def __init__(self, buffers: B) -> None:
        self.buffers = buffers
        self.graphs: dict[str, Captured] = {}
        self.warmed_up: set[str] = set()
        self.owner: Callable[[], object] | None = None  # returns None once the run is collected

    @property
    def in_use(self) -> bool:
        """Whether a run uses the buffers."""
        return self.owner is not None and self.owner() is not None

    def release(self) -> None:
        """Free the buffers for the next run, even if an exception still refers to this one."""
        self.owner = None


class GraphCache:
    """LRU cache of static buffers and the CUDA graphs captured over them.

    Attributes:
        captures: graphs captured so far.
        capture_seconds: time spent capturing them.
    """

    def __init__(self, capture: Callable[[Work], Captured] | None, limit: int = LIMIT) -> None:
        """``capture`` captures work; None runs all work eagerly. ``limit``: buffers kept of each kind of work."""
        self.capture = capture
        self.limit = limit
        self.captures, self.capture_seconds = 0, 0.0
        self._kept: OrderedDict[tuple[Hashable, ...], StaticBuffers[Any]] = OrderedDict()
        self._alive: weakref.WeakSet[StaticBuffers[Any]] = weakref.WeakSet()

    @classmethod
    def for_device(cls, device: torch.device, enabled: bool = True) -> "GraphCache":
        """A cache that captures on CUDA, except on GPUs that run the reference ops, which read results back."""
        enabled = enabled and os.environ.get("BAGEL_RT_GRAPHS") != "0"
        return cls(CUDACapture() if enabled and device.type == "cuda" and supports(device) else None)

    @contextmanager
    def borrow(self, key: tuple[Hashable, ...], make: Callable[[], B]) -> Iterator[StaticBuffers[B]]:
        """:meth:`acquire` for the duration of a block."""
        static = self.acquire(key, make, None)
        try:
            yield static
        finally:
            static.release()

    def acquire(self, key: tuple[Hashable, ...], make: Callable[[], B], owner: object | None) -> StaticBuffers[B]:
        """The buffers of a structure, in use until they are released or ``owner`` is collected.

        If another run uses them, this run gets new ones, which replace them in the cache.

        Args:
            key: the kind of work, then everything that shapes, addresses and launches depend on.
            make: allocates the buffers.
            owner: the run, weakly referenced; None if the caller always releases them.
        """
        found = self._kept.get(key)
        if found is None or found.in_use:
            found = self._kept[key] = StaticBuffers(make())
            self._alive.add(found)
        self._kept.move_to_end(key)
        same_kind = [other for other in self._kept if other[0] == key[0]]
        for oldest in same_kind[: len(same_kind) - self.limit]:
            del self._kept[oldest]
        found.owner = (lambda: True) if owner is None else weakref.ref(owner)
        return found

    def run(self, buffers: StaticBuffers[Any], name: str, work: Work) -> None:
        """Run work: eagerly the first time, captured the second, replayed from then on.

        Args:
            buffers: acquired by the caller.
            name: of the work, which is captured once for these buffers.
            work: reads and writes only the buffers and the model.

        Raises:
            RuntimeError: the work cannot be captured; the message names the remedy.
        """
        if self.capture is None or backend() == "reference":  # reference ops read results back
            work()
            return
        if name not in buffers.warmed_up:
            work()
            buffers.warmed_up.add(name)
            return
        if name not in buffers.graphs:
            start = time.perf_counter()
            buffers.graphs[name] = self.capture(work)
            self.captures += 1
            self.capture_seconds += time.perf_counter() - start
        buffers.graphs[name].replay()

    def invalidate(self) -> None:
        """Drop all graphs, because an address in them has changed; the buffers stay."""
        for buffers in self._alive:
            buffers.graphs.clear()

    def clear(self) -> None:
        """Drop all graphs and buffers; runs in progress keep theirs."""
        self.invalidate()
        self._kept.clear()

    @property
    def kept(self) -> int:
        """Number of buffers in the cache."""
        return len(self._kept)


class CapturedGraph:
    """A CUDA graph that is destroyed only after its last replay has finished."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()

    def __del__(self) -> None:
        torch.cuda.synchronize()


class CUDACapture:
    """Captures work as CUDA graphs that share one memory pool.

    Sharing is safe because graphs run one after another and no graph reads what another left in the pool.
    """

    def __init__(self) -> None:
        self._graphs: weakref.WeakSet[CapturedGraph] = weakref.WeakSet()
        self._pool: Any = None  # the handle of a memory pool

    def __call__(self, work: Work) -> CapturedGraph:
        """Capture the work without running it."""
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()  # a pool whose last graph is gone cannot be used again
        graph, stream, collects = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), gc.isenabled()
        gc.disable()  # a finalizer may synchronize, which ends a capture
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a failed capture leaves its own stream current
            self._graphs.clear()  # and the pool in an unknown state: the next capture starts a new one
            for cause in (error, error.__context__):  # after out-of-memory, ending the capture may fail as well
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
            raise RuntimeError(
                f"a step could not be captured as a CUDA graph: {error}. Load the model with graphs=False."
            ) from error
        finally:
            if collects:
                gc.enable()
        captured = CapturedGraph(graph)
        self._graphs.add(captured)
        return captured


def run_pipelined(device: torch.device, work: Iterable[Work]) -> Iterator[int]:
    """Run work in order; after each piece, yield the number of pieces that the device has finished.

    On CUDA the next piece is queued before the host waits for the previous one, so the device never waits for the host.
    At most two are queued, so the device stops soon after the caller stops iterating.
    """
    done, before = 0, None
    for call in work:
        call()
        if device.type == "cuda":
            event = torch.cuda.Event(blocking=True)
            event.record()
            before, event = event, before
            if event is None:
                continue
            event.synchronize()
        done += 1
        yield done
    if before is not None:
        before.synchronize()
        yield done + 1

"""Work that repeats, at fixed addresses: buffers that outlive a request, and the CUDA graphs captured over them.

A step of a denoising, or of a text, is a few hundred launches that are the same every time but for the numbers in its
buffers. On CUDA it is run once as it is, which compiles its kernels, then captured, and from then on replayed: one
launch. Nothing but the buffers' contents may change between replays, so whatever varies (timestep, slots, lengths,
guidance, the token) lies in a buffer. Elsewhere, with ``graphs=False``, and with ``BAGEL_RT_GRAPHS=0`` in the
environment, the same work runs as it is.
"""

import gc
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator

import torch

from bagel_rt.kernels.backend import backend
from bagel_rt.kernels.configs import supports

LIMIT = 16  # workspaces of a kind that are kept: a server sees a few image sizes, and as many sizes of batches


class StaticBuffers:
    """Buffers of one structure of work, and what was captured over them.

    Attributes:
        buffers: whatever the work reads and writes; made once.
        graphs: name of the work -> its captured form, with ``replay()``.
    """

    def __init__(self, buffers):
        self.buffers = buffers
        self.graphs: dict[str, object] = {}
        self.ran: set[str] = set()  # names of the work that ran as it is
        self.owner: weakref.ref | None = None

    @property
    def taken(self) -> bool:
        """Whether the run that uses it goes on."""
        return self.owner is not None and self.owner() is not None

    def give_back(self) -> None:
        """The run is over, though an exception may still refer to it."""
        self.owner = None


class GraphCache:
    """Workspaces by structure, the least recently used of each kind given up first; and the capturing of work.

    Attributes:
        captures: graphs captured so far.
        capture_seconds: what they took.
    """

    def __init__(self, capture: Callable[[Callable[[], None]], object] | None, limit: int = LIMIT):
        """``capture`` turns work into an object with ``replay()``; None runs all work as it is."""
        self.capture = capture
        self.limit = limit
        self.captures, self.capture_seconds = 0, 0.0
        self._kept: OrderedDict[tuple, StaticBuffers] = OrderedDict()
        self._alive: weakref.WeakSet[StaticBuffers] = weakref.WeakSet()

    @classmethod
    def on(cls, device: torch.device, enabled: bool = True) -> "GraphCache":
        """Those of a device: CUDA graphs, or none on a CPU and on GPUs where references, which read back, run."""
        enabled = enabled and os.environ.get("BAGEL_RT_GRAPHS") != "0"
        return cls(CUDACapture() if enabled and device.type == "cuda" and supports(device) else None)

    def workspace(self, key: tuple[Hashable, ...], make: Callable[[], object], owner) -> StaticBuffers:
        """The workspace of a structure, until it is given back or its owner gone; another if it is taken.

        Args:
            key: the kind of the work, and all that shapes, addresses and launches depend on.
            make: makes the buffers.
            owner: the run, weakly referenced.
        """
        found = self._kept.get(key)
        if found is None or found.taken:
            found = self._kept[key] = StaticBuffers(make())
            self._alive.add(found)
        self._kept.move_to_end(key)
        same_kind = [other for other in self._kept if other[0] == key[0]]
        for oldest in same_kind[: len(same_kind) - self.limit]:
            del self._kept[oldest]
        found.owner = weakref.ref(owner)
        return found

    def run(self, workspace: StaticBuffers, name: str, work: Callable[[], None]) -> None:
        """Do the work of that name: as it is the first time, captured and replayed from the second on.

        Raises:
            RuntimeError: it cannot be captured; the message says how to do without.
        """
        if self.capture is None or backend() == "reference":  # references read back
            return work()
        if name not in workspace.ran:
            work()
            workspace.ran.add(name)
            return
        if name not in workspace.graphs:
            start = time.perf_counter()
            workspace.graphs[name] = self.capture(work)
            self.captures += 1
            self.capture_seconds += time.perf_counter() - start
        workspace.graphs[name].replay()

    def forget(self) -> None:
        """Give up what was captured, because an address in it has changed; workspaces stay."""
        for workspace in self._alive:
            workspace.graphs.clear()

    def clear(self) -> None:
        """Give up everything, memory included; runs that exist keep theirs."""
        self.forget()
        self._kept.clear()

    @property
    def kept(self) -> int:
        """Workspaces kept."""
        return len(self._kept)


class CapturedGraph:
    """A CUDA graph; it ends when nobody holds it, not before what it does is done."""

    def __init__(self, graph: torch.cuda.CUDAGraph):
        self._graph = graph

    def replay(self) -> None:
        """Do the work, on the current stream."""
        self._graph.replay()

    def __del__(self):
        torch.cuda.synchronize()


class CUDACapture:
    """Captures work as CUDA graphs that share one pool of memory: they run one after another, and leave nothing in it
    that another would need."""

    def __init__(self):
        self._graphs: weakref.WeakSet = weakref.WeakSet()
        self._pool = None

    def __call__(self, work: Callable[[], None]) -> CapturedGraph:
        """The graph of the work, which is not done by capturing it."""
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()  # a pool that lost its last graph cannot be used again
        graph, stream, collects = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), gc.isenabled()
        gc.disable()  # what it frees may wait for the device, which ends a capture
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a capture that does not end well leaves its own
            self._graphs.clear()  # and perhaps a pool of which nothing is known
            for cause in (error, error.__context__):  # ending a capture that ran out of memory may fail as well
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
            raise RuntimeError(
                f"a step could not be captured as a CUDA graph ({error}); load the model with graphs=False to run "
                "without"
            ) from error
        finally:
            if collects:
                gc.enable()
        captured = CapturedGraph(graph)
        self._graphs.add(captured)
        return captured


def run_pipelined(device: torch.device, work: Iterable[Callable[[], None]]) -> Iterator[int]:
    """Do work in order; yield how much of it the device has finished, each time that one more is.

    On CUDA the next one is queued before the last one is waited for, so that the device never waits for the host, and
    never more than two, so that whoever stops iterating stops the device too.
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

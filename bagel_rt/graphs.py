"""Work that repeats, at fixed addresses: buffers that outlive a request, and the CUDA graphs captured over them.

A step of a denoising, or of a text, is a few hundred launches that are the same every time but for the numbers in its
buffers. On CUDA it is run once as it is, which compiles its kernels, then captured, and from then on replayed: one
launch. Nothing but the buffers' contents may change between replays, so whatever varies (timestep, slots, lengths,
guidance, the token) lies in a buffer. Elsewhere, with ``graphs=False``, and with ``BAGEL_RT_GRAPHS=0`` in the
environment, the same work runs as it is.
"""

import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator

import torch

from bagel_rt.kernels.backend import backend
from bagel_rt.kernels.configs import supports

LIMIT = 16  # workspaces kept: a server sees a few image sizes and batch sizes, each with a graph or two


class Workspace:
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
        """Whether the run that uses it still exists."""
        return self.owner is not None and self.owner() is not None


class Graphs:
    """Workspaces by structure, the least recently used given up first; and the capturing of work over them.

    Attributes:
        captures: graphs captured so far.
        capture_seconds: what they took.
    """

    def __init__(self, capture: Callable[[Callable[[], None]], object] | None, limit: int = LIMIT):
        """``capture`` turns work into an object with ``replay()``; None runs all work as it is."""
        self.capture = capture
        self.limit = limit
        self.captures, self.capture_seconds = 0, 0.0
        self._kept: OrderedDict[Hashable, Workspace] = OrderedDict()
        self._alive: weakref.WeakSet[Workspace] = weakref.WeakSet()

    @classmethod
    def on(cls, device: torch.device, enabled: bool = True) -> "Graphs":
        """Those of a device: CUDA graphs, or none on a CPU and on GPUs where references, which read back, run."""
        enabled = enabled and os.environ.get("BAGEL_RT_GRAPHS") != "0"
        return cls(CUDACapture() if enabled and device.type == "cuda" and supports(device) else None)

    def workspace(self, key: Hashable, make: Callable[[], object], owner) -> Workspace:
        """The workspace of a structure, taken by ``owner`` as long as that exists; another if it is taken.

        Args:
            key: all that shapes, addresses and launches depend on.
            make: makes the buffers.
            owner: the run, weakly referenced.
        """
        found = self._kept.get(key)
        if found is None or found.taken:
            found = self._kept[key] = Workspace(make())
            self._alive.add(found)
        self._kept.move_to_end(key)
        while len(self._kept) > self.limit:
            _drop_graphs(self._kept.popitem(last=False)[1])
        found.owner = weakref.ref(owner)
        return found

    def run(self, workspace: Workspace, name: str, work: Callable[[], None]) -> None:
        """Do the work of that name: as it is the first time, captured and replayed from the second on.

        Raises:
            RuntimeError: it cannot be captured; the message says how to do without.
        """
        if self.capture is None or name not in workspace.ran or backend() == "reference":
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
            _drop_graphs(workspace)

    def clear(self) -> None:
        """Give up everything, memory included; runs that exist keep theirs."""
        self.forget()
        self._kept.clear()


def _drop_graphs(workspace: Workspace) -> None:
    if workspace.graphs and torch.cuda.is_initialized():
        torch.cuda.synchronize()  # a graph must not go while it runs
    workspace.graphs.clear()


class CUDACapture:
    """Captures work as CUDA graphs that share one pool of memory: they run one after another, and leave nothing in it
    that another would need."""

    def __init__(self):
        self._graphs: weakref.WeakSet = weakref.WeakSet()
        self._pool = None

    def __call__(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The graph of the work, which is not done by capturing it."""
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()  # a pool that lost its last graph cannot be used again
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            for cause in (error, error.__context__):  # ending a capture that ran out of memory may fail as well
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
            raise RuntimeError(
                f"a step could not be captured as a CUDA graph ({error}); load the model with graphs=False to run "
                "without"
            ) from error
        self._graphs.add(graph)
        return graph


def in_step(device: torch.device, work: Iterable[Callable[[], None]]) -> Iterator[int]:
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

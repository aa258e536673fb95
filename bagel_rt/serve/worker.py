"""The thread that owns the model: requests wait in a bounded queue, pictures of equal size are drawn together.

A job is begun by the event loop and done by the thread; what happens to it goes back to the loop as events. A job ends
in exactly one way: with a result, with an error, or cancelled by whoever waits for it.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import closing
from dataclasses import dataclass, field

import torch

from bagel_rt.pipeline import Bagel
from bagel_rt.request import Cancelled, ImageResult, Progress, Request


class Busy(Exception):
    """The queue is full."""


class Stopping(Exception):
    """The server is going down; the request was not done."""


class Late(Exception):
    """The request took longer than is allowed."""


@dataclass(eq=False)
class Job:
    """One request on its way.

    Attributes:
        request: checked.
        kind: "picture", "text" or "interleaved".
        deadline: by ``time.monotonic``.
        together: jobs of equal value may be drawn together; None for alone.
        events: what happens, in order: ("text", piece), ("progress", Progress), ("result", value), ("error", exception).
    """

    request: Request
    kind: str
    deadline: float
    together: Hashable = None
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    ended: bool = False

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.cancelled.set()

    @property
    def unwanted(self) -> bool:
        """Whether nothing is gained by going on."""
        return self.cancelled.is_set() or time.monotonic() > self.deadline

    def tell(self, kind: str, value) -> None:
        """Let the loop know; from any thread. After the end nothing more is told."""
        if self.ended:
            return
        self.ended = kind in ("result", "error")
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, (kind, value))
        except RuntimeError:  # the loop is closed: nobody listens
            self.cancelled.set()

    async def listen(self) -> AsyncIterator[tuple[str, object]]:
        """Events up to the result. Whoever stops listening has cancelled the job.

        Raises:
            Late, Stopping, Exception: what ended the job in place of a result.
        """
        try:
            while True:
                left = self.deadline - time.monotonic()
                try:
                    kind, value = await asyncio.wait_for(self.events.get(), max(left, 0.001))
                except asyncio.TimeoutError:
                    raise Late from None
                if kind == "error":
                    raise value
                yield kind, value
                if kind == "result":
                    return
        finally:
            self.cancel()


class Worker:
    """The model's thread.

    Attributes:
        failure: what ended the thread though nobody asked it to; None while all is well.
    """

    def __init__(self, bagel: Bagel, queue: int, batch: int, observe: Callable[[str, float], None] = lambda *_: None):
        """
        Args:
            bagel: used by the thread alone from now on, but for its checks.
            queue: jobs that may wait.
            batch: pictures that are drawn together at most.
            observe: called with what is worth counting: ("batch", jobs), ("waited", seconds).
        """
        self._bagel, self._limit, self._batch, self._observe = bagel, queue, batch, observe
        self._waiting: deque[tuple[Job, float]] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="bagel_rt", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that the model works on."""
        return len(self._running)

    def submit(self, jobs: list[Job]) -> None:
        """Queue jobs, all or none of them.

        Raises:
            Busy: there is no room.
            Stopping: no more are taken.
        """
        with self._changed:
            if self._stopping or self.failure is not None:
                raise Stopping
            wanted = sum(not job.unwanted for job, _ in self._waiting)
            if wanted + len(jobs) > self._limit:
                raise Busy
            now = time.monotonic()
            self._waiting.extend((job, now) for job in jobs)
            self._changed.notify()

    def refuse(self) -> None:
        """Take no more jobs; those that wait and run go on."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def stop(self, grace: float) -> None:
        """End the thread: jobs have ``grace`` seconds, then they fail with :class:`Stopping`. Blocks."""
        self.refuse()
        self._thread.join(grace)
        with self._changed:
            for job in [*(job for job, _ in self._waiting), *self._running]:
                job.tell("error", Stopping())
                job.cancel()
        self._thread.join(grace)

    def _run(self) -> None:
        try:
            while jobs := self._next():
                self._running = jobs
                try:
                    self._work(jobs)
                finally:
                    self._running = []
        except BaseException as error:
            self.failure = error
            with self._changed:
                for job, _ in self._waiting:
                    job.tell("error", Stopping())
                self._waiting.clear()
            raise

    def _next(self) -> list[Job]:
        """The next jobs to do together; none when the thread is to end."""
        with self._changed:
            while True:
                while self._waiting and self._waiting[0][0].unwanted:
                    self._end_unwanted(self._waiting.popleft()[0])
                if self._waiting:
                    break
                if self._stopping:
                    return []
                self._changed.wait()
            first, since = self._waiting.popleft()
            chosen, kept, waited = [first], deque(), [since]
            while self._waiting:
                job, since = self._waiting.popleft()
                if len(chosen) < self._batch and first.together is not None and job.together == first.together:
                    chosen.append(job)
                    waited.append(since)
                else:
                    kept.append((job, since))
            self._waiting = kept
        now = time.monotonic()
        for since in waited:
            self._observe("waited", now - since)
        self._observe("batch", len(chosen))
        return chosen

    @staticmethod
    def _end_unwanted(job: Job) -> None:
        job.tell("error", Late() if not job.cancelled.is_set() else Cancelled())

    def _work(self, jobs: list[Job]) -> None:
        """Do jobs; whatever goes wrong is theirs."""
        engine = self._bagel.engine

        def progress(step: Progress) -> None:
            for job in jobs:
                if job.unwanted:
                    self._end_unwanted(job)
                else:
                    job.tell("progress", step)
            if all(job.ended for job in jobs):
                raise Cancelled

        try:
            requests = [job.request for job in jobs]
            if jobs[0].kind == "text":
                self._write(jobs[0], progress)
            elif jobs[0].kind == "interleaved":
                jobs[0].tell("result", engine.run_interleaved(requests[0], progress))
            else:
                results: list[ImageResult] = engine.run_images(requests, progress)
                for job, result in zip(jobs, results, strict=True):
                    job.tell("result", result)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                self._bagel.release_memory()
            for job in jobs:
                job.tell("error", error)

    def _write(self, job: Job, progress) -> None:
        count = 0

        def counted(step: Progress) -> None:
            nonlocal count
            count = step.step
            progress(step)

        with closing(self._bagel.engine.run_answer(job.request, counted)) as pieces:
            for piece in pieces:
                job.tell("text", piece)
        job.tell("result", count)

"""The thread that owns the model: requests wait in a bounded queue, pictures of equal size are drawn together.

A job is begun and listened to in the event loop, and done by the thread. It ends in exactly one way: with a result,
with an error, or cancelled by whoever waited for it. What goes wrong in the model is written to the log here, and only
its name goes on: an exception of the model would keep the frames, and so the tensors, that it passed through.
"""

import asyncio
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Hashable
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch

from bagel_rt.errors import Cancelled
from bagel_rt.pipeline import Bagel
from bagel_rt.request import ImageResult, Progress, Request

log = logging.getLogger("bagel_rt.serve")


class Busy(Exception):
    """The queue is full."""


class Stopping(Exception):
    """The server is going down, or its model is lost; the request was not done."""


class Late(Exception):
    """The request took longer than is allowed."""


class Failed(Exception):
    """The model failed at the request.

    Attributes:
        name: what the log calls it.
        memory: whether memory ran out.
    """

    def __init__(self, name: str, memory: bool):
        super().__init__(name)
        self.name, self.memory = name, memory


@dataclass(frozen=True)
class Written:
    """What a chat came to.

    Attributes:
        parts: of an interleaved answer, in order; a text alone was told piece by piece.
        tokens: of all its texts.
        cut: whether the last text ended because it had all the tokens that it may have.
    """

    parts: list[str | ImageResult]
    tokens: int
    cut: bool


@dataclass(eq=False)
class Job:
    """One request on its way. Made in the event loop, which alone touches what has not been listened to yet.

    Attributes:
        request: checked.
        kind: "picture", "text" or "interleaved".
        deadline: by ``time.monotonic``.
        together: jobs of equal value may be drawn together; None for alone.
        cancelled: nobody waits for it any more.
        ended: its end has been told.
    """

    request: Request
    kind: str
    deadline: float
    together: Hashable = None
    cancelled: bool = False
    ended: bool = False
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _pieces: list[str] = field(default_factory=list)
    _end: tuple[str, object] | None = None

    def cancel(self) -> None:
        """Nobody waits for it any more; from any thread."""
        self.cancelled = True

    @property
    def unwanted(self) -> bool:
        """Whether nothing is gained by going on."""
        return self.cancelled or self.ended or time.monotonic() > self.deadline

    def tell(self, kind: str, value) -> None:
        """Let the loop know; from any thread. After the end nothing more is told.

        Args:
            kind: "text" for a piece, "result" or "error" for the end.
            value: a str; an :class:`ImageResult` or :class:`Written`; an exception made for this job alone.
        """
        if self.ended:
            return
        if kind != "text":  # which another thread may have told meanwhile: never False again
            self.ended = True
        try:
            self._loop.call_soon_threadsafe(self._take, kind, value)
        except RuntimeError:  # the loop is closed: nobody listens
            self.cancel()

    def _take(self, kind: str, value) -> None:
        if kind == "text":
            self._pieces.append(value)
        elif self._end is None:
            self._end = (kind, value)
        self._arrived.set()

    async def listen(self, silence: float | None = None) -> AsyncGenerator[tuple[str, object], None]:
        """("text", what is new of a text) as often as there is any, at last ("result", value). To be closed: whoever
        stops listening has cancelled the job. For one listener: who is slow gets several pieces as one.

        Args:
            silence: seconds after which ("silence", None) says that there is nothing yet; None for never.

        Raises:
            Cancelled, Late, Stopping, Failed: what ended the job in place of a result.
        """
        left = max(0.0, self.deadline - time.monotonic())
        alarm = self._loop.call_later(left, lambda: self._take("error", Late()))
        try:
            while True:
                if self._pieces:
                    text, self._pieces = "".join(self._pieces), []
                    yield "text", text
                elif self._end is not None:
                    (kind, value), self._end = self._end, None
                    break
                else:
                    try:
                        await asyncio.wait_for(self._arrived.wait(), silence)
                    except asyncio.TimeoutError:
                        yield "silence", None
                        continue
                    self._arrived.clear()
            try:
                if kind == "error":
                    raise value
                yield kind, value
            finally:
                del value  # an exception that its own frames hold lives until the garbage collector comes by
        finally:
            alarm.cancel()
            self.cancel()


class Worker:
    """The model's thread.

    Attributes:
        failure: what ended the thread though nobody asked it to; None while all is well.
        stopping: no more jobs are taken.
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
        self.stopping = False
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
        """Queue jobs, all or none of them. An empty queue takes any number: it will not have more room later.

        Raises:
            Busy: there is no room.
            Stopping: no more are taken.
        """
        with self._changed:
            if self.stopping or self.failure is not None:
                raise Stopping
            self._drop_unwanted()
            if self._waiting and len(self._waiting) + len(jobs) > self._limit:
                raise Busy
            now = time.monotonic()
            self._waiting.extend((job, now) for job in jobs)
            self._changed.notify()

    def refuse(self) -> None:
        """Take no more jobs; those that wait and run go on."""
        with self._changed:
            self.stopping = True
            self._changed.notify()

    def stop(self, grace: float) -> None:
        """End the thread: jobs have ``grace`` seconds, then they fail with :class:`Stopping`. Blocks, up to ``grace``
        seconds more for the step that the model is at."""
        self.refuse()
        self._thread.join(grace)
        with self._changed:
            self._end_all()
        self._thread.join(grace)

    def _run(self) -> None:
        try:
            device = self._bagel.model.device
            if device.type == "cuda":
                torch.cuda.set_device(device)  # every thread has a current device of its own
            while jobs := self._next():
                self._work(jobs)
                self._running = jobs = []  # nothing of theirs is kept while the next are waited for
        except BaseException as error:
            log.critical("the model's thread has ended", exc_info=error)
            with self._changed:
                self.failure = error.with_traceback(None)
                self._end_all()
                self._waiting.clear()
                self._running = []

    def _end_all(self) -> None:
        for job in [*(job for job, _ in self._waiting), *self._running]:
            job.tell("error", Stopping())
            job.cancel()

    def _check_device(self) -> None:
        """Raise what CUDA has against going on: some errors end every later call of the process as well."""
        if self._bagel.model.device.type == "cuda":
            torch.cuda.synchronize()

    def _next(self) -> list[Job]:
        """The next jobs to do together; none when the thread is to end."""
        with self._changed:
            while True:
                self._drop_unwanted()
                if self._waiting:
                    break
                if self.stopping:
                    return []
                self._changed.wait()
            first, since = self._waiting.popleft()
            chosen, kept, waited = [first], deque(), [since]
            for job, since in self._waiting:
                if len(chosen) < self._batch and first.together is not None and job.together == first.together:
                    chosen.append(job)
                    waited.append(since)
                else:
                    kept.append((job, since))
            self._waiting, self._running = kept, chosen
        now = time.monotonic()
        for since in waited:
            self._observe("waited", now - since)
        self._observe("batch", len(chosen))
        return chosen

    def _drop_unwanted(self) -> None:
        """Take out of the queue what nobody waits for; it would hold pictures and room."""
        for job, _ in self._waiting:
            if job.unwanted:
                _end_unwanted(job)
        if any(job.ended for job, _ in self._waiting):
            self._waiting = deque(entry for entry in self._waiting if not entry[0].ended)

    def _work(self, jobs: list[Job]) -> None:
        """Do jobs, each of which ends. Of several that fail together each is tried alone: one of them spoils it for
        the others, or all of them are too large for the memory."""
        failed = None
        try:
            self._do(jobs)
        except Cancelled:
            for job in jobs:
                job.tell("error", Cancelled())
        except Exception as error:
            failed = Failed(uuid.uuid4().hex[:12], isinstance(error, torch.OutOfMemoryError))
            log.error("error %s in %d request(s)", failed.name, len(jobs), exc_info=error)
        if failed is None:
            return
        if failed.memory:
            self._bagel.release_memory()
        self._check_device()
        if len(jobs) == 1:
            jobs[0].tell("error", failed)
            return
        for job in jobs:
            if job.unwanted:
                _end_unwanted(job)
            else:
                self._work([job])

    def _do(self, jobs: list[Job]) -> None:
        tokens = last = 0

        def progress(step: Progress) -> None:
            nonlocal tokens, last
            if step.stage == "text":
                tokens, last = tokens + 1, step.step
            for job in jobs:
                if job.unwanted:
                    _end_unwanted(job)
            if all(job.ended for job in jobs):
                raise Cancelled

        engine, first = self._bagel.engine, jobs[0]
        if first.kind == "picture":
            results = engine.run_images([job.request for job in jobs], progress)
            for job, result in zip(jobs, results, strict=True):
                job.tell("result", _on_host(result))
            return
        parts = []
        if first.kind == "interleaved":
            parts = [_on_host(part) for part in engine.run_interleaved(first.request, progress)]
        else:
            with closing(engine.run_answer(first.request, progress)) as pieces:
                for piece in pieces:
                    first.tell("text", piece)
        first.tell("result", Written(parts, tokens, last >= first.request.text.max_think_token_n - 1))


def _on_host(part: str | ImageResult) -> str | ImageResult:
    """Without memory of the device, which no other thread is to free: this one may be capturing a graph."""
    return replace(part, latents=part.latents.cpu()) if isinstance(part, ImageResult) else part


def _end_unwanted(job: Job) -> None:
    job.tell("error", Cancelled() if job.cancelled else Late())

"""Jobs of the HTTP server: requests that run in the model thread and deliver text and results to an event loop."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from bagel_rt.engine import Engine
from bagel_rt.errors import NonFiniteError
from bagel_rt.model_thread import DeadlineExceeded, Job, ModelThread
from bagel_rt.pipeline import Bagel
from bagel_rt.request import ImageRequest, ImageResult, InterleavedRequest, Progress, Request
from bagel_rt.serve.request_log import REQUEST_ID
from bagel_rt.serve.stops import StoppedText

log = logging.getLogger("bagel_rt.serve")


@dataclass(eq=False)
class Failed(Exception):
    """The model failed at the request.

    Attributes:
        name: identifies the error in the log.
        memory: whether the device was out of memory.
        reason: what clients may know of the error; empty if it is internal.
    """

    name: str
    memory: bool
    reason: str = ""


@dataclass(frozen=True)
class Completion:
    """Result of a chat.

    Attributes:
        parts: of an interleaved answer, in order; empty for a text, which was published piece by piece.
        tokens: number of tokens in all texts.
        cut: whether the last text ended at its token limit.
    """

    parts: list[str | ImageResult]
    tokens: int
    cut: bool


T = TypeVar("T")
R = TypeVar("R", ImageResult, Completion)


class AsyncJob(Job, Generic[R]):
    """One request, created in the event loop that awaits its result.

    Attributes:
        request: checked.
        stops: texts that end the answer.
        request_id: of the HTTP request.
        first_piece_at: when the first piece of text was published, on the clock of ``time.monotonic``; or None.
        result: an ImageResult or a Completion; set when :meth:`listen` ends.
    """

    result: R

    def __init__(self, request: Request, deadline: float, batch_key: Hashable = None, stops: Sequence[str] = ()):
        super().__init__(deadline, batch_key)
        self.request, self.stops, self.request_id = request, stops, REQUEST_ID.get()
        self.first_piece_at: float | None = None
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
        # Only the event loop touches what has arrived.
        self._pieces: list[str] = []
        self._outcome: list[R | Exception] = []  # empty or one

    def publish(self, piece: str) -> None:
        """Send a piece of text, if it is not empty, to the event loop, from any thread."""
        if piece and not self.ended:
            self.first_piece_at = self.first_piece_at or time.monotonic()
            self._send(self._pieces, piece)

    def deliver(self, outcome: Any) -> None:
        self._send(self._outcome, outcome)

    def _send(self, where: list[T], value: T) -> None:
        def arrive() -> None:
            where.append(value)
            self._arrived.set()

        try:
            self._loop.call_soon_threadsafe(arrive)
        except RuntimeError:  # the loop is closed: nothing receives it
            self.ended = True

    async def finish(self) -> R:
        """Wait for the result. Raises as :meth:`listen`."""
        async with aclosing(self.listen()) as pieces:
            async for _ in pieces:
                pass
        return self.result

    async def listen(self, silence: float | None = None) -> AsyncGenerator[str | None, None]:
        """Yield the published text in pieces, then set ``result``. For one listener, which must close the generator;
        closing it early cancels the job. A slow listener gets several pieces as one.

        Args:
            silence: yield None after this many seconds without a piece; by default never.

        Raises:
            Cancelled, DeadlineExceeded, Stopping, Failed: how the job ended instead.
        """
        left = max(0.0, self.deadline - time.monotonic())
        alarm = self._loop.call_later(left, lambda: self.end(DeadlineExceeded()))
        try:
            while self._pieces or not self._outcome:
                if self._pieces:
                    text = "".join(self._pieces)
                    self._pieces.clear()
                    yield text
                    continue
                try:
                    await asyncio.wait_for(self._arrived.wait(), silence)
                except asyncio.TimeoutError:
                    yield None
                    continue
                self._arrived.clear()
            outcome = self._outcome.pop()
            if not isinstance(outcome, Exception):
                self.result = outcome
                return
            try:
                raise outcome
            finally:
                del outcome  # break the cycle of an exception and its own frame, which would keep the job alive
        finally:
            alarm.cancel()
            self.cancel()


def start_worker(
    bagel: Bagel, queue: int, batch: int, observe: Callable[[str, float], None] | None = None
) -> ModelThread:
    """Start a thread for :class:`AsyncJob`; arguments as of :class:`~bagel_rt.model_thread.ModelThread`."""
    return ModelThread(bagel, partial(_run, bagel.engine), _log_failure, queue, batch, observe)


def _log_failure(error: Exception, jobs: Sequence[AsyncJob]) -> Failed:
    """Log the error. Its frames would keep the model's tensors, so the jobs get an exception without them."""
    reason = str(error) if isinstance(error, NonFiniteError) else ""
    failed = Failed(uuid.uuid4().hex[:12], isinstance(error, torch.OutOfMemoryError), reason)
    ids = ", ".join(sorted({job.request_id for job in jobs}))
    log.error("error %s in request %s", failed.name, ids, exc_info=error)
    return failed


def _run(engine: Engine, jobs: list[AsyncJob], check: Callable[[], None]) -> Sequence[ImageResult | Completion]:
    tokens = last = 0

    def progress(step: Progress) -> None:
        nonlocal tokens, last
        if step.stage == "text":
            tokens, last = tokens + 1, step.step
        check()

    first, request = jobs[0], jobs[0].request
    parts: list[str | ImageResult] = []
    stopped = False
    if isinstance(request, InterleavedRequest):
        for part in engine.run_interleaved(request, progress):
            if isinstance(part, str):
                text = StoppedText(first.stops)
                part, stopped = text.feed(part) + text.finish(), text.stopped
                parts.append(part)
            else:
                parts.append(_to_host(part))
            if stopped:
                break
    elif images := [job.request for job in jobs if isinstance(job.request, ImageRequest)]:
        return [_to_host(result) for result in engine.run_images(images, progress)]
    else:
        text = StoppedText(first.stops)
        with closing(engine.run_answer(request, progress)) as pieces:
            for piece in pieces:
                first.publish(text.feed(piece))
                if text.stopped:
                    break
        first.publish(text.finish())
        stopped = text.stopped
    return [Completion(parts, tokens, not stopped and last >= request.text.max_think_token_n - 1)]


def _to_host(result: ImageResult) -> ImageResult:
    """Copy latents to the host: only the model thread may free device memory, since it may be capturing a graph."""
    return replace(result, latents=result.latents.cpu())

"""Requests of the page: they run in the model thread, one at a time, and are watched while they run.

A viewer that looks rarely sees the newest state, never a backlog.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from PIL import Image

from bagel_rt.errors import Cancelled, NonFiniteError
from bagel_rt.model_thread import Busy, Job, ModelThread, Stopping
from bagel_rt.pipeline import Bagel
from bagel_rt.request import Progress, ProgressCallback

MAX_JOBS = 32  # running and waiting; each has a thread of the web server
_PAUSE = 0.05  # seconds between two views
_PREVIEW_PAUSE = 0.2  # minimum seconds between two previews
_PREVIEW_SHARE = 5  # previews take at most 1 / this of the time
_CLOSE_SECONDS = 60.0  # for the step that the model is at
_LOG = logging.getLogger("bagel_rt.ui")
_LESS_MEMORY = "Choose a smaller image, or fewer images at once."
_EXPLANATIONS: dict[type[BaseException], str] = {
    Busy: f"{MAX_JOBS} requests are running or waiting. Try again later.",
    Stopping: "The model takes no more requests. Restart bagel-rt ui.",
}
T = TypeVar("T")
Key = tuple[Hashable, str]  # page and task
Call = Callable[[ProgressCallback], T]  # a call of the model, with its progress callback


@dataclass(frozen=True)
class View(Generic[T]):
    """State of a request at one moment.

    Attributes:
        stage: "waiting", "reading", "text" or "image" until it ends; then "done", "failed" or "cancelled".
        step, total: of a text or an image.
        ahead: number of requests before a waiting one.
        seconds: since the model started on it.
        parts: texts so far and previews of images, in order.
        result: of a request that is done.
        error: for the user, why the request failed.
    """

    stage: str
    step: int = 0
    total: int = 0
    ahead: int = 0
    seconds: float = 0.0
    parts: tuple[str | Image.Image, ...] = ()
    result: T | None = None
    error: str = ""

    @property
    def ended(self) -> bool:
        """Whether this is the last view."""
        return self.stage in ("done", "failed", "cancelled")

    @property
    def text(self) -> str:
        """The newest text, or an empty one."""
        return next((part for part in reversed(self.parts) if isinstance(part, str)), "")

    @property
    def image(self) -> Image.Image | None:
        """The newest preview."""
        return next((part for part in reversed(self.parts) if isinstance(part, Image.Image)), None)


class WatchedJob(Job, Generic[T]):
    """One request of a page, with the view of its state."""

    def __init__(self, call: Call[T], previews: bool, keep_last: bool):
        """
        Args:
            call: takes a progress callback, returns the result.
            previews: whether to decode previews of images.
            keep_last: whether to always decode an image's last step, for a chat in which that preview stays.
        """
        super().__init__()
        self._call, self._previews, self._keep_last = call, previews, keep_last
        self._changed = threading.Condition()
        self._view: View[T] = View("waiting")
        self._began = self._preview_due = 0.0
        self._stage_has_part = False

    def run(self, check: Callable[[], None]) -> T:
        """Run it in the model thread; ``check`` raises once it was cancelled."""
        self._began = time.monotonic()
        self._update(stage="reading")
        return self._call(partial(self._progress, check))

    def deliver(self, outcome: Any) -> None:
        if isinstance(outcome, Cancelled):
            self._update(stage="cancelled")
        elif isinstance(outcome, Exception):
            self._update(stage="failed", error=_EXPLANATIONS.get(type(outcome), str(outcome)))
        else:
            self._update(stage="done", result=outcome)

    def views(self, ahead: Callable[[], int]) -> Iterator[View[T]]:
        """Yield the state whenever it has changed, until the end. Closing the iterator cancels the request.

        Args:
            ahead: returns the number of requests before this one while it waits.
        """
        shown: View[T] | None = None
        shown_ahead = 0
        try:
            while shown is None or not shown.ended:
                view = self._wait_for_change(shown)
                waiting = ahead() if view.stage == "waiting" else 0
                if view is not shown or waiting != shown_ahead:
                    shown, shown_ahead = view, waiting
                    yield replace(view, ahead=waiting)
                    time.sleep(0 if view.ended else _PAUSE)
        finally:
            self.cancel()

    def _wait_for_change(self, shown: View[T] | None) -> View[T]:
        """Wait for a view that is not ``shown``, at most a second: the number of requests ahead may change."""
        with self._changed:
            self._changed.wait_for(lambda: self._view is not shown, timeout=1.0)
            return self._view

    def _progress(self, check: Callable[[], None], progress: Progress) -> None:
        check()
        if progress.stage != self._view.stage:
            self._stage_has_part = False
        parts, now = self._view.parts, time.monotonic()
        last = self._keep_last and progress.step == progress.total
        wanted = progress.stage == "text" or (self._previews and (last or now >= self._preview_due))
        if wanted and progress.preview is not None:
            part = progress.preview()[0]
            after = time.monotonic()
            self._preview_due = after + max(_PREVIEW_PAUSE, (_PREVIEW_SHARE - 1) * (after - now))
            parts = (*(parts[:-1] if self._stage_has_part else parts), part)
            self._stage_has_part = True
        self._update(stage=progress.stage, step=progress.step, total=progress.total, parts=parts)

    def _update(self, **changes: Any) -> None:
        with self._changed:
            if not self._view.ended:  # a cancelled request may still be at its last step
                seconds = time.monotonic() - self._began if self._began else 0.0
                self._view = replace(self._view, seconds=seconds, **changes)
                self._changed.notify_all()


class Jobs:
    """The model thread and the requests of all open pages.

    Attributes:
        bagel: used by that thread alone, except for its configuration.
    """

    def __init__(self, bagel: Bagel):
        self.bagel = bagel
        self._thread: ModelThread[WatchedJob[Any]] = ModelThread(
            bagel, lambda jobs, check: [jobs[0].run(check)], _explain, MAX_JOBS - 1, batch=1
        )
        self._lock = threading.Lock()
        self._jobs: dict[Key, WatchedJob[Any]] = {}

    def watch(self, key: Key, call: Call[T], previews: bool = False, keep_last: bool = False) -> Iterator[View[T]]:
        """Queue a request and yield its views; if the queue is full, one failed view. Cancels the request of the same
        key, if there is one.

        Args:
            key: (page, task).
            call, previews, keep_last: see :class:`WatchedJob`.
        """
        self.cancel(key)
        job = WatchedJob(call, previews, keep_last)
        with self._lock:
            try:
                self._thread.submit([job])
            except (Busy, Stopping) as error:
                return iter([View("failed", error=_EXPLANATIONS[type(error)])])
            self._jobs = {key: job for key, job in self._jobs.items() if not job.ended} | {key: job}
        return job.views(lambda: self._thread.ahead(job))

    def cancel(self, key: Key) -> None:
        """Cancel the request of a key, if there is one."""
        if (job := self._jobs.get(key)) is not None:
            job.cancel()

    def leave(self, page: Hashable) -> None:
        """Cancel all requests of the keys (page, ...)."""
        for key in list(self._jobs):
            if key[0] == page:
                self.cancel(key)

    def close(self) -> None:
        """Cancel everything and end the thread."""
        for key in list(self._jobs):
            self.cancel(key)
        self._thread.stop(_CLOSE_SECONDS)


def _explain(error: Exception, _: object) -> Exception:
    """Return an exception with a message for the user; log an error that is not the user's.

    The original exception is not passed on: the frames of its traceback would keep the model's tensors.
    """
    if isinstance(error, (ValueError, NonFiniteError)):  # their messages are written for users
        return ValueError(str(error))
    name = uuid.uuid4().hex[:8]
    _LOG.error("request %s failed", name, exc_info=error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        advice = str(error).removeprefix(str(error.__cause__)).strip() if error.__cause__ else _LESS_MEMORY
        return MemoryError(f"There is not enough memory for this request. {advice}")
    return RuntimeError(f"The request failed by an internal error. The log of bagel-rt ui has it as request {name}.")

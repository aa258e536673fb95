"""Requests in the thread that owns the model: one at a time, in the order of their coming, each seen while it runs.

A job is begun by a page and watched by it; it ends done, failed or cancelled. The page may look as rarely as it likes:
it sees the newest state, never a backlog.
"""

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from PIL import Image

from bagel_rt.errors import Cancelled
from bagel_rt.pipeline import Bagel
from bagel_rt.request import Progress

MAX_JOBS = 32  # under way and waiting; each has a thread of the web server
_PAUSE = 0.05  # seconds between two views
_PREVIEW_PAUSE = 0.2  # seconds between two previews, at least
_PREVIEW_SHARE = 5  # previews take one part in so many of the time
_LOG = logging.getLogger("bagel_rt.ui")


@dataclass(frozen=True)
class View:
    """A job at a moment.

    Attributes:
        stage: "waiting", "reading", "text" or "image" while it goes on; "done", "failed" or "cancelled" at the end.
        step, total: of a text or a picture.
        ahead: jobs that come before a waiting one.
        seconds: since the model began.
        parts: what was made so far, in order: texts as they grow, previews of pictures.
        result: of a job that is done.
        error: what a failed job raised.
    """

    stage: str
    step: int = 0
    total: int = 0
    ahead: int = 0
    seconds: float = 0.0
    parts: tuple[str | Image.Image, ...] = ()
    result: object = None
    error: Exception | None = None

    @property
    def ended(self) -> bool:
        """Whether it is the last one."""
        return self.stage in ("done", "failed", "cancelled")

    @property
    def text(self) -> str:
        """The newest text, or none."""
        return next((part for part in reversed(self.parts) if isinstance(part, str)), "")

    @property
    def picture(self) -> Image.Image | None:
        """The newest preview."""
        return next((part for part in reversed(self.parts) if isinstance(part, Image.Image)), None)


class Job:
    """One request."""

    def __init__(self, call: Callable, previews: bool, whole: bool):
        """
        Args:
            call: takes a progress callback, gives the result.
            previews: whether unfinished pictures are looked at.
            whole: whether the last preview of a picture, which is the picture, is always looked at: it stays where the
                request goes on behind it.
        """
        self._call, self._previews, self._whole = call, previews, whole
        self._changed = threading.Condition()
        self._view = View("waiting")
        self._cancelled = False
        self._began = self._preview_due = 0.0
        self._stage_has_part = False

    @property
    def ended(self) -> bool:
        return self._view.ended

    def cancel(self) -> None:
        """Nobody wants it any more: it ends before its next step. From any thread."""
        with self._changed:
            self._cancelled = True
            if self._view.stage == "waiting":
                self._view = replace(self._view, stage="cancelled")
            self._changed.notify_all()

    def run(self) -> None:
        """Do it, in the model's thread."""
        with self._changed:
            if self.ended:
                return
            self._began = time.monotonic()
            self._tell(stage="reading")
        try:
            result = self._call(self._progress)
        except Cancelled:
            self._tell(stage="cancelled")
        except Exception as error:
            if not isinstance(error, ValueError):  # which say what is wrong with the request
                _LOG.exception("a request failed")
            self._tell(stage="failed", error=error)
        else:
            self._tell(stage="done", result=result)

    def views(self, ahead: Callable[[], int]) -> Iterator[View]:
        """The job's states as they change, until it has ended. Whoever stops looking has cancelled it.

        Args:
            ahead: tells how many jobs come before this one while it waits.
        """
        seen = None
        try:
            while seen is None or not seen.ended:
                with self._changed:
                    self._changed.wait_for(lambda seen=seen: self._view is not seen, timeout=1.0)
                    if self._view.stage == "waiting" and self._view.ahead != ahead():
                        self._view = replace(self._view, ahead=ahead())
                    view = self._view
                if view is not seen:
                    seen = view
                    yield view
                    time.sleep(0 if view.ended else _PAUSE)
        finally:
            self.cancel()

    def _progress(self, progress: Progress) -> None:
        if self._cancelled:
            raise Cancelled
        if progress.stage != self._view.stage:
            self._stage_has_part = False
        parts, now = self._view.parts, time.monotonic()
        last = self._whole and progress.step == progress.total
        if progress.stage == "text" or (self._previews and (last or now >= self._preview_due)):
            made = progress.preview()[0]
            after = time.monotonic()
            self._preview_due = after + max(_PREVIEW_PAUSE, (_PREVIEW_SHARE - 1) * (after - now))
            parts = (*(parts[:-1] if self._stage_has_part else parts), made)
            self._stage_has_part = True
        self._tell(stage=progress.stage, step=progress.step, total=progress.total, parts=parts)

    def _tell(self, **changes) -> None:
        with self._changed:
            self._view = replace(self._view, seconds=time.monotonic() - self._began, **changes)
            self._changed.notify_all()


class Jobs:
    """The model's thread, and all jobs of the pages that are open.

    Attributes:
        bagel: used by that thread alone, but for its configuration.
    """

    def __init__(self, bagel: Bagel):
        self.bagel = bagel
        device = bagel.model.device
        use = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._thread = ThreadPoolExecutor(1, "bagel_rt", *use)
        self._lock = threading.Lock()
        self._jobs: dict[tuple, Job] = {}

    def watch(self, key: tuple, call: Callable, previews: bool = False, whole: bool = False) -> Iterator[View]:
        """Queue a request, and see how it goes; where too many wait already, it fails. One that goes on under the same
        key is cancelled.

        Args:
            key: (page, task).
            call, previews, whole: as :class:`Job` takes them.
        """
        self.cancel(key)
        with self._lock:
            self._jobs = {key: job for key, job in self._jobs.items() if not job.ended}
            if len(self._jobs) >= MAX_JOBS:
                error = ValueError(f"{len(self._jobs)} requests wait for the model already: try again later")
                return iter([View("failed", error=error)])
            before = list(self._jobs.values())
            job = self._jobs[key] = Job(call, previews, whole)
            self._thread.submit(job.run)
        return job.views(lambda: sum(not other.ended for other in before))

    def cancel(self, key: tuple) -> None:
        """End what goes on under a key, if anything does."""
        if (job := self._jobs.get(key)) is not None:
            job.cancel()

    def leave(self, page: Hashable) -> None:
        """End all that goes on under the keys (page, ...)."""
        for key in list(self._jobs):
            if key[0] == page:
                self.cancel(key)

    def close(self) -> None:
        """End everything, the thread too."""
        for key in list(self._jobs):
            self.cancel(key)
        self._thread.shutdown(cancel_futures=True)

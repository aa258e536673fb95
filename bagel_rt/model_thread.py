"""The one thread that runs the model, and the bounded queue in front of it.

A model's cache, buffers and CUDA graphs belong to one thread. The HTTP server and the browser UI queue their
requests here as jobs; jobs with equal ``batch_key`` run together. Both override ``Job.deliver`` to receive the results.
"""

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import torch

from bagel_rt.errors import Cancelled
from bagel_rt.pipeline import Bagel

log = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full."""


class Stopping(Exception):
    """The thread is stopping or its device is lost; the request was not completed."""


class DeadlineExceeded(Exception):
    """The request took longer than allowed."""


class Job(ABC):
    """One request. It ends exactly once, with a result or an exception.

    Attributes:
        deadline: when it expires, in seconds of ``time.monotonic``.
        batch_key: jobs with equal keys may run in one batch; by default a job runs alone.
        ended: whether it has a result or an exception.
    """

    def __init__(self, deadline: float = math.inf, batch_key: Hashable = None) -> None:
        self.deadline, self.ended, self._queued_at = deadline, False, 0.0
        self.batch_key = object() if batch_key is None else batch_key
        self._lock = threading.Lock()

    @abstractmethod
    def deliver(self, outcome: object) -> None:
        """Receive the result or an exception. Called once, from any thread; must not block."""

    def end(self, outcome: object) -> None:
        """End the job unless it has ended, from any thread. A running model stops at its next step."""
        with self._lock:
            ended, self.ended = self.ended, True
        if not ended:
            self.deliver(outcome)

    def cancel(self) -> None:
        """End the job with :class:`~bagel_rt.errors.Cancelled`."""
        self.end(Cancelled())

    def expire(self) -> bool:
        """End the job if its deadline has passed. Returns whether it has ended, for any reason."""
        if time.monotonic() > self.deadline:
            self.end(DeadlineExceeded())
        return self.ended


J = TypeVar("J", bound=Job)


class ModelThread(Generic[J]):
    """Runs jobs in order of arrival, in batches.

    Attributes:
        failure: the exception that ended the thread, or None.
        stopping: whether new jobs are refused.
    """

    def __init__(
        self,
        bagel: Bagel,
        run: Callable[[list[J], Callable[[], None]], Iterable[object]],
        on_error: Callable[[Exception, Sequence[J]], Exception],
        queue: int,
        batch: int,
        observe: Callable[[str, float], None] | None = None,
    ) -> None:
        """
        Args:
            bagel: used by this thread only, except to check requests.
            run: ``run(jobs, check)`` runs a batch and returns its results. It calls ``check()`` between steps, which
                raises Cancelled once all jobs of the batch have ended.
            on_error: ``on_error(exception, jobs)`` returns the exception to deliver to the jobs of a batch.
            queue: maximum number of waiting jobs.
            batch: maximum number of jobs that run together.
            observe: called with ("batch", number of jobs) and ("waited", seconds).
        """
        self._bagel, self._run_batch, self._on_error = bagel, run, on_error
        self._limit, self._batch, self._observe = queue, batch, observe
        self._waiting: list[J] = []
        self._running: list[J] = []
        self._changed = threading.Condition()
        self.stopping = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="bagel_rt", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of jobs in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of jobs that are running."""
        return len(self._running)

    def ahead(self, job: J) -> int:
        """Number of unfinished jobs ahead of ``job``, running ones included; 0 if it is not queued or running."""
        with self._changed:
            jobs = [other for other in self._running + self._waiting if other is job or not other.ended]
            return jobs.index(job) if job in jobs else 0

    def submit(self, jobs: Sequence[J]) -> None:
        """Queue all jobs or none. An empty queue accepts any number, since it will never have more room.

        Raises:
            Busy: the queue has no room.
            Stopping: the thread accepts no more jobs.
        """
        with self._changed:
            if self.stopping or self.failure is not None:
                raise Stopping("the model accepts no more requests")
            self._drop_ended()
            if self._waiting and len(self._waiting) + len(jobs) > self._limit:
                raise Busy(f"{len(self._waiting)} requests are waiting for the model. Try again later.")
            for job in jobs:
                job._queued_at = time.monotonic()
            self._waiting += jobs
            self._changed.notify()

    def refuse(self) -> None:
        """Refuse new jobs; waiting and running ones continue."""
        with self._changed:
            self.stopping = True
            self._changed.notify()

    def stop(self, grace: float) -> None:
        """Stop the thread. Jobs that are unfinished after ``grace`` seconds end with :class:`Stopping`.

        Then wait at most another ``grace`` seconds for the running step to finish.
        """
        self.refuse()
        self._thread.join(grace)
        with self._changed:
            self._end_all()
        self._thread.join(grace)

    def _run(self) -> None:
        try:
            device = self._bagel.model.device
            if device.type == "cuda":
                torch.cuda.set_device(device)  # the current device is per thread
            while jobs := self._next():
                self._work(jobs)
                self._running = jobs = []  # release the jobs' tensors before waiting for the next ones
        except BaseException as error:
            log.critical("the model thread has ended", exc_info=error)
            with self._changed:
                self.failure = error.with_traceback(None)
                self._end_all()
                self._waiting = self._running = []

    def _end_all(self) -> None:
        for job in self._running + self._waiting:
            job.end(Stopping("the model accepts no more requests"))

    def _check_device(self) -> None:
        """Raise a pending CUDA error. After some errors every later CUDA call fails too, so the thread must end."""
        if self._bagel.model.device.type == "cuda":
            torch.cuda.synchronize()

    def _next(self) -> list[J]:
        """Wait for the next batch; empty when the thread should end."""
        with self._changed:
            self._drop_ended()
            while not self._waiting:
                if self.stopping:
                    return []
                self._changed.wait()
                self._drop_ended()
            key = self._waiting[0].batch_key
            self._running = jobs = [job for job in self._waiting if job.batch_key == key][: self._batch]
            self._waiting = [job for job in self._waiting if job not in jobs]
        if self._observe is not None:
            for job in jobs:
                self._observe("waited", time.monotonic() - job._queued_at)
            self._observe("batch", len(jobs))
        return jobs

    def _drop_ended(self) -> None:
        """Remove ended jobs from the queue, so that they occupy neither memory nor the queue."""
        self._waiting = [job for job in self._waiting if not job.expire()]

    def _work(self, jobs: list[J]) -> None:
        """Run a batch. If it fails, run its jobs one by one: one may be at fault, or the batch too large."""

        def check() -> None:
            if all([job.expire() for job in jobs]):  # noqa: C419 - a list, so that every job is checked
                raise Cancelled

        try:
            for job, result in zip(jobs, self._run_batch(jobs, check), strict=True):
                job.end(result)
            return
        except Cancelled:
            for job in jobs:
                job.cancel()
            return
        except Exception as error:
            failure = self._on_error(error, jobs)
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if out_of_memory:  # outside the handler, which keeps the frames of the error and their tensors
            self._bagel.release_memory()
        self._check_device()
        if len(jobs) == 1:
            jobs[0].end(failure)
            return
        for job in jobs:
            if not job.expire():
                self._work([job])

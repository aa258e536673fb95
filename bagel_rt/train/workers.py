"""Worker processes that compute the micro-batches of a training step in parallel on a CPU.

Threads would not overlap: a step of the embedded model is ten thousand small operations, and a thread waits for the
GIL between any two of them.

Workers are forked, so they inherit the model and the data without pickling; weights and gradients are in shared
memory. A worker exits when its parent does, even if the parent is killed.
"""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection, get_context, parent_process
from typing import Any

import torch

_compute: Callable[[int, int], Any]  # set in each worker


class MicroBatchWorkers:
    """A pool of one process per micro-batch, started by the first step and stopped by :meth:`close`."""

    def __init__(self, compute: Callable[[int, int], Any], count: int, threads: int):
        """
        Args:
            compute: (step, micro-batch index) -> a picklable result. Its side effects are visible to the parent only
                in shared memory.
            count: number of processes, one per micro-batch.
            threads: torch threads of each process.
        """
        self._compute, self._count, self._threads = compute, count, threads
        self._pool: ProcessPoolExecutor | None = None

    def run(self, step: int) -> list:
        """The results of all micro-batches of a step, in order. Exceptions of ``compute`` are re-raised."""
        if self._pool is None:
            initializer = (_init_worker, (self._compute, self._threads))
            self._pool = ProcessPoolExecutor(self._count, get_context("fork"), *initializer)
        return list(self._pool.map(_compute_in_worker, [step] * self._count, range(self._count)))

    def close(self) -> None:
        """Stop the processes. A later :meth:`run` starts new ones."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _init_worker(compute: Callable[[int, int], Any], threads: int) -> None:
    global _compute
    _compute = compute
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C: it saves, then stops the workers
    torch.set_num_threads(threads)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None  # this runs in a worker only
    connection.wait([parent.sentinel])
    os._exit(1)


def _compute_in_worker(step: int, micro_batch: int) -> Any:
    return _compute(step, micro_batch)

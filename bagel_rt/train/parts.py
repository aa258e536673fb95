"""The batches of a step on a CPU, computed side by side by a process each.

Threads would take turns: a step of the embedded model is ten thousand small operations, and between any two of them a
thread waits for Python's lock.

The processes are forks, so they have the model and the data without being sent them; weights and gradients lie in
memory that all share. They end with the process that they serve, even if it is killed.
"""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection, get_context, parent_process
from typing import Any

import torch

_compute: Callable[[int, int], Any]  # of a process that serves another


class PartProcesses:
    """So many processes, begun with the first step and ended by :meth:`close`, or with this one."""

    def __init__(self, compute: Callable[[int, int], Any], count: int, threads: int):
        """
        Args:
            compute: of (step, part), what it gives; all else that it changes must lie in shared memory.
            count: of processes, one for each part.
            threads: of each.
        """
        self._compute, self._count, self._threads = compute, count, threads
        self._pool: ProcessPoolExecutor | None = None

    def run(self, step: int) -> list:
        """What ``compute`` gives for each part of the step, in order; what it raises is raised."""
        if self._pool is None:
            start = (_serve, (self._compute, self._threads))
            self._pool = ProcessPoolExecutor(self._count, get_context("fork"), *start)
        return list(self._pool.map(_part, [step] * self._count, range(self._count)))

    def close(self) -> None:
        """End the processes; a later :meth:`run` begins others."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _serve(compute: Callable[[int, int], Any], threads: int) -> None:
    global _compute
    _compute = compute
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which saves and then ends this one
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _part(step: int, part: int) -> Any:
    return _compute(step, part)

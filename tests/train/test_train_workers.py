"""Worker processes: results, errors, shared memory and shutdown."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import pytest
import torch

from bagel_rt.train.workers import MicroBatchWorkers

KILLED = """
import os, time
from bagel_rt.train.workers import MicroBatchWorkers
workers = MicroBatchWorkers(lambda step, micro_batch: os.getpid(), 2, 1)
print(*workers.run(0), flush=True)
time.sleep(600)
"""


def test_each_micro_batch_has_its_own_process_and_results_are_ordered():
    barrier = get_context("fork").Barrier(3, timeout=60)

    def compute(step, micro_batch):
        barrier.wait()  # until all three run, so that no process computes two
        return step, micro_batch, os.getpid(), torch.get_num_threads()

    workers = MicroBatchWorkers(compute, 3, 2)
    try:
        results = workers.run(7)
        again = workers.run(8)
    finally:
        workers.close()
    assert [result[:2] for result in results] == [(7, 0), (7, 1), (7, 2)]
    assert len({os.getpid(), *(result[2] for result in results)}) == 4
    assert {result[3] for result in results} == {2}
    assert {result[2] for result in again} == {result[2] for result in results}


def test_workers_share_memory():
    source, result = torch.zeros(2).share_memory_(), torch.zeros(2, 2).share_memory_()

    def compute(step, micro_batch):
        result[micro_batch] = source + micro_batch

    workers = MicroBatchWorkers(compute, 2, 1)
    try:
        workers.run(0)
        source.fill_(5)
        workers.run(1)
    finally:
        workers.close()
    assert result.tolist() == [[5, 5], [6, 6]]


def test_errors_are_raised_in_the_parent_and_workers_stay_usable():
    def compute(step, micro_batch):
        if step == 0 and micro_batch == 1:
            raise ValueError("the data of micro_batch 1 is broken")
        return micro_batch

    workers = MicroBatchWorkers(compute, 2, 1)
    try:
        with pytest.raises(ValueError, match="the data of micro_batch 1 is broken"):
            workers.run(0)
        assert workers.run(1) == [0, 1]
    finally:
        workers.close()


def test_close_stops_workers_and_run_starts_new_ones():
    workers = MicroBatchWorkers(lambda step, micro_batch: os.getpid(), 1, 1)
    (first,) = workers.run(0)
    workers.close()
    workers.close()
    assert not running(first)
    (second,) = workers.run(1)
    workers.close()
    assert second != first


def test_workers_exit_when_the_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert pids and all(running(pid) for pid in pids)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    for _ in range(100):
        if not any(running(pid) for pid in pids):
            return
        time.sleep(0.1)
    raise AssertionError(f"{pids} are still running")


def running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

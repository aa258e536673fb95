"""Processes that compute the parts of a step: what they give, raise and leave behind."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import pytest
import torch

from bagel_rt.train.parts import PartProcesses

KILLED = """
import os, time
from bagel_rt.train.parts import PartProcesses
processes = PartProcesses(lambda step, part: os.getpid(), 2, 1)
print(*processes.run(0), flush=True)
time.sleep(600)
"""


def test_every_part_is_computed_by_a_process_of_its_own_and_results_are_in_order():
    together = get_context("fork").Barrier(3, timeout=60)

    def compute(step, part):
        together.wait()  # for the others, so that none computes two
        return step, part, os.getpid(), torch.get_num_threads()

    processes = PartProcesses(compute, 3, 2)
    try:
        results = processes.run(7)
        again = processes.run(8)
    finally:
        processes.close()
    assert [result[:2] for result in results] == [(7, 0), (7, 1), (7, 2)]
    assert len({os.getpid(), *(result[2] for result in results)}) == 4
    assert {result[3] for result in results} == {2}
    assert {result[2] for result in again} == {result[2] for result in results}


def test_shared_memory_is_read_and_written():
    given, found = torch.zeros(2).share_memory_(), torch.zeros(2, 2).share_memory_()

    def compute(step, part):
        found[part] = given + part

    processes = PartProcesses(compute, 2, 1)
    try:
        processes.run(0)
        given.fill_(5)
        processes.run(1)
    finally:
        processes.close()
    assert found.tolist() == [[5, 5], [6, 6]]


def test_an_error_is_raised_here_and_the_next_step_is_computed():
    def compute(step, part):
        if step == 0 and part == 1:
            raise ValueError("the data of part 1 is broken")
        return part

    processes = PartProcesses(compute, 2, 1)
    try:
        with pytest.raises(ValueError, match="the data of part 1 is broken"):
            processes.run(0)
        assert processes.run(1) == [0, 1]
    finally:
        processes.close()


def test_closed_processes_are_gone_and_others_take_their_place():
    processes = PartProcesses(lambda step, part: os.getpid(), 1, 1)
    (first,) = processes.run(0)
    processes.close()
    processes.close()
    assert not running(first)
    (second,) = processes.run(1)
    processes.close()
    assert second != first


def test_they_end_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    try:
        served_by = [int(word) for word in parent.stdout.readline().split()]
        assert served_by and all(running(process) for process in served_by)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    for _ in range(100):
        if not any(running(process) for process in served_by):
            return
        time.sleep(0.1)
    raise AssertionError(f"{served_by} are still there")


def running(process: int) -> bool:
    """Whether there is such a process that is not merely waiting to be reaped."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

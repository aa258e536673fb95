"""Worker process of ``benchmarks.gpu_check``: runs the GPU tasks of one stage and reports results as JSON lines.

    python -m benchmarks.worker check|kernels|forward|end_to_end --from N

A kernel can crash the process, corrupt its CUDA context or hang. Tasks are therefore numbered, and the worker
announces each one before it starts. When a worker crashes, hangs or exits with ``DEVICE_LOST``, ``gpu_check`` starts a
new one with the next task.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial

import torch

from bagel_rt.check import run as check
from bagel_rt.check.cases import CASES
from bagel_rt.models.bagel.config import BAGEL_7B_MOT, BagelConfig
from benchmarks import end_to_end, forward, kernels
from benchmarks.measure import Timer, ceilings, measured_ceilings
from benchmarks.random_model import random_model
from benchmarks.workloads import PLANS

DEVICE_LOST = 3
COMPILED_PEERS_SUFFIX = " (compiled peers)"
PEER_SUFFIX = " (peer)"
PEER_SUFFIXES = (COMPILED_PEERS_SUFFIX, PEER_SUFFIX)
"""Suffixes of the names of tasks that run only peers, whose failures are not problems of this package."""
MAX_REQUEST_SECONDS = 20.0
"""Maximum duration of a full request. Longer ones are extrapolated, to leave time for the other measurements."""
Tasks = list[tuple[str, Callable[[], Iterator[dict]]]]


def check_tasks(device: torch.device) -> Tasks:
    """One task per case of ``bagel-rt check``."""

    def run(case):
        for result in check.run(device, [case]):
            yield asdict(result)
        if lost := check.device_error(device):
            raise kernels.DeviceLost(lost)

    return [(f"{case.op}: {case.name}", partial(run, case)) for case in CASES]


def kernel_tasks(device: torch.device, seconds: float = 0.15) -> Tasks:
    """The device ceilings, then two tasks per workload: one with eager peers, one with compiled peers."""
    timer = Timer(device, seconds)

    def measure_ceilings():
        yield {"limits": ceilings(device), "measured": measured_ceilings(device)}

    def run(workload, compiled):
        for row in kernels.measure(workload, timer, compiled):
            yield asdict(row)

    tasks = [("ceilings", measure_ceilings)]
    for workload, compiled in kernels.tasks():
        tasks.append((workload.name + COMPILED_PEERS_SUFFIX * compiled, partial(run, workload, compiled)))
    return tasks


def forward_tasks(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tasks:
    """One task per entry of ``forward.FORWARDS``."""

    def run(name):
        plan, timer = PLANS[name](), Timer(device, 2.0, 20)
        for row in forward.measure(name, plan, timer, dtype, ceilings(device)):
            yield asdict(row)

    return [(name, partial(run, name)) for name in forward.FORWARDS]


def end_to_end_tasks(
    device: torch.device, config: BagelConfig = BAGEL_7B_MOT, cases=end_to_end.CASES, dtype=torch.bfloat16
) -> Tasks:
    """One task per case, batch size and runner. The first task to run creates the model that all share."""
    options = end_to_end.MeasureOptions(seconds=MAX_REQUEST_SECONDS, whole=("graphs",))
    model = cache(lambda: end_to_end.EndToEnd(*random_model(config, device, dtype), options))
    return [
        (task[0] + PEER_SUFFIX * ("official" in task[1]), partial(lambda task: model().measure(task), task))
        for task in end_to_end.tasks(cases)
    ]


STAGES = {
    "check": check_tasks, "kernels": kernel_tasks, "forward": forward_tasks, "end_to_end": end_to_end_tasks,
}  # fmt: skip


def work(tasks: Tasks, start: int, emit: Callable[[dict], None]) -> int:
    """Run tasks from number ``start`` on and return the exit status.

    Messages passed to ``emit``:

    - {"begin": number, "task": name} before each task;
    - {"row": ...} for each result;
    - {"working": number} as a heartbeat, when a task yields an empty row;
    - {"failed": reason} when a task raises; the next task follows;
    - {"done": true} after the last task.
    """
    for number, (name, run) in enumerate(tasks[start:], start):
        emit({"begin": number, "task": name})
        try:
            for row in run():
                emit({"row": row} if row else {"working": number})
        except kernels.DeviceLost as lost:
            emit({"failed": f"CUDA context lost: {lost}"})
            return DEVICE_LOST
        except Exception as error:  # the remaining tasks still run
            reason = next(iter(str(error).splitlines()), "")
            emit({"failed": f"{type(error).__name__}: {reason}"})
    emit({"done": True})
    return 0


def main() -> None:
    """Run the tasks of one stage on the current GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--from", type=int, default=0, dest="start", metavar="N", help="index of the first task")
    arguments = parser.parse_args()
    tasks = STAGES[arguments.stage](torch.device("cuda"))
    parser.exit(work(tasks, arguments.start, lambda message: print(json.dumps(message), flush=True)))


if __name__ == "__main__":
    main()

"""The part of ``benchmarks.gpu_check`` that touches the GPU: a process that runs tasks and reports each as a JSON line.

    python -m benchmarks.worker check|kernels|forward|end_to_end --from N

A kernel can kill its process, leave the GPU unusable for it, or never end. So the tasks of a stage are numbered: the
process says which one it begins, and ends with status 3 where the GPU is lost to it. Another one goes on behind that.
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
from benchmarks.measure import Clock, ceilings, measured_ceilings
from benchmarks.random_model import random_model
from benchmarks.workloads import PLANS

DEVICE_LOST = 3
COMPILED_PEERS = " (compiled peers)"
PEER = " (peer)"
OTHERS = (COMPILED_PEERS, PEER)
"""End the name of a task that runs nothing of this package."""
WHOLE = 20.0
"""Seconds that a whole request may take to be run whole, beside all else that is to be measured."""
Tasks = list[tuple[str, Callable[[], Iterator[dict]]]]


def check_tasks(device: torch.device) -> Tasks:
    """One task per case of ``bagel-rt check``."""

    def run(case):
        for result in check.run(device, [case]):
            yield asdict(result)
        if lost := check.lost(device):
            raise kernels.DeviceLost(lost)

    return [(f"{case.op}: {case.name}", partial(run, case)) for case in CASES]


def kernel_tasks(device: torch.device, seconds: float = 0.15) -> Tasks:
    """The ceilings, then one task per workload with the quick peers, and one with those that are compiled."""
    clock = Clock(device, seconds)

    def figures():
        known, measured = ceilings(device), measured_ceilings(device)
        yield {"limits": known, "measured": measured}

    def run(workload, compiled):
        for row in kernels.measure(workload, clock, compiled):
            yield asdict(row)

    found = [("ceilings", figures)]
    for workload, compiled in kernels.tasks():
        found.append(
            (f"{workload.name}{COMPILED_PEERS}" if compiled else workload.name, partial(run, workload, compiled))
        )
    return found


def forward_tasks(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tasks:
    """One task per forward."""

    def run(name):
        plan, clock = PLANS[name](), Clock(device, 2.0, 20)
        for row in forward.measure(name, plan, clock, dtype, ceilings(device)):
            yield asdict(row)

    return [(name, partial(run, name)) for name in forward.FORWARDS]


def end_to_end_tasks(
    device: torch.device, config: BagelConfig = BAGEL_7B_MOT, cases=end_to_end.CASES, dtype=torch.bfloat16
) -> Tasks:
    """One task per request, batch and contender, over one model that the first of them makes."""
    effort = end_to_end.Effort(seconds=WHOLE, whole=("graphs",))
    model = cache(lambda: end_to_end.EndToEnd(*random_model(config, device, dtype), effort))
    return [
        (task[0] + PEER * ("official" in task[1]), partial(lambda task: model().measure(task), task))
        for task in end_to_end.tasks(cases)
    ]


STAGES = {
    "check": check_tasks, "kernels": kernel_tasks, "forward": forward_tasks, "end_to_end": end_to_end_tasks,
}  # fmt: skip


def work(tasks: Tasks, start: int, say: Callable[[dict], None]) -> int:
    """Run tasks from number ``start`` on; return the exit status.

    ``say`` is given {"begin": number, "task": name}, {"row": ...} and at the end {"done": true}. An empty row, by which
    a long task shows that it lives, is {"working": number}; a task that raises is {"failed": reason}, and the next one
    follows.
    """
    for number, (name, run) in enumerate(tasks[start:], start):
        say({"begin": number, "task": name})
        try:
            for row in run():
                say({"row": row} if row else {"working": number})
        except kernels.DeviceLost as lost:
            say({"failed": f"the GPU is lost to this process: {lost}"})
            return DEVICE_LOST
        except Exception as problem:  # one task must not hide the others
            reason = next(iter(str(problem).splitlines()), "")
            say({"failed": f"{type(problem).__name__}: {reason}"})
    say({"done": True})
    return 0


def main() -> None:
    """Run one stage on the GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--from", type=int, default=0, dest="start", metavar="N", help="number of the first task")
    arguments = parser.parse_args()
    tasks = STAGES[arguments.stage](torch.device("cuda"))
    parser.exit(work(tasks, arguments.start, lambda message: print(json.dumps(message), flush=True)))


if __name__ == "__main__":
    main()

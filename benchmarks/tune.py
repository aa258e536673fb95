"""Finds the fastest launch arguments of the kernels on this GPU, and writes them into their table.

    python -m benchmarks.tune [--op linear ...] [--output FILE] [--dry-run [--arch sm_90]]

For each class of shapes every candidate of :mod:`benchmarks.search_space` is compiled ahead, in processes of their own;
those that compile are checked against torch on random tensors and timed with cold caches at all of BAGEL's sizes that
belong to the class. The one with the least geometric mean of times wins; for linear, null if torch was faster still.
The table (kernels/configs.json, or ``--output``) is rewritten after each class, so that what was found is kept.

Measuring happens in a process of its own too: a candidate that faults or hangs costs itself and ``PATIENCE`` seconds.
``--dry-run`` lists the candidates of an architecture, on any machine.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from copy import deepcopy
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from bagel_rt.kernels import backend, configs
from benchmarks.compiling import classes, compile_all, in_processes
from benchmarks.inspect import problems
from benchmarks.measure import Clock
from benchmarks.search_space import candidates
from benchmarks.workloads import ALL_WORKLOADS, WORKLOADS, Tensors, Workload

PATIENCE = 60.0
"""Seconds without a result after which a candidate counts as hanging."""

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""Largest relative L2 error against torch in the same dtype, each output by itself."""

TORCH = -1
"""Stands for torch among the indexes of candidates."""

Name = tuple[str, str]
"""An op of the table and one of its shape classes."""


def workloads_of_classes(architecture: str, ops: list[str]) -> dict[Name, list[Workload]]:
    """Class -> the workloads that launch with it: those of BAGEL, or where it has none, of other models."""
    found = {}
    jobs = [(workload, architecture) for workload in ALL_WORKLOADS if set(workload.entries) & set(ops)]
    for (workload, _), reached in in_processes(classes, jobs, os.cpu_count()):
        for name in reached:
            if name[0] in workload.entries and name[0] in ops:
                found.setdefault(name, []).append(workload)
    bagel = {workload.name for workload in WORKLOADS}
    return {name: [w for w in workloads if w.name in bagel] or workloads for name, workloads in found.items()}


def measurements(
    name: Name, workload: Workload, tiles: dict[int, dict], architecture: str, device: torch.device
) -> Iterator[tuple[int, float | str | None]]:
    """(index, None) before and (index, microseconds or why there are none) after each candidate, torch first.

    ``tiles`` are the candidates by index. Each is tried through the public op, by way of the table.
    """
    torch.manual_seed(0)
    function, arguments, options = workload.build(Tensors(device, workload.dtype))
    clock = Clock(device, seconds=0.05, most=20)
    entry = configs.TABLE[name[0]][architecture][name[1]]
    before = entry["tiles"]

    def call():
        return function(*arguments, **options)

    try:
        backend.choose_backend("reference")
        outputs = _written(call, arguments, workload)
        expected = [output.clone() for output in outputs]
        yield TORCH, None
        yield TORCH, clock.microseconds(call)
        backend.choose_backend("triton")
        for index, candidate in tiles.items():
            yield index, None
            entry["tiles"] = candidate
            for output in outputs:
                output.zero_()  # what a candidate leaves unwritten shall not be right from the one before
            try:
                outputs = _written(call, arguments, workload)
                worst = max(map(relative_error, outputs, expected))
                if worst > TOLERANCE[workload.dtype]:
                    raise ValueError(f"wrong by {worst:.1e} on {workload.name}")
                yield index, clock.microseconds(call)
            except Exception as error:  # whatever a compiler, a launch or a comparison may raise
                yield index, f"{type(error).__name__}: {error}"[:300]
                if device.type == "cuda":
                    torch.cuda.synchronize()  # raises, and so ends the process, if the candidate broke the context
    finally:
        entry["tiles"] = before
        backend.choose_backend(None)


def _written(call, arguments: tuple, workload: Workload) -> list[torch.Tensor]:
    """Everything that a call wrote: its outputs, and caches among its arguments."""
    outputs = call()
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if workload.op == "qk_norm_rope":
        outputs += arguments[6:8]
    return [output for output in outputs if all(output is not argument for argument in arguments[:6])]


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference over that of ``expected``; infinite if others than expected are not finite."""
    finite = expected.isfinite()
    if output.shape != expected.shape or not torch.equal(output.isfinite(), finite):
        return math.inf
    output, expected = output[finite].double(), expected[finite].double()
    return ((output - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def measure_class(
    name: Name, workloads: list[Workload], tiles: list[dict], architecture: str
) -> tuple[dict[int, dict[str, float]], dict[int, str]]:
    """Microseconds of each candidate and of ``TORCH`` by workload, and the reasons against the other candidates."""
    times, failures = {TORCH: {}}, {}
    context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    for workload in workloads:
        while True:
            left = {i: t for i, t in enumerate(tiles) if i not in failures and workload.name not in times.get(i, {})}
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, name, workload.name, left, architecture)
            process = context.Process(target=_measure_and_send, args=arguments)
            process.start()
            sender.close()
            tried, stopped = _collect(receiver, workload.name, times, failures)
            process.kill()
            process.join()
            if not stopped:
                break
            if tried in (None, TORCH):
                raise RuntimeError(f"{workload.name} cannot be measured: {stopped}")
            failures.setdefault(tried, f"{stopped} on {workload.name}")
    return {i: t for i, t in times.items() if i not in failures}, failures


def _collect(receiver, workload: str, times: dict, failures: dict) -> tuple[int | None, str]:
    """Sort a process's messages into ``times`` and ``failures``: the last candidate tried, and why it ended early."""
    tried = None
    while True:
        try:
            if not receiver.poll(PATIENCE):
                return tried, f"hangs for {PATIENCE:.0f} s"
            message = receiver.recv()
        except EOFError:
            return tried, "ends the process"
        if message is None:
            return tried, ""
        tried, result = message
        if isinstance(result, str):
            failures[tried] = result
        elif result is not None:
            times.setdefault(tried, {})[workload] = result


def _measure_and_send(sender, name: Name, workload: str, tiles: dict[int, dict], architecture: str) -> None:
    [workload] = [known for known in ALL_WORKLOADS if known.name == workload]
    with torch.set_grad_enabled(workload.op == "attention_backward"):
        for message in measurements(name, workload, tiles, architecture, torch.device("cuda")):
            sender.send(message)
    sender.send(None)
    sender.close()


def geometric_mean(times: dict[str, float]) -> float:
    """Of the times of one candidate."""
    return math.exp(sum(map(math.log, times.values())) / len(times))


def choose(times: dict[int, dict[str, float]], torch_may_win: bool) -> int:
    """Index of the candidate with the least geometric mean, or ``TORCH`` if it may win and does.

    Raises:
        ValueError: no candidate was measured on every workload, and torch may not win.
    """
    complete = {
        index: geometric_mean(by_workload)
        for index, by_workload in times.items()
        if by_workload.keys() == times[TORCH].keys() and (index != TORCH or torch_may_win)
    }
    if not complete:
        raise ValueError("no candidate both gave the right result and could be timed")
    return min(complete, key=complete.get)


def describe(machine: str, times: dict[int, dict[str, float]], winner: int, workloads: list[Workload]) -> str:
    """The ``source`` of an entry: machine, date, versions, the figure on the largest workload, the ratio to torch."""
    largest = max(workloads, key=lambda workload: (workload.flops, workload.bytes))
    microseconds = times[winner][largest.name]
    rate = f"{largest.flops / microseconds / 1e6:.0f} TFLOP/s"
    if largest.flops < 100 * largest.bytes:  # far from where arithmetic limits
        rate = f"{largest.bytes / microseconds / 1e3:.0f} GB/s"
    ratio = geometric_mean(times[TORCH]) / geometric_mean(times[winner])
    versions = f"torch {torch.__version__}, triton {version('triton')}"
    figure = f"{microseconds:.1f} us, {rate} on {largest.name}"
    who = "torch is faster" if winner == TORCH else f"{ratio:.2f} x torch over {len(workloads)} workloads"
    return f"measured on {machine}, {date.today()}, {versions}: {figure}; {who}"


def updated(table: dict, architecture: str, name: Name, tiles: dict | None, source: str) -> dict:
    """A copy of the table with one entry replaced; all others stay as they are."""
    table = deepcopy(table)
    op, shape_class = name
    table[op][architecture][shape_class] = {"tiles": tiles, "source": source}
    return table


def write_table(path: Path, table: dict) -> None:
    """Replace the file at once: a reader finds the old table or the new one, whatever happens meanwhile."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(table, indent=2) + "\n")
    os.replace(temporary, path)


def compilable(name: Name, workload: Workload, tiles: list[dict], architecture: str) -> tuple[list[dict], list[str]]:
    """The candidates that break no rule of :mod:`benchmarks.inspect`, a line about each other. Fills Triton's cache."""
    jobs = [(architecture, workload, {name: candidate}) for candidate in tiles]
    good, lines = [], []
    for (*_, tried), kernels in compile_all(jobs, os.cpu_count()):
        reasons = [
            problem for kernel in kernels if (kernel.op, kernel.shape_class) == name for problem in problems(kernel)
        ]
        if reasons:
            lines.append(f"    left out {tried[name]}: {', '.join(reasons)}")
        else:
            good.append(tried[name])
    return sorted(good, key=tiles.index), lines


def tune_class(name: Name, workloads: list[Workload], architecture: str, machine: str) -> tuple[dict | None, str]:
    """Tiles and source of a class's new entry; prints what was measured. ValueError if no candidate serves."""
    print(f"{' '.join(name)}: {', '.join(workload.name for workload in workloads)}", flush=True)
    tiles, lines = compilable(name, workloads[0], candidates(*name, architecture), architecture)
    times, failures = measure_class(name, workloads, tiles, architecture)
    lines += [f"    left out {tiles[index]}: {reason}" for index, reason in failures.items()]
    winner = choose(times, torch_may_win=name[0] == "linear")
    for index in sorted(times, key=lambda index: geometric_mean(times[index])):
        tried = "torch" if index == TORCH else str(tiles[index])
        mark = " <-- chosen" * (index == winner)
        print(f"    {geometric_mean(times[index]):10.1f} us  {tried}{mark}")
    print("\n".join(lines), flush=True)
    return None if winner == TORCH else tiles[winner], describe(machine, times, winner, workloads)


def main() -> int:
    """Tune, class by class; the exit code."""
    ops = list(configs.TABLE)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=ops, default=ops, help=f"of {', '.join(ops)}", metavar="OP")
    parser.add_argument("--output", metavar="FILE", type=Path, default=configs.PATH, help="instead of %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates and stop")
    parser.add_argument("--arch", choices=configs.ARCHITECTURES, default="sm_90", help="of a dry run, %(default)s")
    arguments = parser.parse_args()
    if arguments.dry_run:
        for op in arguments.op:
            for shape_class in configs.TABLE[op][arguments.arch]:
                tiles = candidates(op, shape_class, arguments.arch)
                print(f"{op} {shape_class}: {len(tiles)} candidates", *tiles, sep="\n    ")
        return 0
    if not torch.cuda.is_available():
        print("benchmarks.tune: there is no GPU to measure on; --dry-run lists what would be tried", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    architecture, machine = configs.architecture(device), torch.cuda.get_device_name(device)
    missed = 0
    for name, workloads in workloads_of_classes(architecture, arguments.op).items():
        try:
            entry = tune_class(name, workloads, architecture, machine)
        except (RuntimeError, ValueError) as error:
            print(f"    kept as it is: {error}", file=sys.stderr)
            missed += 1
            continue
        configs.TABLE = updated(configs.TABLE, architecture, name, *entry)
        write_table(arguments.output, configs.TABLE)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

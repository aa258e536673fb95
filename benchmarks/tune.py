"""Finds the fastest launch arguments of the kernels on this GPU, and writes them into their table.

    python -m benchmarks.tune [--op linear ...] [--class "many swiglu"] [--minutes X] [--output FILE]
    python -m benchmarks.tune --dry-run [--arch sm_90] [--op linear ...] [--class "many swiglu"]

For each class of shapes, those of most worth first, every candidate of :mod:`benchmarks.search_space` is compiled, in
processes of their own; those that compile are checked against torch on random tensors and timed with cold caches at all
of BAGEL's sizes that belong to the class, the largest first (:mod:`benchmarks.tune_measure`). The one with the least
geometric mean of times wins; for linear, null if torch was faster still. The table (kernels/configs.json, or
``--output``, which is begun from if it is there) is rewritten after each class, so that what was found is kept and
results of several runs add up.

``--minutes`` ends the run in time, by fewer candidates, sizes and classes. ``--dry-run`` lists the candidates of an
architecture, on any machine.

Exit codes: 0 every class was tuned; 1 some were not; 2 nothing could begin.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from copy import deepcopy
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from bagel_rt.files import atomic_write
from bagel_rt.kernels import configs
from benchmarks.compiling import classes_of, compile_all
from benchmarks.inspect import problems
from benchmarks.search_space import candidates
from benchmarks.tune_measure import TORCH, Name, geometric_mean, measure_class
from benchmarks.workloads import ALL_WORKLOADS, WORKLOADS, Workload

MARGIN = 10.0
"""Seconds before the end of ``--minutes`` at which measuring stops: processes are to end, and Python to start."""

WORTH = [
    *(("linear", f"many {epilogue}") for epilogue in ("swiglu", "residual", "bias")),
    ("attention", "head_dim 128"),
    *(("linear", f"hundreds {epilogue}") for epilogue in ("swiglu", "residual", "bias")),
]
"""Classes in which a denoising step spends its time, the longest first; the others come behind."""


def workloads_of_classes(architecture: str, ops: list[str], deadline: float = math.inf) -> dict[Name, list[Workload]]:
    """Class -> the workloads that launch with it: those of BAGEL, or where it has none, of other models.

    Classes of most worth and the largest workloads come first, in the same order every time.
    """
    found, bagel = {}, {workload.name for workload in WORKLOADS}
    workloads = [workload for workload in ALL_WORKLOADS if set(workload.entries) & set(ops)]
    for workload, reached in classes_of(workloads, architecture, os.cpu_count(), deadline):
        for name in reached:
            if name[0] in workload.entries and name[0] in ops:
                found.setdefault(name, []).append(workload)
    for name, workloads in found.items():
        own = [workload for workload in workloads if workload.name in bagel]
        found[name] = sorted(own or workloads, key=lambda workload: (-workload.flops, -workload.bytes))

    def place(name):
        return WORTH.index(name) if name in WORTH else len(WORTH), found[name][0].name not in bagel

    return {name: found[name] for name in sorted(found, key=place)}


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
    with atomic_write(path) as file:
        file.write((json.dumps(table, indent=2) + "\n").encode())


def check_writable(path: Path) -> None:
    """Raise the OSError now that :func:`write_table` would raise after the measuring."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    with tempfile.NamedTemporaryFile(dir=path.parent):
        pass


def table_to_begin_with(path: Path) -> dict:
    """The table in a file, or where there is no file the package's.

    Raises:
        ValueError: the file holds something else, or the table of another version, which has other entries.
    """
    if not path.exists():
        return configs.TABLE
    try:
        table = json.loads(path.read_text())
        same = _entries(table) == _entries(configs.TABLE)
    except (ValueError, AttributeError, TypeError, KeyError):
        same = False
    if not same:
        raise ValueError(f"{path} is no table of tiles with the entries of {configs.PATH}; name another file")
    return table


def _entries(table: dict) -> set[tuple[str, str, str]]:
    return {
        (op, architecture, shape_class)
        for op, architectures in table.items()
        for architecture, classes in architectures.items()
        for shape_class, entry in classes.items()
        if entry.keys() == {"tiles", "source"}
    }


def compilable(
    name: Name, workload: Workload, tiles: list[dict], architecture: str, deadline: float = math.inf
) -> tuple[list[dict], list[str]]:
    """The candidates that break no rule of :mod:`benchmarks.inspect`, a line about each other. Fills Triton's cache."""
    jobs = [(architecture, workload, {name: candidate}) for candidate in tiles]
    good, lines = [], []
    for (*_, tried), kernels in compile_all(jobs, os.cpu_count(), deadline):
        own = [kernel for kernel in kernels if (kernel.op, kernel.shape_class) == name or kernel.error]
        reasons = [problem for kernel in own for problem in problems(kernel)]
        if reasons:
            lines.append(f"    left out {tried[name]}: {', '.join(reasons)}")
        else:
            good.append(tried[name])
    if unknown := len(tiles) - len(good) - len(lines):
        lines.append(f"    left out {unknown} more, which the time did not suffice to compile")
    return sorted(good, key=tiles.index), lines


def tune_class(
    name: Name, workloads: list[Workload], architecture: str, machine: str, deadline: float = math.inf
) -> tuple[dict | None, str]:
    """Tiles and source of a class's new entry; prints what was measured.

    Raises:
        ValueError: no candidate serves.
        RuntimeError: nothing can be measured, or could in time.
    """
    print(f"{' '.join(name)}: {', '.join(workload.name for workload in workloads)}", flush=True)
    half = time.monotonic() + (deadline - time.monotonic()) / 2
    tiles, lines = compilable(name, workloads[0], candidates(*name, architecture), architecture, half)
    if not tiles:
        raise ValueError("\n".join(["no candidate was compiled", *lines]))
    times, failures = measure_class(name, workloads, tiles, architecture, deadline)
    workloads = [workload for workload in workloads if workload.name in times[TORCH]]
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
    start, ops = time.monotonic(), list(configs.TABLE)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=ops, default=ops, help=f"of {', '.join(ops)}", metavar="OP")
    parser.add_argument("--class", action="append", dest="classes", metavar="NAME", help="of the ops; repeatable")
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="X", help="the most that it may take")
    parser.add_argument("--output", metavar="FILE", type=Path, default=configs.PATH, help="instead of %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates and stop")
    parser.add_argument("--arch", choices=configs.ARCHITECTURES, default="sm_90", help="of a dry run, %(default)s")
    arguments = parser.parse_args()
    known = {shape_class: None for op in arguments.op for shape_class in configs.TABLE[op][arguments.arch]}
    chosen = arguments.classes or list(known)
    if unknown := [repr(shape_class) for shape_class in chosen if shape_class not in known]:
        parser.error(f"--class: no {', '.join(unknown)} among {', '.join(map(repr, known))}")
    if arguments.dry_run:
        for op in arguments.op:
            for shape_class in filter(chosen.__contains__, configs.TABLE[op][arguments.arch]):
                tiles = candidates(op, shape_class, arguments.arch)
                print(f"{op} {shape_class}: {len(tiles)} candidates", *tiles, sep="\n    ")
        return 0
    if not torch.cuda.is_available():
        print("benchmarks.tune: there is no GPU to measure on; --dry-run lists what would be tried", file=sys.stderr)
        return 2
    try:
        check_writable(arguments.output)
        configs.TABLE = table_to_begin_with(arguments.output)
    except (OSError, ValueError) as error:
        print(f"benchmarks.tune: --output cannot be used: {error}", file=sys.stderr)
        return 2
    return tune(arguments.op, chosen, arguments.output, start + 60 * arguments.minutes - MARGIN)


def tune(ops: list[str], chosen: list[str], output: Path, deadline: float) -> int:
    """Tune the chosen classes of these ops until ``deadline``, writing the table after each; the exit code."""
    device = torch.device("cuda")
    architecture, machine = configs.architecture(device), torch.cuda.get_device_name(device)
    found, missed = workloads_of_classes(architecture, ops, deadline), 0
    wanted = {(op, shape_class) for op in ops for shape_class in configs.TABLE[op][architecture]}
    for name in [*found, *sorted(wanted - found.keys())]:
        if name[1] not in chosen:
            continue
        try:
            if name not in found:
                raise RuntimeError("no workload of it was found")
            if time.monotonic() >= deadline:
                raise RuntimeError("the time was up before it was begun")
            entry = tune_class(name, found[name], architecture, machine, deadline)
        except (RuntimeError, ValueError) as error:
            print(f"{' '.join(name)}: kept as it is: {error}", file=sys.stderr, flush=True)
            missed += 1
            continue
        configs.TABLE = updated(configs.TABLE, architecture, name, *entry)
        try:
            write_table(output, configs.TABLE)
        except OSError as error:
            print(f"benchmarks.tune: {output} cannot be written: {error}; {name}: {entry}", file=sys.stderr)
            return 1
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

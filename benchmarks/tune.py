"""Tune the kernels' launch arguments on this GPU and write them into their table.

    python -m benchmarks.tune [--op linear ...] [--class "many swiglu"] [--minutes X] [--output FILE]
    python -m benchmarks.tune --dry-run [--arch sm_90] [--op linear ...] [--class "many swiglu"]

For each shape class, most important first, every candidate of :mod:`benchmarks.search_space` is compiled in a
subprocess. Candidates that compile are checked against torch on random tensors and timed with a cold L2 at all of
BAGEL's sizes in the class, largest first (:mod:`benchmarks.tune_measure`). The candidate with the lowest geometric mean
of times wins. For linear the entry becomes null if torch is faster. The table (kernels/configs.json or ``--output``,
which is extended if it exists) is rewritten after each class, so an interrupted run keeps its results and several runs
accumulate.

``--minutes`` limits the duration: fewer candidates, sizes and classes are measured. ``--dry-run`` lists the candidates
of an architecture on any machine.

Exit codes: 0 all classes were tuned; 1 some were not; 2 the run could not start.
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
from benchmarks.compiling import compile_all, shape_classes_of
from benchmarks.inspect import problems
from benchmarks.search_space import candidates
from benchmarks.tune_measure import TORCH, ClassKey, geometric_mean, measure_class
from benchmarks.workloads import ALL_WORKLOADS, WORKLOADS, OpWorkload

SHUTDOWN_MARGIN = 10.0
"""Seconds of ``--minutes`` reserved for Python's startup and for terminating processes at the end."""

PRIORITY = [
    *(("linear", f"many {epilogue}") for epilogue in ("swiglu", "residual", "bias")),
    ("attention", "head_dim 128"),
    *(("linear", f"hundreds {epilogue}") for epilogue in ("swiglu", "residual", "bias")),
]
"""Classes that dominate a denoising step, most expensive first. All others follow."""


def workloads_by_class(
    architecture: str, ops: list[str], deadline: float = math.inf
) -> dict[ClassKey, list[OpWorkload]]:
    """Shape class -> the workloads that use it: BAGEL's, or those of other models if BAGEL has none.

    The order is deterministic: most important classes and largest workloads first.
    """
    by_class, bagel = {}, {workload.name for workload in WORKLOADS}
    workloads = [workload for workload in ALL_WORKLOADS if set(workload.entries) & set(ops)]
    for workload, names in shape_classes_of(workloads, architecture, os.cpu_count(), deadline):
        for name in names:
            if name[0] in workload.entries and name[0] in ops:
                by_class.setdefault(name, []).append(workload)
    for name, workloads in by_class.items():
        own = [workload for workload in workloads if workload.name in bagel]
        by_class[name] = sorted(own or workloads, key=lambda workload: (-workload.flops, -workload.bytes))

    def rank(name):
        return PRIORITY.index(name) if name in PRIORITY else len(PRIORITY), by_class[name][0].name not in bagel

    return {name: by_class[name] for name in sorted(by_class, key=rank)}


def choose(times: dict[int, dict[str, float]], torch_may_win: bool) -> int:
    """Index of the candidate with the lowest geometric mean of times, or ``TORCH``.

    Args:
        times: candidate index or ``TORCH`` -> workload name -> microseconds.
        torch_may_win: whether ``TORCH`` is a valid result.

    Raises:
        ValueError: no valid candidate was measured on every workload.
    """
    complete = {
        index: geometric_mean(by_workload)
        for index, by_workload in times.items()
        if by_workload.keys() == times[TORCH].keys() and (index != TORCH or torch_may_win)
    }
    if not complete:
        raise ValueError("no candidate was both correct and measured on every workload")
    return min(complete, key=complete.get)


def describe(machine: str, times: dict[int, dict[str, float]], winner: int, workloads: list[OpWorkload]) -> str:
    """The ``source`` of an entry: machine, date, versions, time on the largest workload, speedup over torch."""
    largest = max(workloads, key=lambda workload: (workload.flops, workload.bytes))
    microseconds = times[winner][largest.name]
    rate = f"{largest.flops / microseconds / 1e6:.0f} TFLOP/s"
    if largest.flops < 100 * largest.bytes:  # low arithmetic intensity: memory-bound
        rate = f"{largest.bytes / microseconds / 1e3:.0f} GB/s"
    ratio = geometric_mean(times[TORCH]) / geometric_mean(times[winner])
    versions = f"torch {torch.__version__}, triton {version('triton')}"
    timing = f"{microseconds:.1f} us, {rate} on {largest.name}"
    comparison = "torch is faster" if winner == TORCH else f"{ratio:.2f} x torch over {len(workloads)} workloads"
    return f"measured on {machine}, {date.today()}, {versions}: {timing}; {comparison}"


def updated(table: dict, architecture: str, name: ClassKey, tiles: dict | None, source: str) -> dict:
    """A copy of the table with one entry replaced."""
    table = deepcopy(table)
    op, shape_class = name
    table[op][architecture][shape_class] = {"tiles": tiles, "source": source}
    return table


def write_table(path: Path, table: dict) -> None:
    """Replace the file atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(table, indent=2) + "\n").encode())


def check_writable(path: Path) -> None:
    """Raise OSError before measuring if :func:`write_table` would fail afterward."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory")
    with tempfile.NamedTemporaryFile(dir=path.parent):
        pass


def load_table(path: Path) -> dict:
    """Load the table from a file, or the shipped table if the file does not exist.

    Raises:
        ValueError: the file is not a table, or has other entries than the shipped one (another version).
    """
    if not path.exists():
        return configs.TABLE
    try:
        table = json.loads(path.read_text())
        same = _entries(table) == _entries(configs.TABLE)
    except (ValueError, AttributeError, TypeError, KeyError):
        same = False
    if not same:
        raise ValueError(f"{path} must be a table with the entries of {configs.PATH}. Choose another file")
    return table


def _entries(table: dict) -> set[tuple[str, str, str]]:
    return {
        (op, architecture, shape_class)
        for op, architectures in table.items()
        for architecture, classes in architectures.items()
        for shape_class, entry in classes.items()
        if entry.keys() == {"tiles", "source"}
    }


def compile_candidates(
    name: ClassKey, workload: OpWorkload, tiles: list[dict], architecture: str, deadline: float = math.inf
) -> tuple[list[dict], list[str]]:
    """Compile candidates in parallel, which fills Triton's cache for the measuring process.

    Returns:
        The candidates that violate no rule of :mod:`benchmarks.inspect`, and one line for each of the others.
    """
    jobs = [(architecture, workload, {name: candidate}) for candidate in tiles]
    good, lines = [], []
    for (*_, tiles_by_class), kernels in compile_all(jobs, os.cpu_count(), deadline):
        own = [kernel for kernel in kernels if (kernel.op, kernel.shape_class) == name or kernel.error]
        reasons = [problem for kernel in own for problem in problems(kernel)]
        if reasons:
            lines.append(f"    skipped {tiles_by_class[name]}: {', '.join(reasons)}")
        else:
            good.append(tiles_by_class[name])
    if not_compiled := len(tiles) - len(good) - len(lines):
        lines.append(f"    skipped {not_compiled} more: time limit reached before compilation")
    return sorted(good, key=tiles.index), lines


def tune_class(
    name: ClassKey, workloads: list[OpWorkload], architecture: str, machine: str, deadline: float = math.inf
) -> tuple[dict | None, str]:
    """Measure the candidates of a class, print the results and return the tiles and source of its new entry.

    Raises:
        ValueError: no candidate is usable.
        RuntimeError: measuring failed or ran out of time.
    """
    print(f"{' '.join(name)}: {', '.join(workload.name for workload in workloads)}", flush=True)
    half = time.monotonic() + (deadline - time.monotonic()) / 2  # compile for at most half of the remaining time
    tiles, lines = compile_candidates(name, workloads[0], candidates(*name, architecture), architecture, half)
    if not tiles:
        raise ValueError("\n".join(["no candidate compiled", *lines]))
    times, failures = measure_class(name, workloads, tiles, architecture, deadline)
    workloads = [workload for workload in workloads if workload.name in times[TORCH]]
    lines += [f"    skipped {tiles[index]}: {reason}" for index, reason in failures.items()]
    winner = choose(times, torch_may_win=name[0] == "linear")
    for index in sorted(times, key=lambda index: geometric_mean(times[index])):
        candidate = "torch" if index == TORCH else str(tiles[index])
        mark = " <-- chosen" * (index == winner)
        print(f"    {geometric_mean(times[index]):10.1f} us  {candidate}{mark}")
    print("\n".join(lines), flush=True)
    return None if winner == TORCH else tiles[winner], describe(machine, times, winner, workloads)


def main() -> int:
    """Parse the command line, tune and return the exit code."""
    start, ops = time.monotonic(), list(configs.TABLE)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=ops, default=ops, help=f"any of {', '.join(ops)}", metavar="OP")
    parser.add_argument(
        "--class", action="append", dest="classes", metavar="NAME", help="shape class; repeatable; default: all"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="X", help="time limit; default: none")
    parser.add_argument("--output", metavar="FILE", type=Path, default=configs.PATH, help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates and exit")
    parser.add_argument(
        "--arch", choices=configs.ARCHITECTURES, default="sm_90", help="for --dry-run; default: %(default)s"
    )
    arguments = parser.parse_args()
    known = {shape_class: None for op in arguments.op for shape_class in configs.TABLE[op][arguments.arch]}
    selected = arguments.classes or list(known)
    if unknown := [repr(shape_class) for shape_class in selected if shape_class not in known]:
        parser.error(f"--class must be one of {', '.join(map(repr, known))}, got {', '.join(unknown)}.")
    if arguments.dry_run:
        for op in arguments.op:
            for shape_class in filter(selected.__contains__, configs.TABLE[op][arguments.arch]):
                tiles = candidates(op, shape_class, arguments.arch)
                print(f"{op} {shape_class}: {len(tiles)} candidates", *tiles, sep="\n    ")
        return 0
    if not torch.cuda.is_available():
        print(
            "benchmarks.tune: PyTorch found no CUDA device. Use --dry-run to list candidates.",
            file=sys.stderr,
        )
        return 2
    try:
        check_writable(arguments.output)
        configs.TABLE = load_table(arguments.output)
    except (OSError, ValueError) as error:
        print(f"benchmarks.tune: cannot use --output: {error}", file=sys.stderr)
        return 2
    return tune(arguments.op, selected, arguments.output, start + 60 * arguments.minutes - SHUTDOWN_MARGIN)


def tune(ops: list[str], selected: list[str], output: Path, deadline: float) -> int:
    """Tune the selected classes until ``deadline``, write the table after each, and return the exit code."""
    device = torch.device("cuda")
    architecture, machine = configs.architecture(device), torch.cuda.get_device_name(device)
    by_class, failed = workloads_by_class(architecture, ops, deadline), 0
    all_classes = {(op, shape_class) for op in ops for shape_class in configs.TABLE[op][architecture]}
    for name in [*by_class, *sorted(all_classes - by_class.keys())]:
        if name[1] not in selected:
            continue
        try:
            if name not in by_class:
                raise RuntimeError("no workload uses it")
            if time.monotonic() >= deadline:
                raise RuntimeError("time limit reached before it was started")
            entry = tune_class(name, by_class[name], architecture, machine, deadline)
        except (RuntimeError, ValueError) as error:
            print(f"{' '.join(name)}: entry unchanged: {error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        configs.TABLE = updated(configs.TABLE, architecture, name, *entry)
        try:
            write_table(output, configs.TABLE)
        except OSError as error:
            print(f"benchmarks.tune: cannot write {output}: {error}; {name}: {entry}", file=sys.stderr)
            return 1
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Inspect the compiled kernels without a GPU: registers, spills, shared memory, wgmma and TMA.

    python -m benchmarks.inspect [--arch sm_90 ...] [--op linear ...] [--table FILE] [--candidates] [--json FILE]

Calls the ops at the sizes of :mod:`benchmarks.workloads` and compiles every launch for the given architectures. Exits
with 1 if a kernel violates a rule of :func:`problems`, or if no workload uses a class of the table. ``--candidates``
compiles the tuner's search space instead and only reports, because candidates may violate rules.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from bagel_rt.kernels import configs
from bagel_rt.kernels.triton_language import INTERPRETED, triton
from benchmarks.compiling import DEVICE_LIMITS, Kernel, compile_all, shape_classes_of
from benchmarks.measure import machine
from benchmarks.search_space import candidates
from benchmarks.workloads import ALL_WORKLOADS, OpWorkload


def problems(kernel: Kernel) -> list[str]:
    """Violations of the rules for shipped configurations, one sentence each."""
    if kernel.error:
        return [kernel.error]
    violations = []
    limit = DEVICE_LIMITS[kernel.architecture].shared_per_block
    if kernel.shared_bytes > limit:
        violations.append(
            f"shared memory must be at most {limit} bytes, got {kernel.shared_bytes}: the launch would fail"
        )
    if kernel.spill_bytes:
        violations.append(f"spills {kernel.spill_bytes} bytes")
    if kernel.serialized:
        violations.append(f"{kernel.serialized} wgmma are serialized")
    in_16_bits = any(dtype in _SIXTEEN_BITS for *_, dtype in kernel.dots)
    if in_16_bits and kernel.shape_class != "unaligned" and not (kernel.cp_async or kernel.tma_loads):
        violations.append("a dot without pipelined loads: neither cp.async nor TMA")
    if kernel.architecture in _WARPGROUP_PRODUCTS:
        violations += _warpgroup_problems(kernel)
    elif in_16_bits and not kernel.mma:
        violations.append("a dot without mma.sync")
    return violations


_SIXTEEN_BITS = ("bf16", "f16")
_WARPGROUP_PRODUCTS = {"sm_90": "wgmma", "sm_100": "tcgen05"}


def _warpgroup_problems(kernel: Kernel) -> list[str]:
    """Dots without warpgroup instructions, and TMA that the tiles request but the kernel lacks."""
    violations, instruction = [], _WARPGROUP_PRODUCTS[kernel.architecture]
    if kernel.dots and kernel.registers >= 255:  # at 255 ptxas is about to spill
        violations.append("uses all 255 registers")
    rows = [rows for rows, *_, dtype in kernel.dots if dtype in _SIXTEEN_BITS]
    if rows and max(rows) >= 64 and not getattr(kernel, instruction):
        violations.append(f"a dot without {instruction}")
    if rows and min(rows) >= 64 and kernel.mma:  # tiles of fewer rows must use mma.sync
        violations.append(f"{kernel.mma} mma.sync, at half the rate of {instruction}")
    tma = [value for value in (kernel.tiles or {}).values() if value in _TMA]
    if tma and not kernel.tma_loads:
        violations.append(f"no TMA load, although the tiles request {tma[0]!r}")
    if (kernel.tiles or {}).get("TMA_STORE") and not kernel.tma_stores:
        violations.append("no TMA store, although the tiles request TMA_STORE")
    return violations


_TMA = ("host", "device", "host descriptors", "device descriptors")


def merge(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Merge equal kernels of a class into one entry that lists all their workloads, sorted."""
    merged = {}
    for kernel in kernels:
        tiles = json.dumps(kernel.tiles, sort_keys=True)
        key = (kernel.architecture, kernel.op, kernel.shape_class, tiles, kernel.name, kernel.hash, kernel.error)
        entry = merged.setdefault(key, kernel)
        entry.workloads = sorted({*entry.workloads, *kernel.workloads})
    return [merged[key] for key in sorted(merged)]


def unreached(architecture: str, kernels: Iterable[Kernel]) -> list[str]:
    """Classes of the table without a compiled kernel, except those that use torch."""
    reached = {(kernel.op, kernel.shape_class) for kernel in kernels if kernel.architecture == architecture}
    return [
        f"{op} {shape_class}"
        for op, architectures in configs.TABLE.items()
        for shape_class, entry in architectures[architecture].items()
        if entry["tiles"] is not None and (op, shape_class) not in reached
    ]


COLUMNS = (
    ("registers", "regs"), ("spill_bytes", "spill"), ("shared_bytes", "shared"), ("warps", "warps"),
    ("wgmma", "wgmma"), ("tcgen05", "tcgen05"), ("mma", "mma"), ("tma_loads", "TMA in"), ("tma_stores", "TMA out"),
    ("cp_async", "cp.async"), ("serialized", "C75xx"), ("blocks_per_multiprocessor", "blocks/SM"),
)  # fmt: skip


def print_table(kernels: list[Kernel]) -> None:
    """Print one line per kernel, followed by its problems."""
    print(f"{'arch':7}{'op class':42}{'kernel':34}" + "".join(f"{title:>10}" for _, title in COLUMNS) + "  workloads")
    for kernel in kernels:
        values = "".join(f"{getattr(kernel, attribute):>10}" for attribute, _ in COLUMNS)
        more = f" and {len(kernel.workloads) - 1} more" * (len(kernel.workloads) > 1)
        name = f"{kernel.op} {kernel.shape_class}"
        print(f"{kernel.architecture:7}{name:42}{kernel.name:34}{values}  {kernel.workloads[0]}{more}")
        for problem in problems(kernel):
            print(f"        ! {problem} {kernel.tiles}")


def main() -> int:
    """Compile, print the table, optionally write it as JSON; return the exit code."""
    ops = list(dict.fromkeys(workload.op for workload in ALL_WORKLOADS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=DEVICE_LIMITS, default=["sm_80", "sm_90"], metavar="sm_90")
    parser.add_argument("--op", nargs="+", choices=ops, default=ops, help=f"any of {', '.join(ops)}", metavar="OP")
    parser.add_argument("--table", metavar="FILE", help="inspect this table instead of kernels/configs.json")
    parser.add_argument("--candidates", action="store_true", help="compile the tuner's search space")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="number of parallel processes")
    parser.add_argument("--json", metavar="FILE", help="also write the results to this file")
    arguments = parser.parse_args()
    if INTERPRETED or triton is None:
        reason = "TRITON_INTERPRET must be unset" if INTERPRETED else "Triton must be installed (pip install triton)"
        print(f"benchmarks.inspect: cannot compile: {reason}.", file=sys.stderr)
        return 2
    if arguments.table:
        configs.TABLE = json.loads(Path(arguments.table).read_text())
    workloads = [workload for workload in ALL_WORKLOADS if workload.op in arguments.op]
    if arguments.candidates:
        jobs = [
            job
            for architecture in arguments.arch
            for job in _candidate_jobs(architecture, workloads, arguments.workers)
        ]
    else:
        jobs = [(architecture, workload, None) for architecture in arguments.arch for workload in workloads]
    kernels = merge(kernel for _, compiled in compile_all(jobs, arguments.workers) for kernel in compiled)
    missing = {}
    if workloads == ALL_WORKLOADS and not arguments.candidates:
        missing = {architecture: unreached(architecture, kernels) for architecture in arguments.arch}
    print_table(kernels)
    for architecture, names in missing.items():
        for name in names:
            print(f"{architecture}: no workload uses {name}")
    if arguments.json:
        report = {
            **machine(torch.device("cpu")),  # date, commit, versions
            "kernels": [asdict(kernel) | {"problems": problems(kernel)} for kernel in kernels],
            "unreached": missing,
        }
        Path(arguments.json).write_text(json.dumps(report, indent=2))
    broken = any(map(problems, kernels)) or any(missing.values())
    return int(broken and not arguments.candidates)


def _candidate_jobs(architecture: str, workloads: list[OpWorkload], workers: int) -> Iterator[tuple]:
    """One job per candidate of each class, with the first workload that uses the class."""
    first = {}
    for workload, names in shape_classes_of(workloads, architecture, workers):
        for name in names:
            if name[0] in workload.entries:
                first.setdefault(name, workload)
    for name, workload in first.items():
        for tiles in candidates(*name, architecture):
            yield architecture, workload, {name: tiles}


if __name__ == "__main__":
    sys.exit(main())

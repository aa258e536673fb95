"""What the kernels compile to, on a machine without a GPU.

    python -m benchmarks.inspect [--arch sm_90 ...] [--op linear ...] [--table FILE] [--candidates] [--json FILE]

Calls the ops at the sizes of :mod:`benchmarks.workloads` and compiles every launch for the given architectures: what is
reported is what a GPU of that architecture would be given. Exits with 1 if a kernel breaks a rule of :func:`problems`,
or a class of the table is reached by no workload. ``--candidates`` compiles the tuner's search space instead;
candidates may break rules, so it only reports.
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
from benchmarks.compiling import LIMITS, Kernel, classes_of, compile_all
from benchmarks.measure import machine
from benchmarks.search_space import candidates
from benchmarks.workloads import ALL_WORKLOADS, Workload


def problems(kernel: Kernel) -> list[str]:
    """What must not be in a shipped configuration, one sentence each."""
    if kernel.error:
        return [kernel.error]
    found = []
    limit = LIMITS[kernel.architecture].shared_per_block
    if kernel.shared_bytes > limit:
        found.append(f"{kernel.shared_bytes} bytes of shared memory, of {limit}: will not launch")
    if kernel.spill_bytes:
        found.append(f"spills {kernel.spill_bytes} bytes")
    if kernel.serialised:
        found.append(f"{kernel.serialised} serialised wgmma")
    in_16_bits = any(dtype in _SIXTEEN_BITS for *_, dtype in kernel.dots)
    if in_16_bits and kernel.shape_class != "unaligned" and not (kernel.cp_async or kernel.tma_loads):
        found.append("a matrix product that waits for its loads: no cp.async and no TMA")
    if kernel.architecture in _WARPGROUP_PRODUCTS:
        found += _warpgroup_problems(kernel)
    elif in_16_bits and not kernel.mma:
        found.append("a matrix product without mma.sync")
    return found


_SIXTEEN_BITS = ("bf16", "f16")
_WARPGROUP_PRODUCTS = {"sm_90": "wgmma", "sm_100": "tcgen05"}


def _warpgroup_problems(kernel: Kernel) -> list[str]:
    """Matrix products and loads that do not use what sm_90 brought."""
    found, instruction = [], _WARPGROUP_PRODUCTS[kernel.architecture]
    if kernel.dots and kernel.registers >= 255:  # before sm_90 that is what a large accumulator takes
        found.append("uses all 255 registers")
    rows = [rows for rows, *_, dtype in kernel.dots if dtype in _SIXTEEN_BITS]
    if rows and max(rows) >= 64 and not getattr(kernel, instruction):
        found.append(f"a matrix product without {instruction}")
    if rows and min(rows) >= 64 and kernel.mma:  # fewer rows are left to mma.sync
        found.append(f"{kernel.mma} mma.sync, which reach half the rate of {instruction}")
    asked = [value for value in (kernel.tiles or {}).values() if value in _TMA]
    if asked and not kernel.tma_loads:
        found.append(f"no TMA load, though its tiles say {asked[0]!r}")
    if (kernel.tiles or {}).get("TMA_STORE") and not kernel.tma_stores:
        found.append("no TMA store, though its tiles say TMA_STORE")
    return found


_TMA = ("host", "device", "host descriptors", "device descriptors")


def merge(kernels: Iterable[Kernel]) -> list[Kernel]:
    """One entry for each kernel of a class, naming all its workloads, in the order of the table."""
    merged = {}
    for kernel in kernels:
        tiles = json.dumps(kernel.tiles, sort_keys=True)
        key = (kernel.architecture, kernel.op, kernel.shape_class, tiles, kernel.name, kernel.hash, kernel.error)
        known = merged.setdefault(key, kernel)
        known.workloads = sorted({*known.workloads, *kernel.workloads})
    return [merged[key] for key in sorted(merged)]


def unreached(architecture: str, kernels: Iterable[Kernel]) -> list[str]:
    """Classes of the table that no kernel was compiled for; a class given to torch needs none."""
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
    ("cp_async", "cp.async"), ("serialised", "C75xx"), ("blocks_per_multiprocessor", "blocks/SM"),
)  # fmt: skip


def print_table(kernels: list[Kernel]) -> None:
    """One line a kernel, the problems below it."""
    print(f"{'arch':7}{'op class':42}{'kernel':34}" + "".join(f"{title:>10}" for _, title in COLUMNS) + "  workloads")
    for kernel in kernels:
        values = "".join(f"{getattr(kernel, attribute):>10}" for attribute, _ in COLUMNS)
        more = f" and {len(kernel.workloads) - 1} more" * (len(kernel.workloads) > 1)
        name = f"{kernel.op} {kernel.shape_class}"
        print(f"{kernel.architecture:7}{name:42}{kernel.name:34}{values}  {kernel.workloads[0]}{more}")
        for problem in problems(kernel):
            print(f"        ! {problem} {kernel.tiles}")


def main() -> int:
    """Compile, print the table, write it as JSON if asked to; the exit code."""
    ops = list(dict.fromkeys(workload.op for workload in ALL_WORKLOADS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=LIMITS, default=["sm_80", "sm_90"], metavar="sm_90")
    parser.add_argument("--op", nargs="+", choices=ops, default=ops, help=f"of {', '.join(ops)}", metavar="OP")
    parser.add_argument("--table", metavar="FILE", help="inspect this table instead of kernels/configs.json")
    parser.add_argument("--candidates", action="store_true", help="compile the tuner's search space")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes side by side")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    if INTERPRETED or triton is None:
        reason = "TRITON_INTERPRET is set; unset it" if INTERPRETED else "Triton is not installed; pip has it for Linux"
        print(f"benchmarks.inspect: nothing can be compiled: {reason}", file=sys.stderr)
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
    kernels = merge(kernel for _, found in compile_all(jobs, arguments.workers) for kernel in found)
    missing = {}
    if workloads == ALL_WORKLOADS and not arguments.candidates:
        missing = {architecture: unreached(architecture, kernels) for architecture in arguments.arch}
    print_table(kernels)
    for architecture, names in missing.items():
        for name in names:
            print(f"{architecture}: no workload reaches {name}")
    if arguments.json:
        report = {
            **machine(torch.device("cpu")),  # date, commit, versions
            "kernels": [asdict(kernel) | {"problems": problems(kernel)} for kernel in kernels],
            "unreached": missing,
        }
        Path(arguments.json).write_text(json.dumps(report, indent=2))
    broken = any(map(problems, kernels)) or any(missing.values())
    return int(broken and not arguments.candidates)


def _candidate_jobs(architecture: str, workloads: list[Workload], workers: int) -> Iterator[tuple]:
    """Every candidate of every class, with the first workload that is about the class."""
    first = {}
    for workload, reached in classes_of(workloads, architecture, workers):
        for name in reached:
            if name[0] in workload.entries:
                first.setdefault(name, workload)
    for name, workload in first.items():
        for tiles in candidates(*name, architecture):
            yield architecture, workload, {name: tiles}


if __name__ == "__main__":
    sys.exit(main())

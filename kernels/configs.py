"""Tile sizes of the Triton kernels: one table, ``configs.json``, by op, architecture and shape class.

An entry of the table:

    tiles    launch arguments of the kernel: its tile sizes and switches, num_warps, num_stages. null: torch (cuBLAS)
             was measured faster for this class, so the launcher runs the reference
    source   where the numbers come from: a measurement (machine, date, figure), or the reasons for them

The table is read once and nothing is tuned at run time, so a first request compiles one variant of each kernel for each
class that it meets, and results do not depend on timing. ``python -m benchmarks.tune`` measures candidates on a GPU and
rewrites the table.
"""

import functools
import json
from pathlib import Path

import torch

PATH = Path(__file__).with_name("configs.json")
TABLE = json.loads(PATH.read_text())

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")
_TABLE_OF = {(8, 6): "sm_89", (12, 0): "sm_89", (12, 1): "sm_89"}  # as little shared memory as sm_89; no wgmma


@functools.cache
def supports(device: torch.device) -> bool:
    """Whether kernels can run on ``device``: sm_80 (A100) or newer, or a CPU, in the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def architecture(device: torch.device) -> str:
    """Which of the table's architectures serves ``device``; for the interpreter on a CPU, sm_90.

    Raises:
        ValueError: a GPU older than sm_80.
    """
    if device.type != "cuda":
        return "sm_90"
    capability = torch.cuda.get_device_capability(device)
    if not supports(device):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"{name} is sm_{capability[0]}{capability[1]}; the kernels need sm_80 (A100) or newer. "
                         "BAGEL_RT_BACKEND=reference runs without them")  # fmt: skip
    if capability in _TABLE_OF:
        return _TABLE_OF[capability]
    return max((name for name in ARCHITECTURES if _number(name) <= capability), key=_number)


def _number(name: str) -> tuple[int, int]:
    digits = name.removeprefix("sm_")
    return int(digits[:-1]), int(digits[-1])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent kernel ``device`` runs side by side; for the interpreter, a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def tiles(op: str, shape_class: str, device: torch.device) -> dict | None:
    """Launch arguments of ``op`` for a class of shapes on ``device``; None where torch is faster.

    Raises:
        KeyError: the table has no such op or class; every architecture has all of them.
    """
    return TABLE[op][architecture(device)][shape_class]["tiles"]

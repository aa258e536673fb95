"""Tile sizes of the Triton kernels: one table, ``configs.json``, indexed by op, architecture and shape class.

An entry of the table:

    tiles    launch arguments of the kernel: tile sizes, switches, num_warps, num_stages. null if torch (cuBLAS) was
             measured faster for this class; the launcher then runs the reference
    source   origin of the numbers: a measurement (machine, date, figure), or the reasoning behind them

Nothing is tuned at run time: a kernel compiles once per shape class in use, and results do not depend on timing.
``python -m benchmarks.tune`` measures candidates on a GPU and rewrites the table.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("configs.json")
Tiles = dict[str, Any]
"""Launch arguments of a kernel."""

TABLE: dict[str, dict[str, dict[str, dict[str, Any]]]] = json.loads(PATH.read_text())

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")
# Architectures without entries of their own that have the shared memory of sm_89, and no wgmma.
_SAME_AS = {(8, 6): "sm_89", (12, 0): "sm_89", (12, 1): "sm_89"}


@functools.cache
def supports(device: torch.device) -> bool:
    """Whether kernels can run on ``device``: a GPU of sm_80 (A100) or newer, or a CPU in the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's architecture for ``device``: the newest that is not newer than the GPU; sm_90 on a CPU.

    Raises:
        ValueError: the GPU is older than sm_80.
    """
    if device.type != "cuda":
        return "sm_90"
    capability = torch.cuda.get_device_capability(device)
    if not supports(device):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"GPU must be sm_80 (A100) or newer to run the kernels, got sm_{capability[0]}{capability[1]} "
                         f"({name}). Set BAGEL_RT_BACKEND=reference to run without them.")  # fmt: skip
    if capability in _SAME_AS:
        return _SAME_AS[capability]
    return max((name for name in ARCHITECTURES if _number(name) <= capability), key=_number)


def _number(name: str) -> tuple[int, int]:
    digits = name.removeprefix("sm_")
    return int(digits[:-1]), int(digits[-1])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors, which sizes persistent grids; 3 on a CPU, so the interpreter loops over tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def tiles(op: str, shape_class: str, device: torch.device) -> Tiles:
    """Launch arguments of ``op`` for a shape class on ``device``; empty if torch is faster (``linear`` only).

    Raises:
        KeyError: the table has no such op or class. Every architecture has all of them.
    """
    return TABLE[op][architecture(device)][shape_class]["tiles"] or {}

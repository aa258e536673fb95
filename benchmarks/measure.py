"""Times, ceilings and the machine: what every figure of a benchmark stands on.

On a GPU a call is timed by CUDA events, behind a read of a buffer that L2 cannot hold: the call finds its inputs in
memory, as in a model whose layers are many times L2, and the host has the time of three such reads to issue the call,
so that launches are hidden as they are in a queue of kernels. Figures are medians.
"""

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "numpy", "liger-kernel", "vllm-omni")
CEILINGS = {"H200": (790e12, 4.3e12)}
"""Part of a GPU's name -> bfloat16 flop/s of a large product, bytes/s of a large copy, as measured."""


class Clock:
    """Times calls on one device.

    Args:
        device: where the calls run.
        seconds: how long one call is repeated.
        most: and how often at most.
    """

    def __init__(self, device: torch.device, seconds: float = 0.3, most: int = 100):
        self.device, self.seconds, self.most = device, seconds, most
        self._buffer = None
        if device.type == "cuda":
            size = min(2**29, torch.cuda.get_device_properties(device).total_memory // 16)
            self._buffer = torch.zeros(size // 4, dtype=torch.float32, device=device)

    def microseconds(self, call: Callable[[], object]) -> float:
        """Median time of a call, after one or two that are not counted."""
        for _ in range(min(2, self.most)):
            call()
        once = self._once_cuda if self.device.type == "cuda" else self._once_cpu
        times, deadline = [], time.perf_counter() + self.seconds
        while len(times) < min(3, self.most) or (len(times) < self.most and time.perf_counter() < deadline):
            times.append(once(call))
        return statistics.median(times)

    def _once_cpu(self, call) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6

    def _once_cuda(self, call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            torch.sum(self._buffer)  # a read leaves nothing that the call would have to write back
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def measured_ceilings(device: torch.device) -> tuple[float, float]:
    """bfloat16 flop/s of an 8192 x 8192 x 8192 product and bytes/s of a 2 GiB copy, read and write; small on a CPU."""
    clock, cuda = Clock(device), device.type == "cuda"
    n, size = (8192, 2**31) if cuda else (256, 2**22)
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    flops = 2 * n**3 / clock.microseconds(lambda: a @ b) * 1e6
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return flops, 2 * size / clock.microseconds(lambda: target.copy_(source)) * 1e6


def ceilings(device: torch.device) -> tuple[float, float]:
    """The known ceilings of this GPU; of another the ones measured now."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [figures for part, figures in CEILINGS.items() if part in name]
    return known[0] if known else measured_ceilings(device)


def git_state() -> str:
    """The commit, with "-dirty" where tracked files differ from it; "unknown" outside a repository."""
    if not (ROOT / ".git").exists():
        return "unknown"
    commit = _printed("git", "rev-parse", "HEAD")
    return (
        f"{commit}-dirty" if _printed("git", "status", "--porcelain", "--untracked-files=no") else commit or "unknown"
    )


def machine(device: torch.device) -> dict[str, str]:
    """Where and when figures were taken, and of which code: name -> text."""
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git_state(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "versions": ", ".join(f"{name} {value}" for name, value in _versions().items()),
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "gpu at the start": gpu_state(device)}
    return found


def gpu_state(device: torch.device) -> str:
    """Driver, clocks, power and temperature at this moment, where nvidia-smi tells them."""
    if device.type != "cuda":
        return "no GPU"
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    told = _printed("nvidia-smi", query, "--format=csv", f"--id={device.index or 0}")
    return "; ".join(told.splitlines()) or "nvidia-smi does not say"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _printed(*command: str) -> str:
    """What a command prints; nothing if it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; columns of numbers are right-aligned."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    numeric = [
        bool(rows) and all(re.fullmatch(r"[\d.,e+%-]*( x)?", row[i]) for row in rows) for i in range(len(header))
    ]
    lines = [header, ["---:" if right else "---" for right in numeric], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

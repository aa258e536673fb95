"""Times, ceilings and the machine: what every figure of a benchmark stands on.

On a GPU calls are timed by CUDA events, with cold caches, as in a model whose layers are many times L2. Figures are
medians. Ops are timed in rotation: several calls back to back, each on its own copy of the inputs and into outputs of
its own, all of them together twice as large as L2, divided by their number. So a call finds its inputs in memory, and
what it leaves unwritten in L2 the next ones pay for, as it pays for those before it: both directions of the traffic are
in the figure. The GPU spins while the host issues the calls, so that launches are hidden as in a queue of kernels.
"""

import math
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


LATENCY = 2.0
"""Microseconds below which a roofline says nothing: launching and filling the pipeline of a kernel take as long."""
MAX_SETS = 16
"""Most copies of a call's inputs. Fewer than would fill L2 only for calls that are bound by latency anyway."""


class Clock:
    """Times calls on one device.

    Args:
        device: where the calls run.
        seconds: how long one call is repeated.
        most: and how often at most.

    Attributes:
        cache: bytes of the last cache of a GPU; 0 on a CPU, whose calls are not rotated.
    """

    def __init__(self, device: torch.device, seconds: float = 0.3, most: int = 100):
        self.device, self.seconds, self.most, self.cache = device, seconds, most, 0
        self._buffer = self._spin = None
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self.cache = properties.L2_cache_size
            self._buffer = torch.zeros(min(2**29, properties.total_memory // 16) // 4, device=device)
            torch.cuda._sleep(10**6)
            self._spin = 10**6 / self._between_events(lambda: torch.cuda._sleep(10**6))  # cycles of a microsecond

    def sets(self, traffic: int) -> int:
        """How many copies of inputs and outputs of ``traffic`` bytes are twice as large as L2; 16 at most."""
        return max(1, min(MAX_SETS, math.ceil(2 * self.cache / max(traffic, 1))))

    def microseconds(self, call: Callable[[], object]) -> float:
        """Median time of a call by itself, after one or two that are not counted.

        On a GPU it runs behind reads of a buffer that L2 cannot hold. What it leaves unwritten in L2 is not in the
        figure: good for comparing ways to do the same, and for calls that move many times L2.
        """
        return self._median(self._behind_reads if self.device.type == "cuda" else self._on_the_host, [call])

    def in_rotation(self, calls: list[Callable[[], object]]) -> float:
        """Median time of one of several calls that do the same on :meth:`sets` of inputs, back to back."""
        return self._median(self._rotated if self.device.type == "cuda" else self._on_the_host, calls)

    def _median(self, once, calls) -> float:
        for _ in range(min(2, self.most)):
            for call in calls:
                call()
        times, deadline = [], time.perf_counter() + self.seconds
        while len(times) < min(3, self.most) or (len(times) < self.most and time.perf_counter() < deadline):
            times.append(once(calls))
        return statistics.median(times)

    def _on_the_host(self, calls) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e6 / len(calls)

    def _behind_reads(self, calls) -> float:
        for _ in range(3):
            torch.sum(self._buffer)
        return self._between_events(*calls)

    def _rotated(self, calls) -> float:
        kept = []  # every call has outputs of its own, which the next one does not overwrite in L2

        def run():
            kept.extend([call() for call in calls])

        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        run()
        host = (time.perf_counter() - start) * 1e6
        kept.clear()
        torch.cuda._sleep(int(self._spin * (50 + 1.5 * min(host, 20_000))))
        return self._between_events(run) / len(calls)

    def _between_events(self, call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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
    told = _printed("nvidia-smi", query, "--format=csv", f"--id={_identity(device)}")
    return "; ".join(told.splitlines()) or "nvidia-smi does not say"


def _identity(device: torch.device) -> str:
    """What nvidia-smi calls a GPU: CUDA's numbers are others where CUDA_VISIBLE_DEVICES hides some."""
    properties = torch.cuda.get_device_properties(device)
    if uuid := getattr(properties, "uuid", None):
        return f"GPU-{str(uuid).removeprefix('GPU-')}"
    place = [getattr(properties, f"pci_{name}_id", None) for name in ("domain", "bus", "device")]
    return "unknown" if None in place else "{:08x}:{:02x}:{:02x}.0".format(*place)


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

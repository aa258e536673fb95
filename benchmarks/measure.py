"""Timing, device ceilings and machine information shared by all benchmarks.

GPU calls are timed with CUDA events and a cold L2, because in a model the weights of the other layers evict a layer's
data from L2 before its next use. All times are medians.

Ops are timed in rotation: N calls run back to back, each on its own copy of the inputs and into its own outputs, and
the total is divided by N. N is chosen so that the copies together are twice the size of L2. Every call therefore reads
its inputs from device memory. The dirty lines that it leaves in L2 are written back during the calls that follow, so
the total includes write traffic as well as read traffic. A spin kernel occupies the GPU while the host enqueues the N
calls, which hides launch overhead as in a full stream.
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
"""Part of a GPU's name -> measured bfloat16 flop/s of a large GEMM, bytes/s of a large copy."""

LATENCY_US = 2.0
"""Roofline times below this many microseconds are not meaningful: kernel launch and pipeline fill take as long."""
MAX_COPIES = 16
"""Maximum number of input copies. Calls so small that 16 copies do not fill L2 are latency-bound anyway."""


class Timer:
    """Times calls on one device.

    Args:
        device: device of the calls.
        seconds: time budget for repeating one call.
        max_repeats: maximum number of repeats within that budget.

    Attributes:
        l2_bytes: size of the GPU's L2; 0 on a CPU, where inputs are not copied.
    """

    def __init__(self, device: torch.device, seconds: float = 0.3, max_repeats: int = 100):
        self.device, self.seconds, self.max_repeats, self.l2_bytes = device, seconds, max_repeats, 0
        self._flush_buffer = self._cycles_per_us = None
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self.l2_bytes = properties.L2_cache_size
            self._flush_buffer = torch.zeros(min(2**29, properties.total_memory // 16) // 4, device=device)
            torch.cuda._sleep(10**6)  # the first launch loads the module
            self._cycles_per_us = 10**6 / self._between_events(
                lambda: torch.cuda._sleep(10**6)
            )  # cycles of a microsecond

    def num_copies(self, traffic: int) -> int:
        """Number of input and output copies, ``traffic`` bytes each, that are twice the size of L2; at most 16."""
        return max(1, min(MAX_COPIES, math.ceil(2 * self.l2_bytes / max(traffic, 1))))

    def microseconds(self, call: Callable[[], object]) -> float:
        """Median time of a single call, after up to two warm-up calls.

        On a GPU, L2 is flushed before each call. The write-back of dirty lines that the call leaves in L2 is not
        included. Suitable for comparing implementations of one op, and for calls whose traffic is many times L2.
        """
        return self._median(self._after_flush if self.device.type == "cuda" else self._on_host, [call])

    def microseconds_rotating(self, calls: list[Callable[[], object]]) -> float:
        """Median time per call of equivalent calls on separate input copies (:meth:`num_copies`), back to back."""
        return self._median(self._rotating if self.device.type == "cuda" else self._on_host, calls)

    def _median(self, once, calls) -> float:
        for _ in range(min(2, self.max_repeats)):
            for call in calls:
                call()
        times, deadline = [], time.perf_counter() + self.seconds
        while len(times) < min(3, self.max_repeats) or (
            len(times) < self.max_repeats and time.perf_counter() < deadline
        ):
            times.append(once(calls))
        return statistics.median(times)

    def _on_host(self, calls) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e6 / len(calls)

    def _after_flush(self, calls) -> float:
        for _ in range(3):  # the buffer is much larger than L2, so reading it evicts everything else
            torch.sum(self._flush_buffer)
        return self._between_events(*calls)

    def _rotating(self, calls) -> float:
        # Outputs stay alive for the whole rotation. Otherwise the caching allocator would give every call the same
        # block, which the next call overwrites in L2 before it is ever written back.
        kept = []

        def run():
            kept.extend([call() for call in calls])

        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        run()
        enqueue_us = (time.perf_counter() - start) * 1e6
        kept.clear()
        # The GPU must spin for longer than the host needs to enqueue the calls, or gaps between launches are timed.
        torch.cuda._sleep(int(self._cycles_per_us * (50 + 1.5 * min(enqueue_us, 20_000))))
        return self._between_events(run) / len(calls)

    def _between_events(self, call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def measured_ceilings(device: torch.device) -> tuple[float, float]:
    """bfloat16 flop/s of an 8192x8192x8192 GEMM and bytes/s (read plus write) of a 2 GiB copy; smaller on a CPU."""
    timer, cuda = Timer(device), device.type == "cuda"
    n, size = (8192, 2**31) if cuda else (256, 2**22)
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    flops = 2 * n**3 / timer.microseconds(lambda: a @ b) * 1e6
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return flops, 2 * size / timer.microseconds(lambda: target.copy_(source)) * 1e6


def ceilings(device: torch.device) -> tuple[float, float]:
    """flop/s and bytes/s of this device: from ``CEILINGS`` if the GPU is listed there, otherwise measured now."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [figures for part, figures in CEILINGS.items() if part in name]
    return known[0] if known else measured_ceilings(device)


def git_state() -> str:
    """The commit hash, plus "-dirty" if tracked files are modified; "unknown" outside a repository."""
    if not (ROOT / ".git").exists():
        return "unknown"
    commit = _output_of("git", "rev-parse", "HEAD")
    return (
        f"{commit}-dirty" if _output_of("git", "status", "--porcelain", "--untracked-files=no") else commit or "unknown"
    )


def machine(device: torch.device) -> dict[str, str]:
    """Date, commit, machine and package versions, for the header of a result file: name -> text."""
    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git_state(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "versions": ", ".join(f"{name} {value}" for name, value in _versions().items()),
    }
    if device.type == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(device), "gpu at the start": gpu_state(device)}
    return about


def gpu_state(device: torch.device) -> str:
    """Current driver version, clocks, power and temperature according to nvidia-smi."""
    if device.type != "cuda":
        return "no GPU"
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    output = _output_of("nvidia-smi", query, "--format=csv", f"--id={_nvidia_smi_id(device)}")
    return "; ".join(output.splitlines()) or "not available from nvidia-smi"


def _nvidia_smi_id(device: torch.device) -> str:
    """UUID or PCI address of a GPU. CUDA indices differ from nvidia-smi's under CUDA_VISIBLE_DEVICES."""
    properties = torch.cuda.get_device_properties(device)
    if uuid := getattr(properties, "uuid", None):
        return f"GPU-{str(uuid).removeprefix('GPU-')}"
    address = [getattr(properties, f"pci_{name}_id", None) for name in ("domain", "bus", "device")]
    return "unknown" if None in address else "{:08x}:{:02x}:{:02x}.0".format(*address)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _output_of(*command: str) -> str:
    """Standard output of a command; empty if it fails or is not installed."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with numeric columns right-aligned."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    numeric = [
        bool(rows) and all(re.fullmatch(r"[\d.,e+%-]*( x)?", row[i]) for row in rows) for i in range(len(header))
    ]
    lines = [header, ["---:" if right else "---" for right in numeric], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

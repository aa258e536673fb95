"""The compiled extension ``_C`` of the parent package, and whether its CUDA kernels run an op.

The extension contains the planner and, if built with a CUDA compiler, the decode kernels. They take addresses and a
stream as integers, so the extension does not link against torch. The tests load another build of the same sources that
runs the kernels on the host, thread by thread (tests/cuda_on_host).
"""

import functools
import itertools
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .backend import backend, check_current_device, wants_gradient
from .configs import supports

DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes that the CUDA kernels support."""

COUNTERS = 4096
"""Counters per stream. A decoded row needs fewer than a hundred."""

STREAMS = 32
"""Streams per device with counters of their own; the next stream shares those of the first."""


def _load_extension() -> tuple[Any, str]:
    """Return (module ``_C`` of the parent package, "") or (None, the reason it is missing)."""
    if os.environ.get("BAGEL_RT_EXTENSION") == "0":
        return None, "disabled by BAGEL_RT_EXTENSION=0"
    try:
        return import_module(".._C", __package__), ""
    except ImportError as error:
        return None, _build_log() or f"{error}. pip install builds it."


def _build_log() -> str:
    """Build failure that setup.py recorded in the parent package; empty without one."""
    parent = sys.modules.get(__package__.rpartition(".")[0])
    log = Path(parent.__file__).with_name("_C.log") if parent and parent.__file__ else None
    return log.read_text() if log and log.exists() else ""


EXTENSION, EXTENSION_ERROR = _load_extension()
"""The compiled module, or None and the reason."""


def cuda_error(device: torch.device | None = None) -> str:
    """Why the extension's CUDA kernels do not run on ``device``, by default on any GPU; empty if they do."""
    if EXTENSION is None:
        return EXTENSION_ERROR.strip()
    if not getattr(EXTENSION, "has_cuda", False):
        return _build_log().strip() or "it was built without a CUDA compiler"
    return "" if device is None else _device_error(EXTENSION, device)


@functools.cache
def _device_error(extension: Any, device: torch.device) -> str:
    if not supports(device):
        return "the GPU is older than sm_80"
    with torch.cuda.device(device):
        return str(extension.cuda_error())  # no code for this GPU, or the driver is older than the toolkit


def runs_extension(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether an op launches its CUDA kernel for ``x`` and ``others``; otherwise it composes other ops.

    Requires float32 or bfloat16, no gradient, and a GPU for which the extension has code. CPU tensors qualify under the
    backend ``triton`` if the loaded extension is the tests' emulation.

    Raises:
        RuntimeError: ``x`` is not on the current GPU, where kernels are launched.
    """
    if EXTENSION is None or x.dtype not in DTYPES:
        return False
    choice = backend()
    if x.is_cuda:
        if choice == "reference" or cuda_error(x.device):
            return False
    elif choice != "triton" or not getattr(EXTENSION, "emulated", False) or x.device.type != "cpu":
        return False
    if wants_gradient(x, *others):
        return False
    check_current_device(x)
    return True


def stream(x: torch.Tensor) -> int:
    """The current stream of ``x``'s device as an integer; 0 on a CPU."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def shared_memory(x: torch.Tensor) -> int:
    """Maximum bytes of shared memory per block on ``x``'s device; in the emulation that of sm_90."""
    if not x.is_cuda:
        return 232448
    properties: Any = torch.cuda.get_device_properties(x.device)  # torch's annotations lack the attribute
    return int(properties.shared_memory_per_block_optin)


_counters: dict[torch.device, torch.Tensor] = {}  # never replaced: captured graphs contain the addresses
_streams: dict[tuple[torch.device, int], int] = {}
_next_stream = itertools.count()


def counters(x: torch.Tensor, n: int) -> torch.Tensor:
    """Return at least n int32 counters, reserved for the current stream of ``x``'s device.

    The blocks of a kernel count themselves there to find out which finishes last. Counters are zero before a kernel,
    and its last block resets them, so no launch has to clear them. Each stream has its own, so kernels of several
    streams may overlap. A captured graph uses the counters of its capture stream whatever stream it is replayed on, so
    graphs captured on the same stream must not be replayed concurrently.

    Raises:
        ValueError: n is above ``COUNTERS``.
        RuntimeError: the first call for a device is made during a CUDA graph capture: the counters would be allocated
            in the graph's memory pool.
    """
    if n > COUNTERS:
        raise ValueError(f"the number of counters must be at most {COUNTERS}, got {n}. Use a smaller batch.")
    allocated = _counters.get(x.device)
    if allocated is None:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a decode kernel must run once before it is captured in a CUDA graph. Run it eagerly.")
        with torch.inference_mode(False):
            allocated = torch.zeros(STREAMS, COUNTERS, dtype=torch.int32, device=x.device)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)  # once: other streams are not ordered after the fill
        _counters[x.device] = allocated
    key = x.device, stream(x)
    index = _streams.get(key)
    if index is None:
        index = _streams.setdefault(key, next(_next_stream))
    return allocated[index % STREAMS]

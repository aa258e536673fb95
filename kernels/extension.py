"""The compiled extension ``_C`` of the package that holds this one, and whether its CUDA kernels run an op.

The extension holds the planner and, where it was built with a CUDA compiler, the kernels of the one-token path. They
take addresses and a stream as integers; nothing of torch is compiled in. The tests load another build of the same
sources, whose kernels run on the host, thread by thread (tests/cuda_on_host).
"""

import functools
import itertools
import os
import sys
from importlib import import_module
from pathlib import Path

import torch

from .backend import backend, check_current_device, wants_gradient
from .configs import supports

DTYPES = (torch.float32, torch.bfloat16)
"""What the kernels take."""

COUNTERS = 4096
"""How many counters a stream has: a decoded row needs fewer than a hundred."""

STREAMS = 32
"""How many streams of a device have counters of their own; one more shares those of the first."""


def _load_extension():
    """(the module ``_C`` of the parent package, "") or (None, why it is missing)."""
    if os.environ.get("BAGEL_RT_EXTENSION") == "0":
        return None, "disabled by BAGEL_RT_EXTENSION=0"
    try:
        return import_module(".._C", __package__), ""
    except ImportError as error:
        return None, _build_log() or f"{error}; pip install builds it"


def _build_log() -> str:
    """What setup.py left in the parent package about what it could not build."""
    parent = sys.modules.get(__package__.rpartition(".")[0])
    log = Path(parent.__file__).with_name("_C.log") if parent else None
    return log.read_text() if log and log.exists() else ""


EXTENSION, EXTENSION_ERROR = _load_extension()
"""The compiled module, or None and the reason."""


def cuda_error(device: torch.device | None = None) -> str:
    """Why the extension's CUDA kernels do not run on ``device``, on any GPU by default; empty if they do."""
    if EXTENSION is None:
        return EXTENSION_ERROR.strip()
    if not getattr(EXTENSION, "has_cuda", False):
        return _build_log().strip() or "it was built without a CUDA compiler"
    return "" if device is None else _device_error(EXTENSION, device)


@functools.cache
def _device_error(extension, device) -> str:
    if not supports(device):
        return "the GPU is older than sm_80"
    with torch.cuda.device(device):
        return extension.cuda_error()  # no code for this GPU, or a driver older than the compiler


def runs_extension(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether an op given ``x`` (and ``others``) launches its CUDA kernel; otherwise it composes other ops.

    That takes float32 or bfloat16 on a GPU for which the extension has code; under the backend ``triton`` the CPU
    will do, if the loaded extension is the tests' emulation. Tensors that want a gradient go to the other ops.

    Raises:
        RuntimeError: ``x`` is on another GPU than the current one, where kernels would be launched.
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
    """The current stream of ``x``'s device, as kernels take it."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def shared_memory(x: torch.Tensor) -> int:
    """Bytes of shared memory that a block may have on ``x``'s device; in the emulation, as on sm_90."""
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin if x.is_cuda else 232448


_counters: dict[torch.device, torch.Tensor] = {}  # never replaced: captured graphs hold the addresses
_streams: dict[tuple[torch.device, int], int] = {}
_next_stream = itertools.count()


def counters(x: torch.Tensor, n: int) -> torch.Tensor:
    """The int32 counters of the current stream of ``x``'s device, at least n, all zero between kernels, which leave
    them so.

    Kernels of several streams may run side by side. Captured graphs hold the counters of the stream they were captured
    on, so two of them may not.

    Raises:
        ValueError: n is above ``COUNTERS``.
        RuntimeError: the first call for a device comes while a CUDA graph is captured, which would keep them.
    """
    if n > COUNTERS:
        raise ValueError(f"{n} counters are asked for, but a stream has {COUNTERS}; use a smaller batch")
    found = _counters.get(x.device)
    if found is None:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a CUDA graph is captured before its kernels ever ran; run them once before the capture")
        with torch.inference_mode(False):
            found = torch.zeros(STREAMS, COUNTERS, dtype=torch.int32, device=x.device)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)  # once: other streams do not wait for the zeros
        _counters[x.device] = found
    key = x.device, stream(x)
    number = _streams.get(key)
    if number is None:
        number = _streams.setdefault(key, next(_next_stream))
    return found[number % STREAMS]

"""Backend selection: whether ops run their kernels or their PyTorch references."""

import os
from collections.abc import Iterable

import torch

from . import configs
from .triton_language import INTERPRETED, triton

BACKENDS = ("auto", "reference", "triton")

_override: str | None = None


def choose_backend(choice: str | None) -> None:
    """Set the backend of this process, overriding the environment variable; None removes the override.

    Raises:
        ValueError: ``choice`` is not one of ``BACKENDS``.
    """
    global _override
    _check_choice("backend", choice)
    _override = choice


def _check_choice(name: str, choice: str | None) -> None:
    if choice is not None and choice not in BACKENDS:
        raise ValueError(f"{name} must be 'auto', 'reference' or 'triton', got {choice!r}.")


def backend() -> str:
    """The active backend: the one set by :func:`choose_backend`, else ``BAGEL_RT_BACKEND``, else "auto".

    ``auto`` runs kernels on GPUs of sm_80 or newer and PyTorch references elsewhere. ``reference`` runs references on
    every device, to distinguish a kernel bug from a model bug. ``triton`` requires kernels: on a CPU they run in
    Triton's interpreter, thousands of times slower, if the process was started with ``TRITON_INTERPRET=1``. On a GPU,
    ``auto`` and ``triton`` also run the CUDA kernels of the extension, if it was built with them.

    Raises:
        ValueError: ``BAGEL_RT_BACKEND`` has another value.
    """
    choice = _override or os.environ.get("BAGEL_RT_BACKEND", "auto")
    _check_choice("BAGEL_RT_BACKEND", choice)
    return choice


def check_backend(device: torch.device, choice: str | None = None) -> None:
    """Check that a backend, by default the active one, is available on ``device``.

    Raises:
        ValueError: unknown backend, or ``triton`` without Triton, on a CPU without its interpreter or on an old GPU.
    """
    _check_choice("backend", choice)
    if (choice or backend()) != "triton":
        return
    if triton is None:
        raise ValueError("backend 'triton' needs the triton package, which is not installed. It is Linux only.")
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"device must be cuda for backend 'triton', got {device}. To run its kernels on a CPU, slowly, in Triton's "
            "interpreter, start Python with TRITON_INTERPRET=1."
        )
    configs.architecture(device)


def runs_kernel(x: torch.Tensor, *others: torch.Tensor | None, float64: bool = False) -> bool:
    """Whether an op launches its Triton kernel for ``x`` and ``others``; otherwise it runs its PyTorch reference.

    float64 runs the reference unless ``float64`` is set: most kernels do not support it. Tensors that require a
    gradient also run the reference, which PyTorch differentiates. An op with its own gradient calls this with
    gradients disabled, so it launches its kernel.

    Raises:
        RuntimeError: ``x`` is not on the current GPU, where kernels are launched.
    """
    if not (x.is_cuda or INTERPRETED) or triton is None or (x.dtype == torch.float64 and not float64):
        return False
    choice = backend()
    if choice == "reference" or (choice == "auto" and not (x.is_cuda and configs.supports(x.device))):
        return False
    if wants_gradient(x, *others):
        return False
    check_current_device(x)
    return True


def wants_gradient(*arguments: object) -> bool:
    """Whether autograd is enabled and one of the tensors among ``arguments`` requires a gradient."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments)


def check_current_device(x: torch.Tensor) -> None:
    """Check that ``x``, if it is a CUDA tensor, is on the current GPU.

    Raises:
        RuntimeError: it is on another one.
    """
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        raise RuntimeError(
            f"tensors must be on the current device cuda:{torch.cuda.current_device()}, got {x.device}. "
            f"Call torch.cuda.set_device({x.device.index}) first."
        )


def mismatch(
    op: str, name: str, tensor: torch.Tensor | None, shape: Iterable[int | str], dtype: torch.dtype | str
) -> ValueError:
    """Build the error for an argument of an op with the wrong shape or dtype."""
    got = None if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
    allowed = str(tuple(shape)).replace("'", "")  # a letter stands for a dimension of any size
    return ValueError(f"{op}: {name} must be {allowed} {dtype}, got {got}.")


def check_devices(op: str, **tensors: torch.Tensor | None) -> None:
    """Check that all tensors are on the device of the first one.

    The extension's kernels take raw addresses, so nothing else would catch a tensor on the wrong device.

    Raises:
        ValueError: with the name and device of the first tensor that is not.
    """
    first, device = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {device} like {first}, got {tensor.device}.")

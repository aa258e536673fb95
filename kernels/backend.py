"""Which implementation the ops run: the backend chosen, and where its kernels can run."""

import os

import torch

from . import configs
from .triton_language import INTERPRETED, triton

CHOICES = ("auto", "reference", "triton")

_chosen: str | None = None


def choose_backend(choice: str | None) -> None:
    """Choose for this process, over the environment; None leaves it to the environment again.

    Raises:
        ValueError: not one of ``CHOICES``.
    """
    global _chosen
    _check_choice(choice)
    _chosen = choice


def _check_choice(choice: str | None) -> None:
    if choice is not None and choice not in CHOICES:
        raise ValueError(f"backend={choice!r} is not a backend; use 'auto', 'reference' or 'triton'")


def backend() -> str:
    """Name the choice in force: what was chosen, else the environment variable ``BAGEL_RT_BACKEND``, else "auto".

    ``auto`` runs kernels on GPUs from sm_80 on and PyTorch references elsewhere. ``reference`` forces references on
    every device, which tells a kernel bug from a model bug. ``triton`` insists on kernels: on the CPU they run in
    Triton's interpreter, thousands of times slower, if the process was started with ``TRITON_INTERPRET=1``. Ops whose
    kernel is CUDA run it on a GPU under either of the two that run kernels, if the extension was built with it.

    Raises:
        ValueError: the variable has any other value.
    """
    choice = _chosen or os.environ.get("BAGEL_RT_BACKEND", "auto")
    if choice not in CHOICES:
        raise ValueError(f"BAGEL_RT_BACKEND={choice!r} is not a backend; use 'auto', 'reference' or 'triton'")
    return choice


def check_backend(device: torch.device, choice: str | None = None) -> None:
    """Refuse a choice, by default the one in force, that cannot be had on ``device``.

    Raises:
        ValueError: an unknown choice, or ``triton`` without Triton, on a CPU without its interpreter or on an old GPU.
    """
    _check_choice(choice)
    if (choice or backend()) != "triton":
        return
    if triton is None:
        raise ValueError("backend 'triton' is chosen, but Triton is not installed; pip has it for Linux only")
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"backend 'triton' is chosen, but its kernels run on CUDA and the device is {device}; on a CPU start "
            "Python with TRITON_INTERPRET=1 to run them, slowly, in Triton's interpreter"
        )
    configs.architecture(device)


def runs_kernel(x: torch.Tensor, *others: torch.Tensor | None, float64: bool = False) -> bool:
    """Whether an op given ``x`` (and ``others``) launches its Triton kernel; otherwise it runs its PyTorch reference.

    float64, for which there is no tensor core, goes to the reference unless ``float64`` says the kernel takes it. So do
    tensors that want a gradient: PyTorch differentiates the reference. An op with a gradient of its own asks with
    gradients off, and launches its kernel.

    Raises:
        RuntimeError: ``x`` is on another GPU than the current one, where kernels would be launched.
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


def wants_gradient(*arguments) -> bool:
    """Whether PyTorch would have to differentiate what is made of the tensors among ``arguments``."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments)


def check_current_device(x: torch.Tensor) -> None:
    """Refuse ``x`` of another GPU than the current one.

    Raises:
        RuntimeError: it is.
    """
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        raise RuntimeError(
            f"the tensors are on {x.device}, but kernels are launched on cuda:{torch.cuda.current_device()}; call "
            f"torch.cuda.set_device({x.device.index}) first"
        )


def mismatch(op: str, name: str, tensor: torch.Tensor | None, shape, dtype) -> ValueError:
    """The error of an op for an argument that should have this shape and dtype."""
    got = None if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
    allowed = str(tuple(shape)).replace("'", "")  # a dimension of any size is a letter
    return ValueError(f"{op}: {name} must be {allowed} {dtype}, got {got}")


def check_devices(op: str, **tensors: torch.Tensor | None) -> None:
    """Refuse, in the name of ``op``, tensors that are not where the first of them is.

    The extension's kernels are given addresses, which do not tell of what memory.

    Raises:
        ValueError: the name and device of the first one elsewhere.
    """
    (first, x), *others = tensors.items()
    for name, tensor in others:
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} on {x.device}; move {name} there")

"""Which implementation the ops run, and which ops there are."""

import os

import torch

from bagel_rt.kernels import configs
from bagel_rt.kernels.triton_language import INTERPRETED, triton

OPS = {
    "rms_norm": True,
    "add_rms_norm": True,
    "linear": True,
    "qk_norm_rope": True,
    "attention": True,
    "attention_lse": True,
    "attention_backward": True,
    "decode_attention": True,
    "guided_step": True,
    "sample": False,
}
"""Every op of the ``bagel_rt`` namespace of ``torch.ops`` -> whether it has a Triton kernel."""

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

    ``auto`` runs Triton kernels on GPUs from sm_80 on and PyTorch references elsewhere. ``reference`` forces references
    on every device, which tells a kernel bug from a model bug. ``triton`` insists on kernels: on the CPU they run in
    Triton's interpreter, thousands of times slower, if the process was started with ``TRITON_INTERPRET=1``.

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
    tensors that want a gradient: PyTorch differentiates the reference.

    Raises:
        RuntimeError: ``x`` is on another GPU than the current one, where kernels would be launched.
    """
    if not (x.is_cuda or INTERPRETED) or triton is None or (x.dtype == torch.float64 and not float64):
        return False
    choice = backend()
    if choice == "reference" or (choice == "auto" and not (x.is_cuda and configs.supports(x.device))):
        return False
    if torch.is_grad_enabled() and any(given is not None and given.requires_grad for given in (x, *others)):
        return False
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        raise RuntimeError(
            f"the tensors are on {x.device}, but kernels are launched on cuda:{torch.cuda.current_device()}; call "
            f"torch.cuda.set_device({x.device.index}) first"
        )
    return True


def implementation(op: str, device: torch.device) -> str:
    """Name what runs ``op`` on ``device`` under the choice in force: "triton" or "reference"."""
    return "triton" if OPS[op] and runs_kernel(torch.empty(0, device=device)) else "reference"

"""Register ops with PyTorch, and say which implementation runs each."""

import functools
from collections.abc import Callable

import torch
from torch import is_grad_enabled
from torch.compiler import is_compiling

from .backend import runs_kernel, wants_gradient
from .extension import runs_extension

OPS: dict[str, str] = {}
"""Every op of the ``bagel_rt`` namespace of ``torch.ops`` -> what its kernels are written in, the first choice first.

"triton"; "cuda", in the extension; or "cuda, triton": a Triton kernel serves where the extension has none.
"""


def op(
    name: str, schema: str, *, kernel: str, fake: Callable, gradient: tuple[Callable, Callable] | None = None
) -> Callable[[Callable], Callable]:
    """Register the decorated launcher as ``torch.ops.bagel_rt.NAME``.

    The decorated function calls the launcher itself unless it is compiled, or differentiated by ``gradient``: then it
    calls the registered op. The dispatcher takes longer than everything else that an op does on the host.

    Args:
        name: of the op.
        schema: of its arguments and results, as ``torch.library.define`` takes it. Arguments are passed by position.
        kernel: what its kernels are written in, as in ``OPS``.
        fake: returns empty outputs with the shapes, dtypes and strides of the real ones.
        gradient: (backward, setup_context), as ``torch.library.register_autograd`` takes them. Without it PyTorch
            differentiates what the launcher calls, which must be the reference: see ``runs_kernel``.
    """

    def register(launch: Callable) -> Callable:
        qualified = f"bagel_rt::{name}"
        torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, "default", launch)
        torch.library.register_fake(qualified, fake)
        if gradient is not None:
            backward, setup_context = gradient
            torch.library.register_autograd(qualified, backward, setup_context=setup_context)
        registered, differentiable = getattr(torch.ops.bagel_rt, name).default, gradient is not None
        OPS[name] = kernel

        @functools.wraps(launch)
        def run(*arguments):
            if is_compiling() or (differentiable and is_grad_enabled() and wants_gradient(*arguments)):
                return registered(*arguments)
            return launch(*arguments)

        return run

    return register


def implementation(name: str, device: torch.device) -> str:
    """Name what runs an op on ``device`` under the backend in force: "cuda", "triton" or "reference".

    The reference of a "cuda" op may be composed of other ops, which have Triton kernels.
    """
    x, kernel = torch.empty(0, device=device), OPS[name]
    if "cuda" in kernel and runs_extension(x):
        return "cuda"
    return "triton" if "triton" in kernel and runs_kernel(x) else "reference"

"""Register ops with PyTorch, and report which implementation of an op runs."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import is_grad_enabled
from torch.compiler import is_compiling

from .backend import runs_kernel, wants_gradient
from .extension import runs_extension

P = ParamSpec("P")
R = TypeVar("R")

Gradient = tuple[Callable[..., Any], Callable[..., None]]
"""(backward, setup_context) for ``torch.library.register_autograd``."""

OPS: dict[str, str] = {}
"""Name of an op in ``torch.ops.bagel_rt`` -> the languages of its kernels, in order of preference.

"triton": a Triton kernel; "cuda": a kernel of the extension; "cuda, triton": both, with the Triton kernel as fallback.
"""


def op(
    name: str, schema: str, *, kernel: str, fake: Callable[P, R], gradient: Gradient | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated launcher as ``torch.ops.bagel_rt.NAME``.

    The returned function calls the registered op only under ``torch.compile`` or to apply ``gradient``. Otherwise it
    calls the launcher directly, because PyTorch's dispatcher costs more host time than the rest of the op.

    Args:
        name: name of the op.
        schema: schema for ``torch.library.define``. Arguments are passed by position.
        kernel: languages of its kernels, as in ``OPS``.
        fake: has the launcher's signature; returns empty outputs with the shapes, dtypes and strides of the real ones.
        gradient: without it, PyTorch differentiates through the launcher, which must then run the reference:
            ``runs_kernel`` is False for tensors that require a gradient.
    """

    def register(launch: Callable[P, R]) -> Callable[P, R]:
        qualified = f"bagel_rt::{name}"
        torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, "default", launch)
        torch.library.register_fake(qualified, fake)
        if gradient is not None:
            backward, setup_context = gradient
            torch.library.register_autograd(qualified, backward, setup_context=setup_context)
        registered: Callable[..., R] = getattr(torch.ops.bagel_rt, name).default
        launcher: Callable[..., R] = launch
        differentiable = gradient is not None
        OPS[name] = kernel

        @functools.wraps(launch)
        def run(*arguments: Any) -> R:
            if is_compiling() or (differentiable and is_grad_enabled() and wants_gradient(*arguments)):
                return registered(*arguments)
            return launcher(*arguments)

        return cast(Callable[P, R], run)  # ParamSpec cannot say that arguments are passed by position

    return register


def implementation(name: str, device: torch.device) -> str:
    """The implementation of an op on ``device`` under the active backend: "cuda", "triton" or "reference".

    The reference of a "cuda" op may call other ops, which have Triton kernels.
    """
    x, kernel = torch.empty(0, device=device), OPS[name]
    if "cuda" in kernel and runs_extension(x):
        return "cuda"
    return "triton" if "triton" in kernel and runs_kernel(x) else "reference"

"""Triton imports, with stand-ins for platforms without it (macOS, Windows): kernels can be defined, not run.

Op files import ``jit``, ``tl``, ``triton``, ``TensorDescriptor`` and :func:`dot` from here. Triton has no type
annotations: type checkers treat it as ``Any``, except for :func:`jit`, which is declared below.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

import torch

__all__ = ["INTERPRETED", "TensorDescriptor", "descriptor_memory", "dot", "jit", "tl", "triton"]

P = ParamSpec("P")
R = TypeVar("R")

if TYPE_CHECKING:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    INTERPRETED: bool

    class Kernel(Generic[P, R]):
        """A function in Triton's language: called by other kernels, or launched over a grid by the host.

        Launches enable FMA fusion, with which the kernels were tested. It is Triton's default only up to version 3.9.
        """

        def __call__(self, *arguments: P.args, **keywords: P.kwargs) -> R: ...
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]: ...

    @overload
    def jit(function: Callable[P, R], /) -> Kernel[P, R]: ...
    @overload
    def jit(
        *, do_not_specialize: list[str] = ..., do_not_specialize_on_alignment: list[str] = ...
    ) -> Callable[[Callable[P, R]], Kernel[P, R]]: ...
    def jit(*arguments: Any, **options: Any) -> Any: ...

else:
    try:
        import triton
        import triton.language as tl
        from triton.tools.tensor_descriptor import TensorDescriptor

        INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1, read when the kernels are defined

        class Kernel(triton.JITFunction):
            def __getitem__(self, grid):
                return partial(self.run, grid=grid, warmup=False, enable_fp_fusion=True)

        def jit(function=None, **options):
            if function is None:
                return partial(jit, **options)
            return (triton.jit if INTERPRETED else Kernel)(function, **options)

    except ImportError as error:
        if error.name != "triton":
            raise
        triton = TensorDescriptor = None
        INTERPRETED = False

        class tl:  # the attributes that annotations and decorators use at import
            constexpr = staticmethod(lambda value: value)
            tensor, tuple = torch.Tensor, tuple

        def jit(function=None, **options):
            return function if function is not None else jit


_WIDEN = tl.constexpr(INTERPRETED)


@jit
def dot(a: tl.tensor, b: tl.tensor, accumulator: tl.tensor) -> tl.tensor:
    """``accumulator + a @ b``, in the accumulator's dtype; float32 inputs are not rounded to TF32."""
    if _WIDEN:  # the interpreter treats bfloat16 operands as integers
        a, b = a.to(accumulator.dtype), b.to(accumulator.dtype)
    return tl.dot(a, b, accumulator, input_precision="ieee", out_dtype=accumulator.dtype)


def descriptor_memory(device: torch.device) -> None:
    """Provide global memory for TMA descriptors created in a kernel. Call before each launch of such a kernel."""

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        # Under capture this comes from the graph's pool, which outlives replays.
        return torch.empty(size, dtype=torch.uint8, device=device)

    triton.set_allocator(allocate)

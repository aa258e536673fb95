"""Triton imports, with stubs for platforms without it (macOS, Windows): kernels can be defined there, not run.

Op files import ``jit``, ``tl``, ``triton``, ``TensorDescriptor`` and :func:`dot` from here.
"""

import torch

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.tools.tensor_descriptor import TensorDescriptor

    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1, read when the kernels are defined
except ImportError as error:
    if error.name != "triton":
        raise
    triton = TensorDescriptor = None
    INTERPRETED = False

    class tl:  # the attributes that annotations and decorators use at import
        constexpr = staticmethod(lambda value: value)

    def jit(function=None, **options):
        return function if function is not None else jit


_WIDEN = tl.constexpr(INTERPRETED)


@jit
def dot(a, b, accumulator):
    """``accumulator + a @ b``, in the accumulator's dtype; float32 inputs are not rounded to TF32."""
    if _WIDEN:  # the interpreter treats bfloat16 operands as integers
        a, b = a.to(accumulator.dtype), b.to(accumulator.dtype)
    return tl.dot(a, b, accumulator, input_precision="ieee", out_dtype=accumulator.dtype)


def descriptor_memory(device):
    """Provide global memory for TMA descriptors created in a kernel. Call before each launch of such a kernel."""

    def allocate(size, alignment, stream):
        return torch.empty(
            size, dtype=torch.uint8, device=device
        )  # under capture it comes from the graph's pool, which outlives replays

    triton.set_allocator(allocate)

"""Triton and its language; where there is none (macOS, Windows), stand-ins with which kernels can be defined, not run.

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

    class tl:  # what annotations and decorators need when a module is read
        constexpr = staticmethod(lambda value: value)

    def jit(function=None, **options):
        return function if function is not None else jit


_WIDEN = tl.constexpr(INTERPRETED)


@jit
def dot(a, b, accumulator):
    """``accumulator + a @ b``, in the accumulator's dtype; float32 inputs are not rounded to TF32."""
    if _WIDEN:  # the interpreter multiplies bfloat16 as integers
        a, b = a.to(accumulator.dtype), b.to(accumulator.dtype)
    return tl.dot(a, b, accumulator, input_precision="ieee", out_dtype=accumulator.dtype)


def descriptor_memory(device):
    """Let kernels that make TMA descriptors themselves store them; to be called before each launch of one."""

    def allocate(size, alignment, stream):
        return torch.empty(size, dtype=torch.uint8, device=device)  # a CUDA graph's own pool keeps what it holds

    triton.set_allocator(allocate)

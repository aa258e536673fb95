"""Peers of the decode ops: PyTorch, this package's Triton kernels, the official sampler.

See :mod:`benchmarks.peers`. Decoding uses one expert, so there is no routing and the official layers equal PyTorch's.
"""

import torch
import torch.nn.functional as F

from bagel_rt.kernels.backend import runs_kernel
from bagel_rt.kernels.decode_linear import decode_linear_reference
from bagel_rt.kernels.decode_qkv import decode_qkv_reference
from bagel_rt.kernels.norm import rms_norm_reference
from bagel_rt.kernels.qk_norm_rope import qk_norm_rope_reference
from bagel_rt.kernels.sample import sample_reference
from benchmarks.peers import PreparedCall, Unsupported, as_tuple


def torch_linear(x, w, *, norm=None, eps=1e-6, residual=None, swiglu=False, wrap=lambda f: f):
    """``F.rms_norm``, cuBLAS and the epilogue; SwiGLU takes both contiguous halves of one GEMM."""
    if swiglu:
        w = torch.cat([w[0::2], w[1::2]])

    def layer(x, residual):
        if norm is not None:
            x, _ = rms_norm_reference(x, None, norm, norm, 0, eps)
        y = F.linear(x, w)
        if swiglu:
            gate, up = y.chunk(2, -1)
            return F.silu(gate) * up
        return y if residual is None else residual + y

    layer = wrap(layer)
    return PreparedCall(lambda: layer(x, residual), as_tuple)


def triton_linear(x, w, *, norm=None, eps=1e-6, residual=None, swiglu=False):
    """This package's fallback without the extension: RMSNorm and the GEMM, one Triton kernel each."""
    _check_triton(x)
    return PreparedCall(lambda: decode_linear_reference(x, w, norm, eps, residual, swiglu), as_tuple)


def cublas_gemm(x, w, *, norm=None, eps=1e-6, residual=None, swiglu=False):
    """The cuBLAS GEMM alone, without norm or epilogue."""
    return PreparedCall(lambda: F.linear(x, w), None)


def torch_qkv(x, norm, w, bias, qk_norm, cos, sin, slots, k_cache, v_cache, eps, wrap=lambda f: f):
    """``F.rms_norm``, cuBLAS, then a dozen operators for QK-norm, RoPE and the cache writes."""
    caches = k_cache.clone(), v_cache.clone()

    def layer(x, k_cache, v_cache):
        h, _ = rms_norm_reference(x, None, norm, norm, 0, eps)
        qkv = F.linear(h, w, bias)
        return qk_norm_rope_reference(qkv, qk_norm, qk_norm, cos, sin, slots, k_cache, v_cache, 0, eps)

    layer = wrap(layer)
    return PreparedCall(lambda: layer(x, *caches), lambda q: (q, *caches))


def triton_qkv(x, norm, w, bias, qk_norm, cos, sin, slots, k_cache, v_cache, eps):
    """This package's fallback without the extension: one Triton kernel each for RMSNorm, the GEMM and QK-norm/RoPE."""
    _check_triton(x)
    caches = k_cache.clone(), v_cache.clone()
    inputs = (x, norm, w, bias, qk_norm, cos, sin, slots, *caches, eps)
    return PreparedCall(lambda: decode_qkv_reference(*inputs), lambda q: (q, *caches))


def _check_triton(x) -> None:
    if not runs_kernel(x):
        raise Unsupported("Triton kernels do not run on this device")


def torch_sample(logits, settings=None, seed=None, step=None, wrap=lambda f: f):
    """The op's reference, which sorts the logits for top-k and top-p."""
    draw = wrap(sample_reference)
    return PreparedCall(lambda: draw(logits, settings, seed, step), as_tuple)


def official_sample(logits, settings=None, seed=None, step=None):
    """The official code's softmax and ``torch.multinomial``, without top-k or top-p. Tokens are not comparable."""
    if settings is None:
        raise Unsupported("uses torch.argmax for greedy decoding")
    temperature = settings[:, :1].clone()
    return PreparedCall(lambda: torch.multinomial((logits / temperature).softmax(-1), 1), None)

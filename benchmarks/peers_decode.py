"""What else computes the ops of the one-token path: torch, this package's Triton kernels, the official sampler.

As in :mod:`benchmarks.peers`. There is one expert, so nothing has to be routed: the official layers are those of torch.
"""

import torch
import torch.nn.functional as F

from bagel_rt.kernels.backend import runs_kernel
from bagel_rt.kernels.decode_linear import decode_linear_reference
from bagel_rt.kernels.decode_qkv import decode_qkv_reference
from bagel_rt.kernels.norm import rms_norm_reference
from bagel_rt.kernels.qk_norm_rope import qk_norm_rope_reference
from bagel_rt.kernels.sample import sample_reference
from benchmarks.peers import Contender, Unsuitable, one


def torch_linear(x, w, *, norm=None, eps=1e-6, residual=None, swiglu=False, wrap=lambda f: f):
    """``F.rms_norm``, cuBLAS and the epilogue; of SwiGLU two halves of one product, each contiguous."""
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
    return Contender(lambda: layer(x, residual), one)


def triton_linear(x, w, *, norm=None, eps=1e-6, residual=None, swiglu=False):
    """What runs where the extension is not built: RMSNorm and the product, one kernel each."""
    _check_triton(x)
    return Contender(lambda: decode_linear_reference(x, w, norm, eps, residual, swiglu), one)


def one_product(x, w, *, norm=None, eps=1e-6, residual=None, swiglu=False):
    """What cuBLAS alone would take."""
    return Contender(lambda: F.linear(x, w), None)


def torch_qkv(x, norm, w, bias, qk_norm, cos, sin, slots, k_cache, v_cache, eps, wrap=lambda f: f):
    """``F.rms_norm``, cuBLAS, then a dozen operators that normalise, rotate and write heads into the caches."""
    caches = k_cache.clone(), v_cache.clone()

    def layer(x, k_cache, v_cache):
        h, _ = rms_norm_reference(x, None, norm, norm, 0, eps)
        qkv = F.linear(h, w, bias)
        return qk_norm_rope_reference(qkv, qk_norm, qk_norm, cos, sin, slots, k_cache, v_cache, 0, eps)

    layer = wrap(layer)
    return Contender(lambda: layer(x, *caches), lambda q: (q, *caches))


def triton_qkv(x, norm, w, bias, qk_norm, cos, sin, slots, k_cache, v_cache, eps):
    """What runs where the extension is not built: RMSNorm, the product, and what makes heads of it, a kernel each."""
    _check_triton(x)
    caches = k_cache.clone(), v_cache.clone()
    inputs = (x, norm, w, bias, qk_norm, cos, sin, slots, *caches, eps)
    return Contender(lambda: decode_qkv_reference(*inputs), lambda q: (q, *caches))


def _check_triton(x) -> None:
    if not runs_kernel(x):
        raise Unsuitable("no Triton kernels run here")


def torch_sample(logits, settings=None, seed=None, step=None, wrap=lambda f: f):
    """The op's reference, which sorts the logits where there are settings."""
    draw = wrap(sample_reference)
    return Contender(lambda: draw(logits, settings, seed, step), one)


def official_sample(logits, settings=None, seed=None, step=None):
    """The official code's softmax and ``torch.multinomial``: noise of its own, no top-k, no top-p."""
    if settings is None:
        raise Unsuitable("takes torch.argmax for the most likely token")
    temperature = settings[:, :1].clone()
    return Contender(lambda: torch.multinomial((logits / temperature).softmax(-1), 1), None)

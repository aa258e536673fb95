"""Draw one token per row of logits: ``argmax(logits / temperature + g)``, g standard Gumbel noise.

The argmax of Gumbel-perturbed logits is distributed as softmax(logits / temperature) (Gumbel 1954), so no softmax, sum
or scan is needed. Temperature 0 means plain argmax. The noise of a token is a pure function of (seed, step, column),
whatever else is in the batch, by way of Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405):

    word = Philox4x32-10(key = (seed mod 2^32, seed div 2^32), counter = (column, step mod 2^32, 0, 0))[0]
    u    = ((word >> 9) + 0.5) * 2^-23        in (0, 1), exact in float32
    g    = -log(-log(u))                      in float32 (float64 for float64 logits)

Words and u are the same on every device; its logarithm may differ in the last bit.

Traffic: reads the logits once; memory-bound.
"""

import math

import torch
from torch.compiler import is_compiling


def sample_reference(logits, temperature, seed, step):
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`sample`."""
    if temperature == 0:
        return logits.argmax(-1)
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    column = torch.arange(logits.shape[1], device=logits.device)
    seed, step = seed.unsqueeze(1), step.unsqueeze(1)
    word = philox4x32((column, step, 0, 0), (seed, seed >> 32))[0]
    u = ((word >> 9).to(logits.dtype) + 0.5) * 2.0**-23
    return (logits / temperature - u.log().neg().log()).argmax(-1)


def philox4x32(counter, key):
    """Philox4x32-10: counter (c0, c1, c2, c3) and key (k0, k1) -> four words, as int64 tensors below 2^32.

    Arguments are int64 tensors or integers; of c1, c3 and the key the low 32 bits count, c0 and c2 are below 2^32.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps, but holds all 64 bits of the unsigned product
        c0, c1, c2, c3 = (p1 >> 32 ^ c1 ^ k0) & _LOW, p1, (p0 >> 32 ^ c3 ^ k1) & _LOW, p0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1 & _LOW, c2, c3 & _LOW


_LOW = 0xFFFFFFFF


torch.library.define(
    "bagel_rt::sample",
    "(Tensor logits, float temperature, Tensor? seed, Tensor? step) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _launch(logits, temperature, seed, step):
    return sample_reference(logits, temperature, seed, step)


torch.library.impl("bagel_rt::sample", "default", _launch)


@torch.library.register_fake("bagel_rt::sample")
def _fake(logits, temperature, seed, step):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


_sample = torch.ops.bagel_rt.sample.default


def sample(logits, temperature, seed=None, step=None):
    """Draw one token per row from softmax(logits / temperature).

    Args:
        logits: [B, V], floating point, V >= 1.
        temperature: 0 takes the largest logit (the first of equals); otherwise positive.
        seed: [B] int64, one stream per row; may be None at temperature 0.
        step: [B] int64, the position in the stream, modulo 2^32: the same (seed, step) draws the same noise.

    Returns:
        [B] int64 token ids.

    Raises:
        ValueError: a negative or infinite temperature, or shapes or dtypes disagree; the message names the offender.
    """
    B, V = logits.shape
    if V == 0:
        raise ValueError("sample: logits have no columns; there is no token to draw")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"sample: temperature={temperature}; use 0 for the most likely token or a positive number")
    if temperature > 0:
        for name, tensor in (("seed", seed), ("step", step)):
            if tensor is None or tensor.shape != (B,) or tensor.dtype != torch.int64:
                given = None if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
                raise ValueError(f"sample: {name} is {given}, expected {(B,)} torch.int64")
    run = _sample if is_compiling() else _launch
    return run(logits, temperature, seed, step)

"""Sample one token per row of logits: ``argmax(logits / temperature + g)`` over the kept tokens, g Gumbel noise.

The argmax of Gumbel-perturbed logits is distributed as softmax(logits / temperature) (Gumbel 1954), so no softmax has
to be stored or scanned. The noise of a token depends only on (seed, step, column), not on the batch, through
Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405):

    word = Philox4x32-10(key = (seed mod 2^32, seed div 2^32), counter = (column, step mod 2^32, 0, 0))[0]
    u    = ((word >> 9) + 0.5) * 2^-23        in (0, 1), exact in float32
    g    = -log(-log(u))                      in float32 (float64 for float64 logits)

Words and u are the same on every device; the logarithm may differ in the last bit.

Kept tokens are defined by thresholds on the scaled logits x = logits / temperature, so tied tokens are kept or dropped
together (top-k: Fan et al. 2018, arXiv:1805.04833; top-p: Holtzman et al. 2020, arXiv:1904.09751):

    top-k    x >= the k-th largest
    top-p    x >= tau, the largest value for which the tokens with x >= tau have at least the share top_p of the
             probability of the tokens kept by top-k

A row without a finite largest logit has no distribution: with a NaN, an inf, or nothing but -inf the result is
:data:`NOT_FINITE`. The host finds it where it reads the tokens, so the check costs no synchronization of its own.

The kernel does not sort. It first samples from all tokens, with up to 32 blocks per row. If the sampled token is a kept
one, it is also the argmax over the kept tokens, and done. The last block of a row to finish checks this in one more
pass: a token is kept if fewer than k tokens rank above it and their probability is below top_p. If it is not kept, the
argmax among the tokens that rank above it is tried next, and so on. Probabilities are summed as integers, so the result
does not depend on the order of the sum.

Traffic: reads the logits once, with top-k or top-p a few times; memory-bound.
"""

from typing import Any

import torch
from torch import Tensor

from . import extension
from .backend import check_devices, mismatch
from .registry import op

NOT_FINITE = -1
"""The result for a row whose largest logit is not finite."""


def sample_reference(
    logits: Tensor, settings: Tensor | None, seed: Tensor | None, step: Tensor | None, noise: Tensor | None = None
) -> Tensor:
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`sample`."""
    largest, token = logits.max(-1)
    if settings is not None and seed is not None and step is not None:
        token = scores_reference(logits, settings, seed, step, noise).argmax(-1)
    return token.where(largest.isfinite(), NOT_FINITE)


def scores_reference(
    logits: Tensor, settings: Tensor, seed: Tensor, step: Tensor, noise: Tensor | None = None
) -> Tensor:
    """Scores [B, V] whose argmax is the sampled token: scaled logits plus noise, -inf for dropped tokens."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    V = logits.shape[1]
    temperature, top_k, top_p = settings.to(logits.dtype).split(1, 1)
    samples = temperature > 0
    scaled = logits / temperature.where(samples, 1)

    ordered = scaled.sort(-1, descending=True).values
    smallest_k = ordered.gather(1, top_k.where((top_k >= 1) & (top_k < V), V).long() - 1)
    mass = ordered.masked_fill(ordered < smallest_k, -torch.inf).softmax(-1, dtype=torch.float64).cumsum(-1)
    before_tau = (mass < top_p).sum(-1, keepdim=True).where(top_p < 1, V)
    tau = ordered.gather(1, before_tau.clamp(max=V - 1))
    dropped = scaled < torch.maximum(smallest_k, tau)

    if noise is None:
        column = torch.arange(V, device=logits.device)
        seed, step = seed.unsqueeze(1), step.unsqueeze(1)
        word = philox4x32((column, step, 0, 0), (seed, seed >> 32))[0]
        u = ((word >> 9).to(logits.dtype) + 0.5) * 2.0**-23
        noise = u.log().neg()
    return (scaled - noise.log()).where(samples, scaled).masked_fill(dropped, -torch.inf)


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10: counter (c0, c1, c2, c3) and key (k0, k1) -> four words, as int64 tensors below 2^32.

    Arguments are int64 tensors or integers. c0 and c2 must be below 2^32; c1, c3 and the key are taken modulo 2^32.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 may overflow, but keeps all 64 bits
        c0, c1, c2, c3 = (p1 >> 32 ^ c1 ^ k0) & _LOW, p1, (p0 >> 32 ^ c3 ^ k1) & _LOW, p0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1 & _LOW, c2, c3 & _LOW


_LOW = 0xFFFFFFFF

MAX_COLUMNS = 2**21
"""Maximum vocabulary of the kernel: its sums of 42-bit probabilities must fit in 63 bits."""

_MAX_WARPS = 512  # per row; each stores the token it sampled, 8 bytes, and its largest logit, 4 bytes


def _run_extension(logits: Tensor, settings: Tensor | None, seed: Tensor | None, step: Tensor | None) -> Tensor:
    B, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    token = torch.empty(B, dtype=torch.int64, device=logits.device)
    if B:
        workspace = torch.empty(B * _MAX_WARPS * 12, dtype=torch.uint8, device=logits.device)
        settings, seed, step = (None if t is None else t.contiguous() for t in (settings, seed, step))
        extension.EXTENSION.sample(
            extension.EXTENSION.LogitsArgs(logits.dtype == torch.bfloat16, B, V, logits.data_ptr(), logits.stride(0)),
            *(0 if t is None else t.data_ptr() for t in (settings, seed, step, token, workspace)),
            extension.counters(logits, B).data_ptr(), extension.stream(logits),
        )  # fmt: skip
    return token


def _fake(
    logits: Tensor, settings: Tensor | None, seed: Tensor | None, step: Tensor | None, noise: Tensor | None
) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@op(
    "sample",
    "(Tensor logits, Tensor? settings, Tensor? seed, Tensor? step, Tensor? noise) -> Tensor",
    kernel="cuda",
    fake=_fake,
)
def _sample(
    logits: Tensor, settings: Tensor | None, seed: Tensor | None, step: Tensor | None, noise: Tensor | None
) -> Tensor:
    B, V = logits.shape
    if noise is None and extension.runs_extension(logits) and B <= extension.COUNTERS and V <= MAX_COLUMNS:
        return _run_extension(logits, settings, seed, step)
    return sample_reference(logits, settings, seed, step, noise)


def sample(
    logits: Tensor, settings: Tensor | None = None, seed: Tensor | None = None, step: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sample one token per row from softmax(logits / temperature), or take the most likely one.

    Args:
        logits: [B, V], floating point, V >= 1.
        settings: [B, 3] float32, (temperature, top_k, top_p) of each row, on the device of ``logits``. None takes the
            largest logit of every row. Values are not checked, since that would synchronize the host: a temperature of
            0 or less takes the largest logit (the first of ties); a top_k below 1 or of at least V keeps all tokens,
            and fractions are truncated; a top_p of 1 or more keeps all tokens, one of 0 or less the largest only.
        seed: [B] int64, one random stream per row; may be None without settings.
        step: [B] int64, position in the stream, modulo 2^32. The same (seed, step) gives the same noise.
        noise: [B, V] float32, exponential samples q to use instead of generated ones, for example recorded ones: the
            token is argmax p / q over the kept tokens. Runs the PyTorch reference.

    Returns:
        [B] int64 token ids; ``NOT_FINITE`` for a row whose largest logit is NaN, inf or -inf.

    Raises:
        ValueError: V is 0, or a shape, dtype or device does not match. The message names the argument.
    """
    B, V = logits.shape
    if V == 0:
        raise ValueError(f"sample: logits must have at least one column, got {tuple(logits.shape)}.")
    if settings is not None:
        for name, tensor, shape, dtype in (
            ("settings", settings, (B, 3), torch.float32),
            ("seed", seed, (B,), torch.int64),
            ("step", step, (B,), torch.int64),
        ):
            if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
                raise mismatch("sample", name, tensor, shape, dtype)
        if noise is not None and (noise.shape != logits.shape or noise.dtype != torch.float32):
            raise mismatch("sample", "noise", noise, (B, V), torch.float32)
        check_devices("sample", logits=logits, settings=settings, seed=seed, step=step, noise=noise)
    return _sample(logits, settings, seed, step, noise)

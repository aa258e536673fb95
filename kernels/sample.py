"""Draw one token per row of logits: ``argmax(logits / temperature + g)`` over the tokens kept, g standard Gumbel noise.

The argmax of Gumbel-perturbed logits is distributed as softmax(logits / temperature) (Gumbel 1954), so no softmax has
to be written or scanned. The noise of a token is a pure function of (seed, step, column), whatever else is in the
batch, by way of Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405):

    word = Philox4x32-10(key = (seed mod 2^32, seed div 2^32), counter = (column, step mod 2^32, 0, 0))[0]
    u    = ((word >> 9) + 0.5) * 2^-23        in (0, 1), exact in float32
    g    = -log(-log(u))                      in float32 (float64 for float64 logits)

Words and u are the same on every device; the logarithm may differ in the last bit.

Which tokens are kept is a matter of thresholds on the scaled logits x = logits / temperature, so that equals are kept
or left together (top-k: Fan et al. 2018, arXiv:1805.04833; top-p: Holtzman et al. 2020, arXiv:1904.09751):

    top-k    x >= the k-th largest
    top-p    x >= tau, the largest value for which the tokens with x >= tau have at least the share top_p of the
             probability of those that top-k keeps

Logits that are NaN win, as in torch.argmax.

The kernel never sorts. It draws from all tokens first, with up to 32 blocks a row. If that token is one of those kept,
it is also the one drawn among them. It is kept if the tokens above it are fewer than k and weigh less than top_p, which
takes one more look at the row, by the last block to finish; if not, the best of the tokens above it is tried next.
Weights are summed as integers, so that no order of the sum shows.

Traffic: reads the logits once, with top-k or top-p a few times; memory-bound.
"""

import torch

from . import extension
from .backend import check_devices, mismatch
from .registry import op


def sample_reference(logits, settings, seed, step, noise=None):
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`sample`."""
    if settings is None:
        return logits.argmax(-1)
    return scores_reference(logits, settings, seed, step, noise).argmax(-1)


def scores_reference(logits, settings, seed, step, noise=None):
    """What the token drawn has most of: scaled logits plus noise, -inf for tokens not kept; [B, V]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    V = logits.shape[1]
    temperature, top_k, top_p = settings.to(logits.dtype).split(1, 1)
    draws = temperature > 0
    scaled = logits / temperature.where(draws, 1)

    ordered = scaled.sort(-1, descending=True).values
    smallest_k = ordered.gather(1, top_k.where((top_k >= 1) & (top_k < V), V).long() - 1)
    mass = ordered.masked_fill(ordered < smallest_k, -torch.inf).softmax(-1, dtype=torch.float64).cumsum(-1)
    before_tau = (mass < top_p).sum(-1, keepdim=True).where(top_p < 1, V)
    tau = ordered.gather(1, before_tau.clamp(max=V - 1))
    left = scaled < torch.maximum(smallest_k, tau)  # nan is not

    if noise is None:
        column = torch.arange(V, device=logits.device)
        seed, step = seed.unsqueeze(1), step.unsqueeze(1)
        word = philox4x32((column, step, 0, 0), (seed, seed >> 32))[0]
        u = ((word >> 9).to(logits.dtype) + 0.5) * 2.0**-23
        noise = u.log().neg()
    return (scaled - noise.log()).where(draws, scaled).masked_fill(left, -torch.inf)


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

MAX_COLUMNS = 2**21
"""The kernel's weights, 42 bits each, sum up to 63 bits."""

_WARPS = 512  # of a row, at most; each leaves what it drew, 8 bytes, and its largest logit, 4


def _run_extension(logits, settings, seed, step):
    B, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    token = torch.empty(B, dtype=torch.int64, device=logits.device)
    if B:
        workspace = torch.empty(B * _WARPS * 12, dtype=torch.uint8, device=logits.device)
        settings, seed, step = (None if given is None else given.contiguous() for given in (settings, seed, step))
        extension.EXTENSION.sample(
            extension.EXTENSION.Logits(logits.dtype == torch.bfloat16, B, V, logits.data_ptr(), logits.stride(0)),
            *(0 if given is None else given.data_ptr() for given in (settings, seed, step, token, workspace)),
            extension.counters(logits, B).data_ptr(), extension.stream(logits),
        )  # fmt: skip
    return token


def _fake(logits, settings, seed, step, noise):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@op(
    "sample",
    "(Tensor logits, Tensor? settings, Tensor? seed, Tensor? step, Tensor? noise) -> Tensor",
    kernel="cuda",
    fake=_fake,
)
def _sample(logits, settings, seed, step, noise):
    B, V = logits.shape
    if noise is None and extension.runs_extension(logits) and B <= extension.COUNTERS and V <= MAX_COLUMNS:
        return _run_extension(logits, settings, seed, step)
    return sample_reference(logits, settings, seed, step, noise)


def sample(logits, settings=None, seed=None, step=None, noise=None):
    """Draw one token per row from softmax(logits / temperature), or take the most likely one.

    Args:
        logits: [B, V], floating point, V >= 1.
        settings: [B, 3] float32, (temperature, top_k, top_p) of each row, on the device of ``logits``: nothing waits
            for their values, so none is refused. A temperature of 0 or less takes the largest logit (the first of
            equals); a top_k below 1 or from V on keeps all tokens, fractions are cut off; so does a top_p of 1 or
            more; one of 0 or less keeps the largest. None takes the largest logit of every row.
        seed: [B] int64, one stream per row; may be None without settings.
        step: [B] int64, the position in the stream, modulo 2^32: the same (seed, step) draws the same noise.
        noise: [B, V] float32, exponential draws q in the place of the sampler's own, such as recorded ones: the token
            is argmax p / q over the tokens kept. Runs as PyTorch operators.

    Returns:
        [B] int64 token ids.

    Raises:
        ValueError: no columns, or shapes, dtypes or devices disagree; the message names the offender.
    """
    B, V = logits.shape
    if V == 0:
        raise ValueError("sample: logits have no columns; there is no token to draw")
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

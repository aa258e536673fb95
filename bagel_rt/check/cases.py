"""Cases of ``bagel-rt check``: calls of every op with a kernel, each with a float64 reference.

Edge cases come first: one row, an empty expert, sizes that are no multiple of a tile, keys that only some rows of a
block attend to. Then BAGEL's own sizes, which run only on a GPU: the interpreter would take minutes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bagel_rt.check.case import (
    ALL,
    BFLOAT16,
    EPS,
    HALF,
    QUERY_STD,
    SWIGLU,
    CallAndReference,
    Case,
    Outputs,
    Values,
    call_and_reference,
    to_float64,
)
from bagel_rt.check.cases_decode import DECODE_CASES
from bagel_rt.kernels import (
    attention,
    attention_dense_reference,
    cfg_euler_step,
    group_norm,
    group_norm_moments,
    linear,
    qk_norm_rope,
    rms_norm,
)
from bagel_rt.kernels.group_norm import group_norm_moments_reference, group_norm_reference
from bagel_rt.kernels.guidance import RENORMS, cfg_euler_step_reference
from bagel_rt.kernels.linear import linear_reference
from bagel_rt.kernels.norm import rms_norm_reference
from bagel_rt.kernels.qk_norm_rope import qk_norm_rope_reference
from bagel_rt.runtime.plan import Segment, build_plan, visibility


def _rms_norm(values: Values, T: int, G: int, H: int, adds: bool = False) -> CallAndReference:
    x, weights = values(T, H, deviation=3), (values(H), values(H))
    return call_and_reference(rms_norm, rms_norm_reference, (x, values(T, H) if adds else None, *weights, G, EPS))


def _linear(values: Values, T: int, G: int, K: int, N: int, epilogue: str = "none") -> CallAndReference:
    x, *weights = values(T, K), values(N, K, deviation=K**-0.5), values(N, K, deviation=K**-0.5)
    biases = (values(N), values(N)) if epilogue == "bias" else (None, None)
    residual = values(T, N) if epilogue == "residual" else None

    def call(
        x: Tensor, w_first: Tensor, w_rest: Tensor, bias_first: Tensor | None, bias_rest: Tensor | None,
        residual: Tensor | None, G: int, swiglu: bool,
    ) -> Outputs:  # fmt: skip
        return (linear(x, w_first, w_rest, bias_first, bias_rest, G=G, residual=residual, swiglu=swiglu),)

    def reference(*arguments: Any) -> Outputs:
        return (linear_reference(*arguments),)

    return call_and_reference(call, reference, (x, *weights, *biases, residual, G, epilogue == "swiglu"))


def _qk_norm_rope(values: Values, T: int, G: int, heads: int, kv_heads: int, D: int) -> CallAndReference:
    slots = values.of(np.random.default_rng(0).permutation(T + 5)[:T])
    qkv, norms = values(T, (heads + 2 * kv_heads) * D), (values(heads + kv_heads, D), values(heads + kv_heads, D))
    angles = values(T, D // 2, deviation=3, dtype=torch.float32)

    def outputs(function: Callable[..., Any], convert: Callable[[Any], Any]) -> Outputs:
        caches = [torch.full((T + 5, kv_heads, D), 7.0, device=values.device, dtype=values.dtype) for _ in range(2)]
        arguments = (qkv, *norms, angles.cos(), angles.sin(), slots, *caches)
        arguments = tuple(map(convert, arguments))
        return function(*arguments, G, EPS), *arguments[-2:]  # the caches, other slots untouched

    return (partial(outputs, qk_norm_rope, lambda value: value), partial(outputs, qk_norm_rope_reference, to_float64))


def _segment(mode: str, rows: int, start: int, visible: int, write: int | None = None, gen: bool = False) -> Segment:
    """A segment of a context at slot ``start``; with ``gen`` all rows but the first and last are generation rows."""
    routed = np.full(rows, gen)
    routed[[0, -1]] = False
    return Segment(mode, routed, start, visible, start + visible if write is None else write)


def _attention_inputs(
    values: Values, segments: list[Segment], heads: int, kv_heads: int, D: int, peak: float = QUERY_STD
) -> tuple[Tensor, ...]:
    """q, k, v, limits, blocks and mask. Slots that no row attends to hold NaN, so that a read shows."""
    plan = build_plan(segments)
    mask = visibility(plan)
    T, slots = mask.shape
    q = values(T, heads, D, deviation=peak)
    k, v = values(slots, kv_heads, D), values(slots, kv_heads, D)
    unseen = values.of(np.logical_not(mask.any(0)))
    k[unseen] = v[unseen] = torch.nan
    return q, k, v, values.of(plan.limits), values.of(plan.blocks), values.of(mask)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, D], log-sum-exp [Hq, T]) in float64."""
    q, k, v = (tensor.double() for tensor in (q, k, v))
    seen = mask.any(0)
    k, v, mask = k[seen], v[seen], mask[:, seen]
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * q.shape[2] ** -0.5
    lse = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    return attention_dense_reference(q, k, v, mask), lse


def _attention(values: Values, segments: list[Segment], heads: int, kv_heads: int, D: int) -> CallAndReference:
    q, k, v, limits, blocks, mask = _attention_inputs(values, segments, heads, kv_heads, D)
    return lambda: (attention(q, k, v, limits, blocks),), lambda: _dense(q, k, v, mask)[:1]


def _attention_lse(values: Values, segments: list[Segment], heads: int, kv_heads: int, D: int) -> CallAndReference:
    q, k, v, limits, blocks, mask = _attention_inputs(values, segments, heads, kv_heads, D)

    def sums(out: Tensor, lse: Tensor) -> Outputs:
        return out, lse.double().exp().unsqueeze(-1)

    return (
        lambda: sums(*attention(q, k, v, limits, blocks, return_lse=True)),
        lambda: sums(*_dense(q, k, v, mask)),
    )


def _attention_backward(values: Values, segments: list[Segment], heads: int, kv_heads: int, D: int) -> CallAndReference:
    q, k, v, limits, blocks, mask = _attention_inputs(values, segments, heads, kv_heads, D, 1.0)
    k, v = k.nan_to_num(), v.nan_to_num()  # the gradient of unread slots is zero
    d_out = values(*q.shape)

    def gradients(function: Callable[[Tensor, Tensor, Tensor], Tensor], d_out: Tensor, *inputs: Tensor) -> Outputs:
        q, k, v = leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            gradients = torch.autograd.grad(function(q, k, v), leaves, d_out)
        # Flatten to one row each: a row of a gradient may cancel, so errors are relative to the whole gradient.
        return tuple(gradient.flatten() for gradient in gradients)

    return (
        lambda: gradients(lambda q, k, v: attention(q, k, v, limits, blocks), d_out, q, k, v),
        lambda: gradients(
            lambda q, k, v: attention_dense_reference(q, k, v, mask), d_out.double(), q.double(), k.double(), v.double()
        ),
    )


def _guided_step(values: Values, images: list[tuple[int, float, float, str]], guided: bool = True) -> CallAndReference:
    """Images of (latents, text scale, image scale, renorm); v contains all images' branches, one kind after another."""
    rows = [latents for latents, *_ in images]
    first = np.cumsum([0, *rows[:-1]])
    table = np.stack([first, rows, *(first + branch * sum(rows) for branch in range(3))], 1).astype(np.int32)
    scales = [[0.05, *scales, 0.0, RENORMS.index(renorm)] for _, *scales, renorm in images]
    x, v = values(sum(rows), 64, dtype=torch.float32), values(3 * sum(rows), 64)
    tables = values.of(table), values.of(np.array(scales, np.float32))

    def outputs(function: Callable[..., Any], convert: Callable[[Any], Any]) -> Outputs:
        stepped = convert(x).clone()
        function(stepped, convert(v), *tables, max(rows), guided)
        return (stepped,)

    return partial(outputs, cfg_euler_step, lambda value: value), partial(outputs, cfg_euler_step_reference, to_float64)


_BATCH = [(37, 4.0, 1.5, "global"), (5, 1.0, 2.0, "channel"), (70, 3.0, 1.0, "global"), (1, 2.0, 2.0, "text_channel")]


def _group_norm(values: Values, channels: int, height: int, width: int, rows: int | None = None) -> CallAndReference:
    """A whole map, or with ``rows`` a strip of a map of that many rows, normalized with the map's statistics."""
    x = values(2, rows or height, width, channels, deviation=3).permute(0, 3, 1, 2) + 1
    moments = None if rows is None else group_norm_moments(x, 32, EPS)
    arguments = (x[:, :, :height], values(channels), values(channels), 32, EPS, True, moments)
    return call_and_reference(lambda *a: (group_norm(*a),), lambda *a: (group_norm_reference(*a),), arguments)


def _group_norm_moments(values: Values, channels: int, height: int, width: int) -> CallAndReference:
    x = values(2, height, width, channels, deviation=3).permute(0, 3, 1, 2) + 1
    return call_and_reference(
        lambda *a: (group_norm_moments(*a),), lambda *a: (group_norm_moments_reference(*a),), (x, 32, EPS)
    )


_MIXED = [
    _segment("causal", 9, 2, 0), _segment("full", 12, 2, 9, gen=True), _segment("causal", 4, 2, 21),
    _segment("full", 9, 30, 5, write=60, gen=True),
]  # fmt: skip
_DENOISING = [_segment("full", 258, 0, 70, gen=True), _segment("full", 258, 328, 0, gen=True)]
_BRANCHES = [_segment("full", 258, 0, 300, gen=True), _segment("full", 258, 0, 77, write=700, gen=True)]
_TEXT_AND_IMAGE = [_segment("causal", 150, 0, 0), _segment("full", 200, 0, 150)]
_TOWER = [_segment("full", 100, 0, 0), _segment("full", 161, 100, 0)]

CASES = [
    Case("rms_norm", "3 of 7 rows generation, width 72", partial(_rms_norm, T=7, G=3, H=72), ALL, True),
    Case("rms_norm", "257 of 258 rows generation, width 3584", partial(_rms_norm, T=258, G=257, H=3584), ALL),
    Case("add_rms_norm", "one understanding row, width 129", partial(_rms_norm, T=1, G=0, H=129, adds=True), ALL, True),
    Case("add_rms_norm", "256 of 258 rows generation, width 3584",
         partial(_rms_norm, T=258, G=256, H=3584, adds=True), ALL),
    Case("linear", "3 of 7 rows generation, 100 to 66", partial(_linear, T=7, G=3, K=100, N=66), ALL, True),
    Case("linear", "bias, generation only, 64 to 96", partial(_linear, T=5, G=5, K=64, N=96, epilogue="bias"),
         BFLOAT16, True),
    Case("linear", "SwiGLU, 17 of 19 rows generation, 64 to 96",
         partial(_linear, T=19, G=17, K=64, N=96, epilogue="swiglu"), HALF, True, roundings=SWIGLU),
    Case("linear", "BAGEL's qkv, 256 of 260 rows generation",
         partial(_linear, T=260, G=256, K=3584, N=4608, epilogue="bias"), ALL),
    Case("linear", "BAGEL's o, 130 of 133 rows generation",
         partial(_linear, T=133, G=130, K=3584, N=3584, epilogue="residual")),
    Case("linear", "BAGEL's gate and up, 256 of 258 rows generation",
         partial(_linear, T=258, G=256, K=3584, N=37888, epilogue="swiglu"), roundings=SWIGLU),
    Case("linear", "BAGEL's down, understanding only",
         partial(_linear, T=150, G=0, K=18944, N=3584, epilogue="residual")),
    Case("linear", "BAGEL's qkv, one row", partial(_linear, T=1, G=0, K=3584, N=4608, epilogue="bias")),
    Case("linear", "BAGEL's gate and up, one row",
         partial(_linear, T=1, G=0, K=3584, N=37888, epilogue="swiglu"), roundings=SWIGLU),
    Case("linear", "BAGEL's down, one row", partial(_linear, T=1, G=0, K=18944, N=3584, epilogue="residual")),
    Case("qk_norm_rope", "7 + 1 heads of 72, 2 of 5 rows generation",
         partial(_qk_norm_rope, T=5, G=2, heads=7, kv_heads=1, D=72), ALL, True),
    Case("qk_norm_rope", "28 + 4 heads of 128, 256 of 258 rows generation",
         partial(_qk_norm_rope, T=258, G=256, heads=28, kv_heads=4, D=128), ALL),
    Case("attention", "text, image, denoising, 4 over 2 heads of 16",
         partial(_attention, segments=_MIXED, heads=4, kv_heads=2, D=16), ALL, True),
    Case("attention", "two branches, 28 over 4 heads of 128",
         partial(_attention, segments=_DENOISING, heads=28, kv_heads=4, D=128), ALL),
    Case("attention", "own span detached from the context, 28 over 4 heads of 128",
         partial(_attention, segments=_BRANCHES, heads=28, kv_heads=4, D=128)),
    Case("attention", "text then an image, 28 over 4 heads of 128",
         partial(_attention, segments=_TEXT_AND_IMAGE, heads=28, kv_heads=4, D=128)),
    Case("attention", "two images, 16 heads of 72",
         partial(_attention, segments=_TOWER, heads=16, kv_heads=16, D=72), HALF),
    Case("attention_lse", "text, image, denoising, 4 over 2 heads of 16",
         partial(_attention_lse, segments=_MIXED, heads=4, kv_heads=2, D=16), BFLOAT16, True),
    Case("attention_lse", "own span detached from the context, 28 over 4 heads of 128",
         partial(_attention_lse, segments=_BRANCHES, heads=28, kv_heads=4, D=128)),
    Case("attention_backward", "text, image, denoising, 4 over 2 heads of 16",
         partial(_attention_backward, segments=_MIXED, heads=4, kv_heads=2, D=16), ALL, True),
    Case("attention_backward", "own span detached from the context, 28 over 4 heads of 128",
         partial(_attention_backward, segments=_BRANCHES, heads=28, kv_heads=4, D=128)),
    Case("cfg_euler_step", "no guidance, 6 latents",
         partial(_guided_step, images=[(6, 4.0, 1.5, "global")], guided=False), BFLOAT16, True),
    Case("cfg_euler_step", "global norm, 37 latents",
         partial(_guided_step, images=[(37, 4.0, 1.5, "global")]), ALL, True),
    Case("cfg_euler_step", "norm per token, 37 latents",
         partial(_guided_step, images=[(37, 4.0, 1.0, "channel")]), BFLOAT16, True),
    Case("cfg_euler_step", "norm per token of the text guidance, 37 latents",
         partial(_guided_step, images=[(37, 4.0, 2.0, "text_channel")]), BFLOAT16, True),
    Case("cfg_euler_step", "four images with different guidance",
         partial(_guided_step, images=_BATCH), ALL, True),
    Case("cfg_euler_step", "global norm, 4096 latents",
         partial(_guided_step, images=[(4096, 4.0, 1.5, "global")]), ALL),
    Case("group_norm", "96 channels of 5 x 7", partial(_group_norm, channels=96, height=5, width=7), ALL, True),
    Case("group_norm", "3 of 11 rows of 64 channels", partial(_group_norm, channels=64, height=3, width=5, rows=11),
         BFLOAT16, True),
    Case("group_norm", "128 channels of 256 x 256", partial(_group_norm, channels=128, height=256, width=256), ALL),
    Case("group_norm", "512 channels of 33 x 65", partial(_group_norm, channels=512, height=33, width=65), ALL),
    Case("group_norm_moments", "32 channels of 47 x 61",
         partial(_group_norm_moments, channels=32, height=47, width=61), BFLOAT16, True),
    Case("group_norm_moments", "256 channels of 512 x 512",
         partial(_group_norm_moments, channels=256, height=512, width=512), ALL),
    *DECODE_CASES,
]  # fmt: skip

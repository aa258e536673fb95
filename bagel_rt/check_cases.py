"""The cases of ``bagel-rt check``: calls of every op that has a kernel, each beside its reference in float64.

Cases that hurt come first: one row, one expert empty, sizes that no tile divides, keys that only some rows of a block
see. Then BAGEL's own widths and heads, which only a GPU runs: the interpreter would take minutes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from bagel_rt.kernels import (
    attention,
    attention_dense_reference,
    decode_attention,
    guided_step,
    linear,
    qk_norm_rope,
    rms_norm,
)
from bagel_rt.kernels.decode_attention import decode_attention_reference
from bagel_rt.kernels.guidance import guided_step_reference
from bagel_rt.kernels.linear import linear_reference
from bagel_rt.kernels.norm import rms_norm_reference
from bagel_rt.kernels.qk_norm_rope import qk_norm_rope_reference
from bagel_rt.kernels.triton_language import INTERPRETED
from bagel_rt.plan import Segment, build_plan, visibility

ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}
"""Largest relative error of one rounding to the dtype; Triton's interpreter truncates to bfloat16."""
ROUNDINGS = {
    "rms_norm": 2,
    "add_rms_norm": 3,
    "linear": 1,
    "qk_norm_rope": 1,
    "attention": 3,
    "attention_lse": 3,
    "attention_backward": 8,
    "decode_attention": 3,
    "guided_step": 0,
}
"""How many of them an output has behind it at most."""
FLOAT32_ARITHMETIC = 3e-5
"""Allowed on top: what a few thousand float32 additions may lose."""

QUERY_DEVIATION = 2.0
"""Of queries whose keys have 1: softmax is peaked, yet the keys of every tile weigh in some row."""

EPS = 1e-6
ALL = tuple(ROUNDING)
HALF = (torch.bfloat16, torch.float16)
BFLOAT16 = (torch.bfloat16,)
SWIGLU = 4  # roundings where torch does it: the product, silu, times up


class Values:
    """Makes normal tensors of one dtype on one device; the same whenever it is made anew."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, deviation: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.empty(shape, device=self.device).normal_(0.0, deviation, generator=self._generator)
        return values.to(dtype or self.dtype)

    def of(self, values) -> torch.Tensor:
        """An array or list on the device, in its own dtype."""
        return torch.as_tensor(values).to(self.device)


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op: a name in ``bagel_rt.kernels.backend.OPS``.
        name: what is special about it.
        build: Values -> (function giving the kernel's outputs, function giving the same in float64).
        dtypes: of the inputs.
        interpreted: whether Triton's interpreter runs it too.
        roundings: where there may be more than ``ROUNDINGS``.
    """

    op: str
    name: str
    build: Callable[[Values], tuple[Callable[[], Sequence[torch.Tensor]], Callable[[], Sequence[torch.Tensor]]]]
    dtypes: tuple[torch.dtype, ...] = BFLOAT16
    interpreted: bool = False
    roundings: int = 0

    def allowed(self, dtype: torch.dtype) -> float:
        """Largest |got - want| / (|want| + rms of its row) that passes."""
        return (self.roundings or ROUNDINGS[self.op]) * ROUNDING[dtype] + FLOAT32_ARITHMETIC


def _wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _both(call: Callable, reference: Callable, arguments: tuple):
    """A case whose reference takes the arguments of the call."""
    return lambda: call(*arguments), lambda: reference(*map(_wide, arguments))


def _rms_norm(values: Values, T: int, G: int, H: int, adds: bool = False):
    x, weights = values(T, H, deviation=3), (values(H), values(H))
    return _both(rms_norm, rms_norm_reference, (x, values(T, H) if adds else None, *weights, G, EPS))


def _linear(values: Values, T: int, G: int, K: int, N: int, epilogue: str = "none"):
    x, *weights = values(T, K), values(N, K, deviation=K**-0.5), values(N, K, deviation=K**-0.5)
    biases = (values(N), values(N)) if epilogue == "bias" else (None, None)
    residual = values(T, N) if epilogue == "residual" else None

    def call(x, w_gen, w_und, bias_gen, bias_und, residual, G, swiglu):
        return (linear(x, w_gen, w_und, bias_gen, bias_und, G=G, residual=residual, swiglu=swiglu),)

    def reference(*arguments):
        return (linear_reference(*arguments),)

    return _both(call, reference, (x, *weights, *biases, residual, G, epilogue == "swiglu"))


def _qk_norm_rope(values: Values, T: int, G: int, heads: int, kv_heads: int, D: int):
    slots = values.of(np.random.default_rng(0).permutation(T + 5)[:T])
    qkv, norms = values(T, (heads + 2 * kv_heads) * D), (values(heads + kv_heads, D), values(heads + kv_heads, D))
    angles = values(T, D // 2, deviation=3, dtype=torch.float32)

    def outputs(function, convert):
        caches = [torch.full((T + 5, kv_heads, D), 7.0, device=values.device, dtype=values.dtype) for _ in range(2)]
        arguments = (qkv, *norms, angles.cos(), angles.sin(), slots, *caches)
        arguments = tuple(map(convert, arguments))
        return function(*arguments, G, EPS), *arguments[-2:]  # the caches, other slots untouched

    return (partial(outputs, qk_norm_rope, lambda value: value), partial(outputs, qk_norm_rope_reference, _wide))


def _segment(mode: str, rows: int, start: int, visible: int, write: int | None = None, gen: bool = False) -> Segment:
    """Rows in a context that begins at slot ``start``; with ``gen`` all but the first and the last are generation's."""
    routed = np.full(rows, gen)
    routed[[0, -1]] = False
    return Segment(mode, routed, start, visible, start + visible if write is None else write)


def _attention_inputs(values: Values, segments: list[Segment], heads: int, kv_heads: int, D: int, peak=QUERY_DEVIATION):
    """q, k, v, limits, blocks and the mask; slots that nobody sees hold NaN, which shows if it is read."""
    plan = build_plan(segments)
    mask = visibility(plan)
    T, slots = mask.shape
    q = values(T, heads, D, deviation=peak)
    k, v = values(slots, kv_heads, D), values(slots, kv_heads, D)
    unseen = values.of(~mask.any(0))
    k[unseen] = v[unseen] = torch.nan
    return q, k, v, values.of(plan.limits), values.of(plan.blocks), values.of(mask)


def _dense(q, k, v, mask):
    """(out [T, Hq, D], log-sum-exp [Hq, T]) in float64."""
    q, k, v = (tensor.double() for tensor in (q, k, v))
    seen = mask.any(0)
    k, v, mask = k[seen], v[seen], mask[:, seen]
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * q.shape[2] ** -0.5
    lse = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    return attention_dense_reference(q, k, v, mask), lse


def _attention(values: Values, segments, heads: int, kv_heads: int, D: int):
    q, k, v, limits, blocks, mask = _attention_inputs(values, segments, heads, kv_heads, D)
    return lambda: (attention(q, k, v, limits, blocks),), lambda: _dense(q, k, v, mask)[:1]


def _attention_lse(values: Values, segments, heads: int, kv_heads: int, D: int):
    q, k, v, limits, blocks, mask = _attention_inputs(values, segments, heads, kv_heads, D)

    def sums(out, lse):  # of exponentials, each by itself: what a lost key takes from one, it takes from the other
        return out, lse.double().exp().unsqueeze(-1)

    return (
        lambda: sums(*attention(q, k, v, limits, blocks, return_lse=True)),
        lambda: sums(*_dense(q, k, v, mask)),
    )


def _attention_backward(values: Values, segments, heads: int, kv_heads: int, D: int):
    q, k, v, limits, blocks, mask = _attention_inputs(values, segments, heads, kv_heads, D, 1.0)
    k, v = k.nan_to_num(), v.nan_to_num()  # their gradient is zero, whatever they hold
    d_out = values(*q.shape)

    def gradients(function, d_out, *inputs):
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            found = torch.autograd.grad(function(*inputs), inputs, d_out)
        # One row each: rows are differences of nearly equal numbers, as right as the largest of them.
        return [gradient.flatten() for gradient in found]

    return (
        lambda: gradients(lambda *inputs: attention(*inputs, limits, blocks), d_out, q, k, v),
        lambda: gradients(
            lambda *inputs: attention_dense_reference(*inputs, mask), d_out.double(), q.double(), k.double(), v.double()
        ),
    )


def _decode_attention(values: Values, lengths: list[int], heads: int, kv_heads: int, D: int):
    starts = np.cumsum([3, *lengths[:-1]])
    slots = 3 + sum(lengths)
    q = values(len(lengths), heads, D, deviation=QUERY_DEVIATION)
    k, v = values(slots, kv_heads, D), values(slots, kv_heads, D)
    k[:3] = v[:3] = torch.nan  # nobody's
    arguments = (q, k, v, values.of(starts), values.of(np.array(lengths)), D**-0.5)
    return _both(lambda *a: (decode_attention(*a),), lambda *a: (decode_attention_reference(*a),), arguments)


def _guided_step(values: Values, latents: int, renorm: str, image_scale: float, smallest: float = 0.0):
    x, velocities = values(latents, 64, dtype=torch.float32), [values(latents, 64) for _ in range(3)]
    arguments = (x, *velocities, 4.0, image_scale, renorm, smallest, 0.05)
    return _both(lambda *a: (guided_step(*a),), lambda *a: (guided_step_reference(*a),), arguments)


_MIXED = [
    _segment("causal", 9, 2, 0), _segment("full", 12, 2, 9, gen=True), _segment("causal", 4, 2, 21),
    _segment("noise", 9, 30, 5, write=60, gen=True),
]  # fmt: skip
_DENOISING = [_segment("noise", 258, 0, 70, gen=True), _segment("noise", 258, 328, 0, gen=True)]
_BRANCHES = [_segment("noise", 258, 0, 300, gen=True), _segment("noise", 258, 0, 77, write=700, gen=True)]
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
    Case("attention", "own keys apart from the context, 28 over 4 heads of 128",
         partial(_attention, segments=_BRANCHES, heads=28, kv_heads=4, D=128)),
    Case("attention", "text then an image, 28 over 4 heads of 128",
         partial(_attention, segments=_TEXT_AND_IMAGE, heads=28, kv_heads=4, D=128)),
    Case("attention", "two pictures, 16 heads of 72",
         partial(_attention, segments=_TOWER, heads=16, kv_heads=16, D=72), HALF),
    Case("attention_lse", "text, image, denoising, 4 over 2 heads of 16",
         partial(_attention_lse, segments=_MIXED, heads=4, kv_heads=2, D=16), BFLOAT16, True),
    Case("attention_lse", "own keys apart from the context, 28 over 4 heads of 128",
         partial(_attention_lse, segments=_BRANCHES, heads=28, kv_heads=4, D=128)),
    Case("attention_backward", "text, image, denoising, 4 over 2 heads of 16",
         partial(_attention_backward, segments=_MIXED, heads=4, kv_heads=2, D=16), ALL, True),
    Case("attention_backward", "own keys apart from the context, 28 over 4 heads of 128",
         partial(_attention_backward, segments=_BRANCHES, heads=28, kv_heads=4, D=128)),
    Case("decode_attention", "lengths 1, 0 and 70, 4 over 2 heads of 16",
         partial(_decode_attention, lengths=[1, 0, 70], heads=4, kv_heads=2, D=16), ALL, True),
    Case("decode_attention", "lengths 5, 2000 and 131, 28 over 4 heads of 128",
         partial(_decode_attention, lengths=[5, 2000, 131], heads=28, kv_heads=4, D=128), ALL),
    Case("decode_attention", "length 9064, 28 over 4 heads of 128",
         partial(_decode_attention, lengths=[9064], heads=28, kv_heads=4, D=128)),
    Case("guided_step", "no guidance, 6 latents", lambda v: _guided_step(v, 6, "global", 1.0, 1.0), BFLOAT16, True),
    Case("guided_step", "global norm, 37 latents", partial(_guided_step, latents=37, renorm="global", image_scale=1.5),
         ALL, True),
    Case("guided_step", "norm per token, 37 latents",
         partial(_guided_step, latents=37, renorm="channel", image_scale=1.0), BFLOAT16, True),
    Case("guided_step", "norm per token of the text's, 37 latents",
         partial(_guided_step, latents=37, renorm="text_channel", image_scale=2.0), BFLOAT16, True),
    Case("guided_step", "global norm, 4096 latents",
         partial(_guided_step, latents=4096, renorm="global", image_scale=1.5), ALL),
]  # fmt: skip

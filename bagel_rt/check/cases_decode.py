"""Cases of ``bagel-rt check`` for the decode ops.

Edge cases come first, as in :mod:`bagel_rt.check.cases`. float16 and sizes that the CUDA kernels do not support run the
Triton fallback.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bagel_rt.check.case import (
    ALL,
    EPS,
    QUERY_STD,
    SWIGLU,
    CallAndReference,
    Case,
    Outputs,
    Values,
    call_and_reference,
    to_float64,
)
from bagel_rt.kernels import decode_attention, decode_linear, decode_qkv, sample
from bagel_rt.kernels.decode_attention import decode_attention_reference
from bagel_rt.kernels.decode_linear import decode_linear_reference
from bagel_rt.kernels.decode_qkv import decode_qkv_reference
from bagel_rt.kernels.sample import scores_reference

DECODED = (torch.bfloat16, torch.float32)  # dtypes of the extension's kernels


def _decode_linear(
    values: Values, B: int, K: int, N: int, norm: bool = False, epilogue: str = "none"
) -> CallAndReference:
    x, w = values(B, K, deviation=3 if norm else 1), values(N, K, deviation=K**-0.5)
    arguments = (x, w, values(K) if norm else None, EPS, values(B, N) if epilogue == "residual" else None)

    def call(x: Tensor, w: Tensor, norm: Tensor | None, eps: float, residual: Tensor | None) -> Outputs:
        return (decode_linear(x, w, norm=norm, eps=eps, residual=residual, swiglu=epilogue == "swiglu"),)

    def reference(x: Tensor, w: Tensor, norm: Tensor | None, eps: float, residual: Tensor | None) -> Outputs:
        return (decode_linear_reference(x, w, norm, eps, residual, epilogue == "swiglu"),)

    return call_and_reference(call, reference, arguments)


def _decode_qkv(values: Values, B: int, H: int, heads: int, kv_heads: int, D: int) -> CallAndReference:
    slots, rows = values.of(np.random.default_rng(0).permutation(B + 5)[:B]), (heads + 2 * kv_heads) * D
    x, norm, w = values(B, H, deviation=3), values(H), values(rows, H, deviation=H**-0.5)
    bias, qk_norm, angles = values(rows), values(heads + kv_heads, D), values(B, D // 2, dtype=torch.float32)

    def outputs(function: Callable[..., Any], convert: Callable[[Any], Any]) -> Outputs:
        caches = [torch.full((B + 5, kv_heads, D), 7.0, device=values.device, dtype=values.dtype) for _ in range(2)]
        arguments = (x, norm, w, bias, qk_norm, angles.cos(), angles.sin(), slots, *caches)
        arguments = tuple(map(convert, arguments))
        return function(*arguments, EPS), *arguments[-2:]  # the caches, other slots untouched

    return (partial(outputs, decode_qkv, lambda value: value), partial(outputs, decode_qkv_reference, to_float64))


def _decode_attention(values: Values, lengths: list[int], heads: int, kv_heads: int, D: int) -> CallAndReference:
    starts = np.cumsum([3, *lengths[:-1]])
    slots = 3 + sum(lengths)
    q = values(len(lengths), heads, D, deviation=QUERY_STD)
    k, v = values(slots, kv_heads, D), values(slots, kv_heads, D)
    k[:3] = v[:3] = torch.nan  # slots of no sequence
    arguments = (q, k, v, values.of(starts), values.of(np.array(lengths)), D**-0.5)
    return call_and_reference(
        lambda *a: (decode_attention(*a),), lambda *a: (decode_attention_reference(*a),), arguments
    )


def _sample(values: Values, V: int, rows: Sequence[tuple[float, float, float]] = (), B: int = 1) -> CallAndReference:
    """The score of the sampled token against the maximum: tokens may differ where scores tie to the last bits.

    ``rows`` are the settings of each row; without them the most likely token of B rows is taken.
    """
    B = len(rows) or B
    logits, number = values(B, V, deviation=3), values.of(np.arange(B))
    settings = values.of(np.array(rows, np.float32)) if rows else None
    scores = logits.double() if settings is None else scores_reference(logits.double(), settings, number, number)

    def call() -> Outputs:
        return (scores.gather(1, sample(logits, settings, number, number).unsqueeze(1)),)

    return call, lambda: (scores.max(1, keepdim=True).values,)


_SETTINGS = [(1.0, 0, 1), (0.0, 0, 1), (0.7, 20, 1), (1.3, 0, 0.9), (0.9, 40, 0.8), (1.0, 300, 0.95)]

DECODE_CASES = [
    Case("decode_linear", "3 rows with norm, 264 to 50",
         partial(_decode_linear, B=3, K=264, N=50, norm=True), DECODED, True),
    Case("decode_linear", "8 rows with residual, 72 to 17",
         partial(_decode_linear, B=8, K=72, N=17, epilogue="residual"), DECODED, True),
    Case("decode_linear", "one row with norm and SwiGLU, 520 to 36",
         partial(_decode_linear, B=1, K=520, N=36, norm=True, epilogue="swiglu"), DECODED, True, roundings=SWIGLU + 2),
    Case("decode_linear", "BAGEL's o, one row", partial(_decode_linear, B=1, K=3584, N=3584, epilogue="residual")),
    Case("decode_linear", "BAGEL's gate and up, one row",
         partial(_decode_linear, B=1, K=3584, N=37888, norm=True, epilogue="swiglu"), roundings=SWIGLU + 2),
    Case("decode_linear", "BAGEL's gate and up, 8 rows",
         partial(_decode_linear, B=8, K=3584, N=37888, norm=True, epilogue="swiglu"), roundings=SWIGLU + 2),
    Case("decode_linear", "BAGEL's down, one row", partial(_decode_linear, B=1, K=18944, N=3584, epilogue="residual")),
    Case("decode_linear", "BAGEL's down, 4 rows", partial(_decode_linear, B=4, K=18944, N=3584, epilogue="residual")),
    Case("decode_linear", "BAGEL's vocabulary, one row", partial(_decode_linear, B=1, K=3584, N=152064, norm=True)),
    Case("decode_qkv", "3 rows, 7 + 1 heads of 32",
         partial(_decode_qkv, B=3, H=264, heads=7, kv_heads=1, D=32), DECODED, True),
    Case("decode_qkv", "one row, 28 + 4 heads of 128",
         partial(_decode_qkv, B=1, H=3584, heads=28, kv_heads=4, D=128), DECODED),
    Case("decode_qkv", "4 rows, 28 + 4 heads of 128",
         partial(_decode_qkv, B=4, H=3584, heads=28, kv_heads=4, D=128), DECODED),
    Case("decode_attention", "lengths 1, 0 and 70, 4 over 2 heads of 16",
         partial(_decode_attention, lengths=[1, 0, 70], heads=4, kv_heads=2, D=16), ALL, True),
    Case("decode_attention", "lengths 5, 2000 and 131, 28 over 4 heads of 128",
         partial(_decode_attention, lengths=[5, 2000, 131], heads=28, kv_heads=4, D=128), ALL),
    Case("decode_attention", "length 9064, 28 over 4 heads of 128",
         partial(_decode_attention, lengths=[9064], heads=28, kv_heads=4, D=128)),
    Case("sample", "most likely of 333 tokens, 5 rows", partial(_sample, V=333, B=5), DECODED, True),
    Case("sample", "from 333 tokens, rows with and without top-k and top-p",
         partial(_sample, V=333, rows=_SETTINGS), DECODED, True),
    Case("sample", "most likely of BAGEL's vocabulary", partial(_sample, V=152064), DECODED),
    Case("sample", "from BAGEL's vocabulary, rows with and without top-k and top-p",
         partial(_sample, V=152064, rows=_SETTINGS), DECODED),
]  # fmt: skip

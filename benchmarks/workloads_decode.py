"""Workloads of the decode ops, which run for every decoded token, most of them in each layer."""

from functools import partial

import numpy as np
import torch

from bagel_rt.check.case import Values
from bagel_rt.kernels import decode_attention, decode_linear, decode_qkv, sample
from benchmarks.workload import EPS, FEED_FORWARD, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCABULARY, OpWorkload

CONTEXTS = (1000, 9064)
TEXTS = (1, 4)


def _decode_attention(values: Values, length: int):
    caches = [values(length, KV_HEADS, HEAD_DIM) for _ in range(2)]
    spans = [values.of(np.array([value])) for value in (0, length)]
    return decode_attention, (values(1, HEADS, HEAD_DIM), *caches, *spans), {}


def _decode_linear(values: Values, B: int, K: int, N: int, norm: bool, epilogue: str):
    options = {
        "norm": values(K) if norm else None,
        "eps": EPS,
        "residual": values(B, N) if epilogue == "residual" else None,
        "swiglu": epilogue == "swiglu",
    }
    return decode_linear, (values(B, K), values(N, K, deviation=K**-0.5)), options


def _decode_linear_workload(name: str, B: int, K: int, N: int, norm: bool, epilogue: str) -> OpWorkload:
    width = N // 2 if epilogue == "swiglu" else N * (2 if epilogue == "residual" else 1)
    traffic = 2 * (N * K + B * K + B * width + K * norm)
    build = partial(_decode_linear, B=B, K=K, N=N, norm=norm, epilogue=epilogue)
    return OpWorkload(name, "decode_linear", 2 * B * K * N, traffic, build)


def _decode_qkv(values: Values, B: int):
    heads, rows = HEADS + KV_HEADS, (HEADS + 2 * KV_HEADS) * HEAD_DIM
    layer = values(HIDDEN), values(rows, HIDDEN, deviation=HIDDEN**-0.5), values(rows), values(heads, HEAD_DIM)
    tables = [values(B, HEAD_DIM // 2, dtype=torch.float32) for _ in range(2)]
    caches = [values(B, KV_HEADS, HEAD_DIM) for _ in range(2)]
    return decode_qkv, (values(B, HIDDEN), *layer, *tables, values.of(np.arange(B)), *caches, EPS), {}


def _decode_qkv_workload(name: str, B: int) -> OpWorkload:
    rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    traffic = 2 * (rows * HIDDEN + HIDDEN + rows + B * (HIDDEN + rows)) + B * HEAD_DIM * 4
    return OpWorkload(name, "decode_qkv", 2 * B * HIDDEN * rows, traffic, partial(_decode_qkv, B=B))


def _sample(values: Values, B: int, settings: tuple[float, float, float] | None):
    """Logits have the spread of a language model's. With less, top-p would keep nearly all tokens."""
    logits, number = values(B, VOCABULARY, deviation=3.0), values.of(np.arange(B))
    if settings is None:
        return sample, (logits,), {}
    return sample, (logits, values.of(np.array([settings] * B, np.float32)), number, number), {}


def _per_token_workloads(B: int) -> list[OpWorkload]:
    """All decode ops except attention for a batch of B texts."""
    forward = f"decode, {B} text{'s' * (B > 1)}"
    products = {
        "o": (HEADS * HEAD_DIM, HIDDEN, False, "residual"),
        "gate_up": (HIDDEN, 2 * FEED_FORWARD, True, "swiglu"),
        "down": (FEED_FORWARD, HIDDEN, False, "residual"),
        "lm_head": (HIDDEN, VOCABULARY, True, "none"),
    }
    workloads = [_decode_qkv_workload(f"decode_qkv, {forward}", B)]
    workloads += [_decode_linear_workload(f"decode_linear {name}, {forward}", B, *to) for name, to in products.items()]
    for name, settings in (("the most likely token", None), ("top-k and top-p", (0.7, 50, 0.9))):
        build = partial(_sample, B=B, settings=settings)
        workloads.append(OpWorkload(f"sample {name}, {forward}", "sample", 0, 2 * B * VOCABULARY, build))
    return workloads


def decode_workloads() -> list[OpWorkload]:
    """Attention for each length of ``CONTEXTS``, then the other ops for each batch size of ``TEXTS``."""
    workloads = []
    for length in CONTEXTS:
        flops, traffic = 4 * HEADS * HEAD_DIM * length, 4 * HEAD_DIM * (length * KV_HEADS + HEADS)
        build = partial(_decode_attention, length=length)
        workloads.append(OpWorkload(f"decode_attention, {length} keys", "decode_attention", flops, traffic, build))
    return workloads + [workload for texts in TEXTS for workload in _per_token_workloads(texts)]

"""Op workloads at the sizes of BAGEL-7B-MoT, used by the inspect, tune and kernels benchmarks.

A 1024x1024 image has 4096 latents and two markers. Its guidance branches share one forward.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from bagel_rt.check.case import Values
from bagel_rt.kernels import attention, cfg_euler_step, group_norm, linear, qk_norm_rope, rms_norm
from bagel_rt.kernels.guidance import RENORMS
from bagel_rt.runtime.plan import Plan, Segment, build_plan
from bagel_rt.train.batch import training_segments
from benchmarks.workload import (
    EPS,
    FEED_FORWARD,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    VIT_HEAD_DIM,
    VIT_HEADS,
    OpWorkload,
)
from benchmarks.workloads_decode import decode_workloads


def _denoise(latents: int, branches: list[tuple[int, int, bool]]) -> Plan:
    """The plan of a denoising step.

    Args:
        latents: number of latents of the image.
        branches: (first slot of the context, its length, whether the latents' slots directly follow it).
    """
    rows = latents + 2
    gen = np.ones(rows, bool)
    gen[[0, -1]] = False
    end = max(start + length + rows * follows for start, length, follows in branches)
    segments = []
    for start, length, follows in branches:
        segments.append(Segment("full", gen, start, length, start + length if follows else end))
        end += 0 if follows else rows
    return build_plan(segments)


def _prefill(*segments: tuple[str, int]) -> Plan:
    """The plan of a prefill of (kind, rows) contents into an empty context; kind is "text", "vit" or "vae"."""
    packed, visible = [], 0
    for kind, rows in segments:
        gen = np.full(rows, kind == "vae")
        gen[[0, -1]] = False
        packed.append(Segment("causal" if kind == "text" else "full", gen, 0, visible, visible))
        visible += rows
    return build_plan(packed)


def training_plan() -> Plan:
    """A packed training batch of 16,600 rows: an edit, a text-to-image pair, a question about an image."""
    samples = [
        [("full", 2502, False), ("full", 4098, True), ("causal", 120, False), ("noise", 4098, True)],
        [("causal", 200, False), ("noise", 4098, True)],
        [("full", 1026, False), ("causal", 458, False)],
    ]
    splits = [split for sample in samples for split in sample]
    gen = []
    for _, rows, latents in splits:
        gen.append(np.full(rows, latents))
        gen[-1][[0, -1]] = False
    modes, sizes, _ = zip(*splits, strict=True)
    lengths = [sum(rows for _, rows, _ in sample) for sample in samples]
    return build_plan(training_segments(sizes, modes, lengths, np.concatenate(gen)))


PLANS: dict[str, Callable[[], Plan]] = {
    "text-to-image 1024": partial(_denoise, 4096, [(0, 64, True), (4162, 0, True)]),
    "unguided 1024": partial(_denoise, 4096, [(0, 64, True)]),
    "edit 1024": partial(_denoise, 4096, [(0, 9064, True), (0, 9000, False), (13162, 64, True)]),
    "text-to-image 512": partial(_denoise, 1024, [(0, 64, True), (1090, 0, True)]),
    "image prefill 9000": partial(_prefill, ("vae", 4098), ("vit", 4902)),
    "text prefill 256": partial(_prefill, ("text", 256)),
    "text prefill 64": partial(_prefill, ("text", 64)),
}
"""Name of a forward -> its plan. With the decoding of one token, these cover all forwards of a request."""


def _linear(values: Values, T: int, G: int, K: int, N: int, epilogue: str):
    weights = [values(N, K, deviation=K**-0.5) for _ in range(2)]
    biases = [values(N) for _ in range(2)] if epilogue == "bias" else ()
    residual = values(T, N) if epilogue == "residual" else None
    return linear, (values(T, K), *weights, *biases), {"G": G, "residual": residual, "swiglu": epilogue == "swiglu"}


LINEARS = {  # K, N, epilogue
    "qkv": (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, "bias"),
    "o": (HEADS * HEAD_DIM, HIDDEN, "residual"),
    "gate_up": (HIDDEN, 2 * FEED_FORWARD, "swiglu"),
    "down": (FEED_FORWARD, HIDDEN, "residual"),
}


def _linears(forward: str, T: int, G: int) -> list[OpWorkload]:
    return [_linear_workload(f"{name}, {forward}", T, G, *shape) for name, shape in LINEARS.items()]


def _linear_workload(name: str, T: int, G: int, K: int, N: int, epilogue: str, dtype=torch.bfloat16) -> OpWorkload:
    experts = (G > 0) + (G < T)
    width = N // 2 if epilogue == "swiglu" else N * (2 if epilogue == "residual" else 1)
    traffic = dtype.itemsize * (experts * N * K + T * K + T * width)
    build = partial(_linear, T=T, G=G, K=K, N=N, epilogue=epilogue)
    return OpWorkload(name, "linear", 2 * T * K * N, traffic, build, dtype)


def _rms_norm(values: Values, T: int, G: int, adds: bool = False, width: int = HIDDEN):
    weights = (values(width), values(width))
    return rms_norm, (values(T, width), values(T, width) if adds else None, *weights, G, EPS), {}


def _qk_norm_rope(values: Values, T: int, G: int, q_heads: int = HEADS, kv_heads: int = KV_HEADS):
    heads = q_heads + kv_heads
    qkv = values(T, (heads + kv_heads) * HEAD_DIM)
    norms = (values(heads, HEAD_DIM), values(heads, HEAD_DIM))
    tables = [values(T, HEAD_DIM // 2, dtype=torch.float32) for _ in range(2)]
    caches = [values(T, kv_heads, HEAD_DIM) for _ in range(2)]
    return qk_norm_rope, (qkv, *norms, *tables, values.of(np.arange(T)), *caches, G, EPS), {}


def _row_ops(forward: str, T: int, G: int) -> list[OpWorkload]:
    """Linear layers and memory-bound ops of a forward of T rows, G of them generation rows."""
    norms = [
        OpWorkload(
            f"{name}, {forward}", "rms_norm", 0, passes * T * HIDDEN * 2, partial(_rms_norm, T=T, G=G, adds=adds)
        )
        for name, passes, adds in (("rms_norm", 2, False), ("rms_norm with residual", 4, True))
    ]
    columns = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    traffic = T * (2 * columns * 2 + 2 * HEAD_DIM // 2 * 4 + 8)
    rope = OpWorkload(f"qk_norm_rope, {forward}", "qk_norm_rope", 0, traffic, partial(_qk_norm_rope, T=T, G=G))
    return [*_linears(forward, T, G), *norms, rope]


def _attention_inputs(values: Values, plan: Plan, heads: int, kv_heads: int, head_dim: int):
    T, slots = len(plan.limits), int(plan.slots.max()) + 1
    caches = [values(slots, kv_heads, head_dim) for _ in range(2)]
    return values(T, heads, head_dim), *caches, values.of(plan.limits), values.of(plan.blocks)


def _attention(values: Values, make_plan, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, **options):
    return attention, _attention_inputs(values, make_plan(), heads, kv_heads, head_dim), options


def attention_gradients(q, k_cache, v_cache, limits, blocks, gradient):
    """``attention`` and its gradients: (out, dq, dk, dv), shaped like q, q, k_cache and v_cache."""
    inputs = [tensor.detach().requires_grad_() for tensor in (q, k_cache, v_cache)]
    out = attention(*inputs, limits, blocks)
    return (out.detach(), *torch.autograd.grad(out, inputs, gradient))


def _attention_gradients(values: Values, make_plan, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM):
    inputs = _attention_inputs(values, make_plan(), heads, kv_heads, head_dim)
    return attention_gradients, (*inputs, values(*inputs[0].shape)), {}


def visible_pairs(plan: Plan) -> int:
    """Number of (query row, visible key) pairs of a plan."""
    rows = plan.blocks[:, 1] - plan.blocks[:, 0]
    return int(plan.limits.sum(dtype=np.int64) + (rows * (plan.blocks[:, 6] - plan.blocks[:, 5])).sum(dtype=np.int64))


Heads = tuple[int, int, int]
"""Query heads, key/value heads, head_dim."""
BAGEL_HEADS, VIT = (HEADS, KV_HEADS, HEAD_DIM), (VIT_HEADS, VIT_HEADS, VIT_HEAD_DIM)


def _attention_workload(
    name: str, make_plan: Callable[[], Plan], shape: Heads = BAGEL_HEADS, dtype=torch.bfloat16, **options
) -> OpWorkload:
    plan, (heads, kv_heads, head_dim) = make_plan(), shape
    T, slots = len(plan.limits), int(plan.slots.max()) + 1
    traffic = 2 * dtype.itemsize * head_dim * (T * heads + slots * kv_heads)
    traffic += 4 * T * heads * options.get("return_lse", False)
    build = partial(_attention, make_plan=make_plan, heads=heads, kv_heads=kv_heads, head_dim=head_dim, **options)
    return OpWorkload(name, "attention", 4 * heads * head_dim * visible_pairs(plan), traffic, build, dtype)


def _gradients_workload(
    name: str, make_plan: Callable[[], Plan], shape: Heads = BAGEL_HEADS, dtype=torch.bfloat16
) -> OpWorkload:
    """Attention forward and backward.

    Each visible pair takes 2 dot products forward and 5 backward. The traffic is that of q, k, v, out and dout (reads)
    and of dq, dk and dv (writes).
    """
    forward, (heads, kv_heads, head_dim) = _attention_workload(name, make_plan, shape, dtype), shape
    build = partial(_attention_gradients, make_plan=make_plan, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    return OpWorkload(name, "attention_backward", forward.flops * 7 // 2, 3 * forward.bytes, build, dtype)


def _one_image() -> Plan:
    return build_plan([Segment("full", np.zeros(4900, bool), 0, 0, 0)])


def _attention_workloads() -> list[OpWorkload]:
    return [
        *(_attention_workload(f"attention, {name}", make_plan) for name, make_plan in PLANS.items()),
        _attention_workload("attention, ViT 4900", _one_image, VIT),
        _attention_workload("attention, training 16k", training_plan),
        _attention_workload("attention with lse, training 16k", training_plan, return_lse=True),
        _gradients_workload("attention and gradients, training 16k", training_plan),
    ]


def _cfg_euler_step(values: Values, latents: int, renorm: str, branches: int, features: int = 64, images: int = 1):
    """Rows are ordered by branch, then image. With dt = 1, state and velocities contribute equally to the result."""
    rows = images * latents
    state, velocities = values(rows, features, dtype=torch.float32), values(branches * rows, features)
    first = np.arange(images) * latents
    branch_rows = [first + min(branch, branches - 1) * rows for branch in range(3)]
    image_table = np.stack([first, np.full(images, latents), *branch_rows], 1).astype(np.int32)
    row = [1.0, 4.0, 2.0 if branches > 2 else 1.0, 0.0, RENORMS.index(renorm)]
    cfg_table = np.array([row] * images, np.float32)
    return cfg_euler_step, (state, velocities, values.of(image_table), values.of(cfg_table), latents, branches > 1), {}


def _cfg_euler_step_workload(name: str, latents: int, renorm: str, branches: int, features: int = 64, images: int = 1):
    build = partial(
        _cfg_euler_step, latents=latents, renorm=renorm, branches=branches, features=features, images=images
    )
    return OpWorkload(name, "cfg_euler_step", 0, images * latents * features * (8 + 2 * branches), build)


def _group_norm(values: Values, channels: int, side: int):
    x = values(1, side, side, channels).permute(0, 3, 1, 2)
    return group_norm, (x, values(channels), values(channels), 32, EPS, True), {}


def _group_norm_workload(channels: int, side: int, dtype=torch.float32) -> OpWorkload:
    build = partial(_group_norm, channels=channels, side=side)
    name = f"group_norm, {channels} channels of {side}x{side}"
    return OpWorkload(name, "group_norm", 0, 2 * dtype.itemsize * channels * side**2, build, dtype)


def _workloads() -> list[OpWorkload]:
    workloads = []
    for name, make_plan in PLANS.items():
        plan = make_plan()
        workloads += _row_ops(name, len(plan.limits), plan.G)
    workloads += _row_ops("decode", 1, 0)
    workloads += _attention_workloads()
    workloads += decode_workloads()
    workloads += [_group_norm_workload(*sizes) for sizes in ((128, 1024), (256, 1024), (512, 512), (512, 128))]
    for size, latents in ((1024, 4096), (512, 1024)):
        for renorm, branches in (("global", 2), ("channel", 2), ("text_channel", 3), ("global", 3)):
            name = f"cfg_euler_step {renorm} of {branches} branches, {size}"
            workloads.append(_cfg_euler_step_workload(name, latents, renorm, branches))
    workloads.append(_cfg_euler_step_workload("cfg_euler_step without guidance, 1024", 4096, "global", 1))
    name = "cfg_euler_step global of 3 branches, four images of 1024"
    workloads.append(_cfg_euler_step_workload(name, 4096, "global", 3, images=4))
    return workloads


WORKLOADS = _workloads()


def _other_sizes() -> list[OpWorkload]:
    image, text = PLANS["text-to-image 512"], PLANS["text prefill 256"]
    norms = [
        OpWorkload(
            f"rms_norm, width {width}", "rms_norm", 0, 4 * 4096 * width, partial(_rms_norm, T=4096, G=0, width=width)
        )
        for width in (896, 16384)
    ]
    heads, kv_heads = 64, 8
    rope_bytes = 2048 * ((heads + 2 * kv_heads) * HEAD_DIM * 4 + HEAD_DIM * 4 + 8)
    rope = partial(_qk_norm_rope, T=2048, G=1024, q_heads=heads, kv_heads=kv_heads)
    return [
        *norms,
        OpWorkload("qk_norm_rope, 64 heads", "qk_norm_rope", 0, rope_bytes, rope),
        _cfg_euler_step_workload("cfg_euler_step global, 16384 features", 256, "global", 2, features=16384),
        _group_norm_workload(96, 512, torch.bfloat16),
        _linear_workload("linear in float32", 256, 128, 1024, 1024, "bias", torch.float32),
        _linear_workload("linear of 3588 columns", 4096, 2048, 3588, 3584, "bias"),
        _attention_workload("attention, 14 heads of 64", image, (14, 2, 64)),
        _attention_workload("attention in float32", text, (4, 1, 128), torch.float32),
        _gradients_workload("attention and gradients, 14 heads of 64", image, (14, 2, 64)),
        _gradients_workload("attention and gradients, ViT 4900", _one_image, VIT),
        _gradients_workload("attention and gradients in float32", text, (4, 1, 128), torch.float32),
    ]


OTHER_SIZES = _other_sizes()
"""Workloads for the shape classes that BAGEL in bfloat16 does not use: other models and dtypes."""

ALL_WORKLOADS = WORKLOADS + OTHER_SIZES

"""Calls of the ops at the sizes of BAGEL-7B-MoT: what is inspected, tuned and measured.

A layer has hidden size 3584, 28 query heads and 4 key/value heads of 128 channels, SwiGLU width 18944; its vision tower
16 heads of 72. A 1024 x 1024 image is 4096 latents and two markers, its guidance branches share one forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from bagel_rt.kernels import attention, decode_attention, guided_step, linear, qk_norm_rope, rms_norm
from bagel_rt.plan import Plan, Segment, build_plan
from bagel_rt.training import training_segments

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM = 3584, 18944, 28, 4, 128
VIT_HEADS, VIT_HEAD_DIM = 16, 72
EPS = 1e-6


class Tensors:
    """Makes the tensors of a workload on ``device``, floating ones in ``dtype`` unless told otherwise.

    ``random`` ones are normal; others are left unwritten, so that on the CPU even gigabytes take no memory.
    """

    def __init__(self, device, dtype: torch.dtype, random: bool = True):
        self.device, self.dtype, self.random = torch.device(device), dtype, random

    def __call__(self, *shape: int, deviation: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = torch.empty(shape, device=self.device, dtype=dtype or self.dtype)
        return tensor.normal_(0.0, deviation) if self.random else tensor

    def of(self, array: np.ndarray) -> torch.Tensor:
        """The values of ``array``."""
        return torch.from_numpy(array).to(self.device)


@dataclass(frozen=True)
class Workload:
    """One call of an op.

    Attributes:
        name: op and size, unique.
        op: the public op's name; "attention_backward" is attention and its gradients.
        flops: multiplications and additions of the formula; 0 where memory is the limit.
        bytes: least traffic in ``dtype``, each input read and each output written once.
        build: Tensors -> (public function, arguments, keyword arguments).
        dtype: what the model runs it in.
    """

    name: str
    op: str
    flops: int
    bytes: int
    build: Callable[[Tensors], tuple[Callable, tuple, dict]]
    dtype: torch.dtype = torch.bfloat16

    @property
    def entries(self) -> tuple[str, ...]:
        """The ops of the table of tiles (``bagel_rt.kernels.configs``) that the workload is about."""
        others = {"decode_attention": ("attention",), "attention_backward": ("attention_dq", "attention_dk_dv")}
        return others.get(self.op, (self.op,))


def _denoise(latents: int, branches: list[tuple[int, int, bool]]) -> Plan:
    """Branches (first slot of the context, its length, whether the latents' slots are right behind it)."""
    rows = latents + 2
    gen = np.ones(rows, bool)
    gen[[0, -1]] = False
    end = max(start + length + rows * behind for start, length, behind in branches)
    segments = []
    for start, length, behind in branches:
        segments.append(Segment("noise", gen, start, length, start + length if behind else end))
        end += 0 if behind else rows
    return build_plan(segments)


def _prefill(*segments: tuple[str, int]) -> Plan:
    """Contents (text, vit or vae, rows) appended to an empty context."""
    packed, visible = [], 0
    for kind, rows in segments:
        gen = np.full(rows, kind == "vae")
        gen[[0, -1]] = False
        packed.append(Segment("causal" if kind == "text" else "full", gen, 0, visible, visible))
        visible += rows
    return build_plan(packed)


def training_plan() -> Plan:
    """A packed batch of 16,600 rows: an edit, a text-to-image pair, a question about a picture."""
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
"""Forwards of the model -> their plans. Together with decoding one token they are all that a request runs."""

DECODED_CONTEXTS = (1000, 9064)


def _linear(tensors: Tensors, T: int, G: int, K: int, N: int, epilogue: str):
    weights = [tensors(N, K, deviation=K**-0.5) for _ in range(2)]
    biases = [tensors(N) for _ in range(2)] if epilogue == "bias" else ()
    residual = tensors(T, N) if epilogue == "residual" else None
    return linear, (tensors(T, K), *weights, *biases), {"G": G, "residual": residual, "swiglu": epilogue == "swiglu"}


LINEARS = {  # K, N, epilogue
    "qkv": (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, "bias"),
    "o": (HEADS * HEAD_DIM, HIDDEN, "residual"),
    "gate_up": (HIDDEN, 2 * FEED_FORWARD, "swiglu"),
    "down": (FEED_FORWARD, HIDDEN, "residual"),
}


def _linears(forward: str, T: int, G: int) -> list[Workload]:
    return [_linear_workload(f"{name}, {forward}", T, G, *shape) for name, shape in LINEARS.items()]


def _linear_workload(name: str, T: int, G: int, K: int, N: int, epilogue: str, dtype=torch.bfloat16) -> Workload:
    experts = (G > 0) + (G < T)
    width = N // 2 if epilogue == "swiglu" else N * (2 if epilogue == "residual" else 1)
    traffic = dtype.itemsize * (experts * N * K + T * K + T * width)
    build = partial(_linear, T=T, G=G, K=K, N=N, epilogue=epilogue)
    return Workload(name, "linear", 2 * T * K * N, traffic, build, dtype)


def _rms_norm(tensors: Tensors, T: int, G: int, adds: bool = False, width: int = HIDDEN):
    weights = (tensors(width), tensors(width))
    return rms_norm, (tensors(T, width), tensors(T, width) if adds else None, *weights, G, EPS), {}


def _qk_norm_rope(tensors: Tensors, T: int, G: int, q_heads: int = HEADS, kv_heads: int = KV_HEADS):
    heads = q_heads + kv_heads
    qkv = tensors(T, (heads + kv_heads) * HEAD_DIM)
    norms = (tensors(heads, HEAD_DIM), tensors(heads, HEAD_DIM))
    tables = [tensors(T, HEAD_DIM // 2, dtype=torch.float32) for _ in range(2)]
    caches = [tensors(T, kv_heads, HEAD_DIM) for _ in range(2)]
    return qk_norm_rope, (qkv, *norms, *tables, tensors.of(np.arange(T)), *caches, G, EPS), {}


def _row_ops(forward: str, T: int, G: int) -> list[Workload]:
    """The linear layers and the memory-bound ops of a forward of T rows."""
    norms = [
        Workload(f"{name}, {forward}", "rms_norm", 0, moved * T * HIDDEN * 2, partial(_rms_norm, T=T, G=G, adds=adds))
        for name, moved, adds in (("rms_norm", 2, False), ("rms_norm with residual", 4, True))
    ]
    columns = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    traffic = T * (2 * columns * 2 + 2 * HEAD_DIM // 2 * 4 + 8)
    rope = Workload(f"qk_norm_rope, {forward}", "qk_norm_rope", 0, traffic, partial(_qk_norm_rope, T=T, G=G))
    return [*_linears(forward, T, G), *norms, rope]


def _attention_inputs(tensors: Tensors, plan: Plan, heads: int, kv_heads: int, head_dim: int):
    T, slots = len(plan.limits), int(plan.slots.max()) + 1
    caches = [tensors(slots, kv_heads, head_dim) for _ in range(2)]
    return tensors(T, heads, head_dim), *caches, tensors.of(plan.limits), tensors.of(plan.blocks)


def _attention(tensors: Tensors, make_plan, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, **options):
    return attention, _attention_inputs(tensors, make_plan(), heads, kv_heads, head_dim), options


def attention_gradients(q, k_cache, v_cache, limits, blocks, gradient):
    """``attention`` and its gradients: (out, dq, dk, dv), shaped like q, q, k_cache and v_cache."""
    inputs = [tensor.detach().requires_grad_() for tensor in (q, k_cache, v_cache)]
    out = attention(*inputs, limits, blocks)
    return (out.detach(), *torch.autograd.grad(out, inputs, gradient))


def _attention_gradients(tensors: Tensors, make_plan, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM):
    inputs = _attention_inputs(tensors, make_plan(), heads, kv_heads, head_dim)
    return attention_gradients, (*inputs, tensors(*inputs[0].shape)), {}


def visible_pairs(plan: Plan) -> int:
    """How many keys all rows of ``plan`` see together."""
    rows = plan.blocks[:, 1] - plan.blocks[:, 0]
    return int(plan.limits.sum(dtype=np.int64) + (rows * (plan.blocks[:, 6] - plan.blocks[:, 5])).sum(dtype=np.int64))


Heads = tuple[int, int, int]
"""Query heads, key/value heads, head_dim."""
BAGEL_HEADS, VIT = (HEADS, KV_HEADS, HEAD_DIM), (VIT_HEADS, VIT_HEADS, VIT_HEAD_DIM)


def _attention_workload(
    name: str, make_plan: Callable[[], Plan], shape: Heads = BAGEL_HEADS, dtype=torch.bfloat16, **options
) -> Workload:
    plan, (heads, kv_heads, head_dim) = make_plan(), shape
    T, slots = len(plan.limits), int(plan.slots.max()) + 1
    traffic = 2 * dtype.itemsize * head_dim * (T * heads + slots * kv_heads)
    traffic += 4 * T * heads * options.get("return_lse", False)
    build = partial(_attention, make_plan=make_plan, heads=heads, kv_heads=kv_heads, head_dim=head_dim, **options)
    return Workload(name, "attention", 4 * heads * head_dim * visible_pairs(plan), traffic, build, dtype)


def _gradients_workload(
    name: str, make_plan: Callable[[], Plan], shape: Heads = BAGEL_HEADS, dtype=torch.bfloat16
) -> Workload:
    """Products for each visible pair: 2 forward, 5 backward, reading q, k, v, out, dout, writing dq, dk, dv."""
    forward, (heads, kv_heads, head_dim) = _attention_workload(name, make_plan, shape, dtype), shape
    build = partial(_attention_gradients, make_plan=make_plan, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    return Workload(name, "attention_backward", forward.flops * 7 // 2, 3 * forward.bytes, build, dtype)


def _one_image() -> Plan:
    return build_plan([Segment("full", np.zeros(4900, bool), 0, 0, 0)])


def _attention_workloads() -> list[Workload]:
    return [
        *(_attention_workload(f"attention, {name}", make_plan) for name, make_plan in PLANS.items()),
        _attention_workload("attention, ViT 4900", _one_image, VIT),
        _attention_workload("attention, training 16k", training_plan),
        _attention_workload("attention with lse, training 16k", training_plan, return_lse=True),
        _gradients_workload("attention and gradients, training 16k", training_plan),
    ]


def _decode_attention(tensors: Tensors, length: int):
    caches = [tensors(length, KV_HEADS, HEAD_DIM) for _ in range(2)]
    spans = [tensors.of(np.array([value])) for value in (0, length)]
    return decode_attention, (tensors(1, HEADS, HEAD_DIM), *caches, *spans), {}


def _guided_step(tensors: Tensors, latents: int, renorm: str, image_scale: float, features: int = 64):
    state = tensors(latents, features, dtype=torch.float32)
    velocities = [tensors(latents, features) for _ in range(3 if image_scale > 1 else 2)]
    missing = [None] * (3 - len(velocities))
    return guided_step, (state, *velocities, *missing, 4.0, image_scale, renorm, 0.0, 0.02), {}


def _workloads() -> list[Workload]:
    found = []
    for name, make_plan in PLANS.items():
        plan = make_plan()
        found += _row_ops(name, len(plan.limits), plan.G)
    found += _row_ops("decode", 1, 0)
    found += _attention_workloads()
    for length in DECODED_CONTEXTS:
        flops, traffic = 4 * HEADS * HEAD_DIM * length, 4 * HEAD_DIM * (length * KV_HEADS + HEADS)
        build = partial(_decode_attention, length=length)
        found.append(Workload(f"decode_attention, {length} keys", "decode_attention", flops, traffic, build))
    for size, latents in ((1024, 4096), (512, 1024)):
        for renorm, image_scale in (("global", 1.0), ("channel", 1.0), ("text_channel", 2.0), ("global", 2.0)):
            branches = 3 if image_scale > 1 else 2
            traffic = latents * 64 * (8 + 2 * branches)
            name = f"guided_step {renorm} of {branches} branches, {size}"
            build = partial(_guided_step, latents=latents, renorm=renorm, image_scale=image_scale)
            found.append(Workload(name, "guided_step", 0, traffic, build))
    return found


WORKLOADS = _workloads()


def _other_sizes() -> list[Workload]:
    image, text = PLANS["text-to-image 512"], PLANS["text prefill 256"]
    norms = [
        Workload(
            f"rms_norm, width {width}", "rms_norm", 0, 4 * 4096 * width, partial(_rms_norm, T=4096, G=0, width=width)
        )
        for width in (896, 16384)
    ]
    heads, kv_heads = 64, 8
    rope_bytes = 2048 * ((heads + 2 * kv_heads) * HEAD_DIM * 4 + HEAD_DIM * 4 + 8)
    rope = partial(_qk_norm_rope, T=2048, G=1024, q_heads=heads, kv_heads=kv_heads)
    step = partial(_guided_step, latents=256, renorm="global", image_scale=1.0, features=16384)
    return [
        *norms,
        Workload("qk_norm_rope, 64 heads", "qk_norm_rope", 0, rope_bytes, rope),
        Workload("guided_step global, 16384 features", "guided_step", 0, 256 * 16384 * 12, step),
        _linear_workload("linear in float32", 256, 128, 1024, 1024, "bias", torch.float32),
        _linear_workload("linear of 3588 columns", 4096, 2048, 3588, 3584, "bias"),
        _attention_workload("attention, 14 heads of 64", image, (14, 2, 64)),
        _attention_workload("attention in float32", text, (4, 1, 128), torch.float32),
        _gradients_workload("attention and gradients, 14 heads of 64", image, (14, 2, 64)),
        _gradients_workload("attention and gradients, ViT 4900", _one_image, VIT),
        _gradients_workload("attention and gradients in float32", text, (4, 1, 128), torch.float32),
    ]


OTHER_SIZES = _other_sizes()
"""For the classes of shapes that BAGEL in bfloat16 does not reach: other models, other dtypes."""

ALL_WORKLOADS = WORKLOADS + OTHER_SIZES

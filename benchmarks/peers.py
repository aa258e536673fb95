"""What else computes the ops of rows: the official composition, torch's own kernels, Liger, vLLM-Omni.

A peer is made from the arguments of the op and returns a :class:`Contender`. Whatever a peer may do once per request
(permuting rows to its order, gathering or expanding K and V, building masks) is done when it is made and not timed, to
its advantage; what it has to do in every layer of every step is timed.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bagel_rt.kernels.guidance import RENORMS, guided_velocity_reference
from bagel_rt.kernels.linear import linear_reference
from bagel_rt.kernels.norm import rms_norm_reference
from bagel_rt.kernels.qk_norm_rope import qk_norm_rope_reference


class Contender(NamedTuple):
    """A prepared call.

    Attributes:
        run: what is timed.
        outputs: what ``run`` returned -> tensors in the order and layout of the op's; None if the work is not the same.
    """

    run: Callable[[], object]
    outputs: Callable[[object], tuple[torch.Tensor, ...]] | None


class Unsuitable(Exception):
    """The peer cannot do this call; the message says why."""


def compiled(function: Callable) -> Callable:
    """``torch.compile`` for fixed shapes."""
    return torch.compile(function, dynamic=False)


def one(result) -> tuple[torch.Tensor, ...]:
    return (result,)


# Rows as the official code has them: in the order of the sequence, with an index tensor per expert.


def sequence_positions(T: int, G: int, device) -> torch.Tensor:
    """Place of every packed row in a sequence: the first understanding row, generation rows, the other ones."""
    first = min(1, T - G)
    positions = torch.empty(T, dtype=torch.int64, device=device)
    positions[:G] = torch.arange(G, device=device) + first
    positions[G:] = torch.cat([torch.arange(first), torch.arange(G + first, T)]).to(device)
    return positions


class _Sequence:
    """Expert-major rows put into sequence order and back."""

    def __init__(self, x: torch.Tensor, G: int):
        positions = sequence_positions(x.shape[0], G, x.device)
        self.gen, self.und, self._positions = positions[:G].contiguous(), positions[G:].contiguous(), positions

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(rows).index_copy_(0, self._positions, rows)

    def packed(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[self._positions]

    def gathered(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of each expert."""
        return rows[self.gen], rows[self.und]

    def scattered(self, gen: torch.Tensor, und: torch.Tensor) -> torch.Tensor:
        """Each expert's rows at their places."""
        y = und.new_zeros(len(gen) + len(und), und.shape[1])
        y[self.und], y[self.gen] = und, gen
        return y

    def routed(self, rows: torch.Tensor, expert_gen: Callable, expert_und: Callable) -> torch.Tensor:
        """As the official layers route: gather an expert's rows, run it, scatter its results."""
        if not len(self.gen):
            return expert_und(rows)
        gen, und = self.gathered(rows)
        return self.scattered(expert_gen(gen), expert_und(und))


def is_down(x: torch.Tensor, w: torch.Tensor, residual: torch.Tensor | None) -> bool:
    """Whether a layer is the second one of a feed-forward network: it adds a residual narrower than its input."""
    return residual is not None and x.shape[1] > w.shape[0]


def official_linear(
    x, w_first, w_rest, bias_first=None, bias_rest=None, *, G, residual=None, swiglu=False, wrap=lambda f: f
):
    """Gather, ``nn.Linear``, scatter, add.

    Rows are gathered before a feed-forward network and scattered behind it: SwiGLU, two ``nn.Linear`` with SiLU and
    product between, has no scatter, and the layer behind it no gather.
    """
    sequence, down = _Sequence(x, G), is_down(x, w_first, residual)
    rows, added = sequence.of(x), None if residual is None else sequence.of(residual)
    parts = sequence.gathered(rows) if down and G else None
    weights = [(w[0::2].contiguous(), w[1::2].contiguous()) if swiglu else (w,) for w in (w_first, w_rest)]

    def expert(weights, bias):
        if swiglu:
            gate, up = weights
            return lambda part: F.silu(F.linear(part, gate)) * F.linear(part, up)
        return lambda part: F.linear(part, *weights, bias)

    expert_gen, expert_und = expert(weights[0], bias_first), expert(weights[1], bias_rest)

    def layer(rows, added):
        if swiglu and G:
            gen, und = sequence.gathered(rows)
            return expert_gen(gen), expert_und(und)
        y = sequence.routed(rows, expert_gen, expert_und)
        return y if added is None else added + y

    def second_layer(parts, added):
        return added + sequence.scattered(expert_gen(parts[0]), expert_und(parts[1]))

    if parts:
        layer, rows = second_layer, parts
    layer = wrap(layer)
    outputs = (lambda made: (torch.cat(made),)) if swiglu and G else (lambda y: (sequence.packed(y),))
    return Contender(lambda: layer(rows, added), outputs)


def one_product(x, w_first, w_rest, bias_first=None, bias_rest=None, *, G, residual=None, swiglu=False):
    """All rows times one expert's weight, and no epilogue but the bias: what cuBLAS alone would take."""
    w, bias = (w_first, bias_first) if G else (w_rest, bias_rest)
    return Contender(lambda: F.linear(x, w, bias), None)


def reference_linear(x, w_first, w_rest, bias_first=None, bias_rest=None, *, G, residual=None, swiglu=False):
    """cuBLAS on the two row ranges: the op's reference."""
    return Contender(lambda: linear_reference(x, w_first, w_rest, bias_first, bias_rest, residual, G, swiglu), one)


def liger_swiglu(x, w_first, w_rest, bias_first=None, bias_rest=None, *, G, residual=None, swiglu=False):
    """cuBLAS on the two row ranges, then Liger's kernel over [gate | up]."""
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_forward

    if not swiglu:
        raise Unsuitable("has no kernel for this epilogue")
    w_first, w_rest = (torch.cat([w[0::2], w[1::2]]) for w in (w_first, w_rest))

    def layer():
        product = linear_reference(x, w_first, w_rest, bias_first, bias_rest, None, G, False)
        return swiglu_fused_gate_up_forward(product)[1]

    return Contender(layer, one)


def vllm_omni_linear(x, w_first, w_rest, bias_first=None, bias_rest=None, *, G, residual=None, swiglu=False):
    """Its mixture GEMM in its default configuration, into what its layers allocate: zeros for q, k and v."""
    if swiglu or is_down(x, w_first, residual):
        raise Unsuitable("its mixture GEMM serves the attention projections only")
    gemm = vllm_omni_ops("mot_gemm").invoke_mot_gemm
    sequence = _Sequence(x, G)
    rows, added = sequence.of(x), None if residual is None else sequence.of(residual)
    allocate = torch.zeros if residual is None else torch.empty

    def layer():
        y = allocate(rows.shape[0], w_first.shape[0], dtype=x.dtype, device=x.device)
        gemm(rows, w_rest.t(), w_first.t(), y, bias_rest, bias_first, sequence.und, sequence.gen,
             None, None, None, False, False, False, False, False, False)  # fmt: skip
        return y if added is None else added + y

    return Contender(layer, lambda y: (sequence.packed(y),))


def official_rms_norm(x, residual, w_first, w_rest, G, eps, wrap=lambda f: f):
    """Add; gather, Qwen2RMSNorm, scatter."""
    sequence = _Sequence(x, G)
    rows, added = sequence.of(x), None if residual is None else sequence.of(residual)

    def norm(w):
        def run(part):
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
            return w * wide.to(part.dtype)

        return run

    def layer(rows, added):
        summed = rows if added is None else added + rows
        return sequence.routed(summed, norm(w_first), norm(w_rest)), summed

    layer = wrap(layer)
    return Contender(lambda: layer(rows, added), lambda made: tuple(map(sequence.packed, made)))


def reference_rms_norm(x, residual, w_first, w_rest, G, eps):
    """``F.rms_norm`` and two products by the weights: the op's reference."""
    return Contender(lambda: rms_norm_reference(x, residual, w_first, w_rest, G, eps), tuple)


def liger_rms_norm(x, residual, w_first, w_rest, G, eps):
    """One of Liger's kernels per expert."""
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward
    from liger_kernel.ops.rms_norm import rms_norm_forward

    parts = [(rows, w) for rows, w in ((slice(0, G), w_first), (slice(G, None), w_rest)) if len(x[rows])]

    def layer():
        if residual is None:
            made = [(rms_norm_forward(x[rows], w, eps, 0.0, "llama", None)[0], x[rows]) for rows, w in parts]
        else:
            made = [fused_add_rms_norm_forward(x[rows], residual[rows], w, eps, 0.0, "llama")[:2] for rows, w in parts]
        return made

    return Contender(layer, lambda made: tuple(torch.cat(tensors) for tensors in zip(*made, strict=True)))


def vllm_omni_rms_norm(x, residual, w_first, w_rest, G, eps):
    """Its mixture norm, after an addition where there is a residual."""
    norm = vllm_omni_ops("mot_rms_norm").mot_rms_norm
    sequence = _Sequence(x, G)
    rows, added = sequence.of(x), None if residual is None else sequence.of(residual)

    def layer():
        summed = rows if added is None else added + rows
        return norm(summed, w_rest, w_first, sequence.und, sequence.gen, eps=eps), summed

    return Contender(layer, lambda made: tuple(map(sequence.packed, made)))


def official_qk_norm_rope(
    qkv, norm_first, norm_rest, cos, sin, slots, k_cache, v_cache, G, eps, wrap=lambda f: f
):  # fmt: skip
    """Heads raised to float32; gather, norm, scatter; rotation by halves; keys and values written into new buffers."""
    sequence = _Sequence(qkv, G)
    S, kv_heads, D = k_cache.shape
    T, heads = qkv.shape[0], norm_first.shape[0]
    cos, sin = (sequence.of(torch.cat([table, table], 1)).unsqueeze(1) for table in (cos, sin))
    at, rows = sequence.of(slots), sequence.of(qkv)

    def norm(w):
        return lambda part: part * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + eps) * w

    def rotate(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def layer(rows):
        q, k, v = rows.view(T, heads + kv_heads, D).split((heads - kv_heads, kv_heads, kv_heads), 1)
        made = []
        for x, own in ((q, slice(0, heads - kv_heads)), (k, slice(heads - kv_heads, heads))):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            normed = torch.zeros_like(x)
            normed[sequence.und] = norm(norm_rest[own])(x[sequence.und])
            normed[sequence.gen] = norm(norm_first[own])(x[sequence.gen])
            made.append(rotate(normed).to(rows.dtype))
        keys, values = rows.new_zeros(S, kv_heads, D), rows.new_zeros(S, kv_heads, D)
        keys[at], values[at] = made[1], v
        return made[0], keys, values

    layer = wrap(layer)
    return Contender(lambda: layer(rows), lambda made: (sequence.packed(made[0]), *made[1:]))


def reference_qk_norm_rope(qkv, norm_first, norm_rest, cos, sin, slots, k_cache, v_cache, G, eps):
    """The op's reference."""
    caches = k_cache.clone(), v_cache.clone()
    inputs = (qkv, norm_first, norm_rest, cos, sin, slots, *caches, G, eps)
    return Contender(lambda: qk_norm_rope_reference(*inputs), lambda q: (q, *caches))


def official_group_norm(x, weight, bias, groups, eps, silu, wrap=lambda f: f):
    """torch's GroupNorm, then SiLU, for a map as it is laid out."""

    def norm(x):
        y = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(y) if silu else y

    norm = wrap(norm)
    return Contender(lambda: norm(x), one)


def channels_first_group_norm(x, weight, bias, groups, eps, silu):
    """The same for a map with its channels apart, as the official autoencoder has them."""
    return official_group_norm(x.contiguous(), weight, bias, groups, eps, silu)


def official_guided_step(x, v, image_table, cfg_table, max_rows, guided=True, wrap=lambda f: f):
    """The formula in about ten operators an image; the host knows where images lie and what guides them."""
    calls = []
    for (first, rows, *branches), values in zip(image_table.tolist(), cfg_table.tolist(), strict=True):
        dt, text_scale, image_scale, smallest, renorm = values
        scales = (text_scale, image_scale) if guided else (1.0, 1.0)
        velocities = [v[branch : branch + rows] for branch in branches]
        calls.append((x[first : first + rows], *velocities, *scales, RENORMS[int(renorm)], smallest, dt))

    def step(x, cond, no_text, no_img, text_scale, image_scale, renorm, smallest, dt):
        return x - guided_velocity_reference(cond, no_text, no_img, text_scale, image_scale, renorm, smallest) * dt

    step = wrap(step)
    return Contender(lambda: [step(*call) for call in calls], lambda made: (torch.cat(made),))


def vllm_omni_ops(name: str) -> ModuleType:
    """A module of its ``mot/ops``, loaded from its file: the package itself needs all of vLLM.

    Raises:
        Unsuitable: it is not installed.
    """
    found = importlib.util.find_spec("vllm_omni")
    if found is None or not found.submodule_search_locations:
        raise Unsuitable("vllm-omni is not installed")
    path = Path(found.submodule_search_locations[0]) / "diffusion/models/bagel/mot/ops" / f"{name}.py"
    absent = [module for module in ("vllm", "vllm.triton_utils") if importlib.util.find_spec("vllm") is None]
    try:
        for module in absent:  # of vLLM these files want Triton only
            sys.modules[module] = ModuleType(module)
        if absent:
            import triton

            sys.modules["vllm.triton_utils"].triton, sys.modules["vllm.triton_utils"].tl = triton, triton.language
        spec = importlib.util.spec_from_file_location(f"vllm_omni_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        for name in absent:
            del sys.modules[name]

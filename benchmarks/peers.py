"""Peers of the row ops: the official composition, PyTorch kernels, Liger and vLLM-Omni.

Each function takes the arguments of the op and returns a :class:`PreparedCall`. Work that a peer needs only once per
request (permuting rows, gathering or expanding K and V, building masks) is done here and not timed, in the peer's
favor. Work that it repeats in every layer of every step is timed.
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


class PreparedCall(NamedTuple):
    """A call that is ready to be timed.

    Attributes:
        run: the timed function.
        outputs: converts the result of ``run`` to tensors in the order and layout of the op's outputs; None if ``run``
            computes only part of the op.
    """

    run: Callable[[], object]
    outputs: Callable[[object], tuple[torch.Tensor, ...]] | None


class Unsupported(Exception):
    """The peer does not support these arguments; the message is the reason."""


def torch_compile(function: Callable) -> Callable:
    """``torch.compile`` for fixed shapes."""
    return torch.compile(function, dynamic=False)


def as_tuple(result) -> tuple[torch.Tensor, ...]:
    return (result,)


# The official code keeps rows in sequence order and selects the rows of each expert with an index tensor.


def sequence_positions(T: int, G: int, device) -> torch.Tensor:
    """Sequence position of each packed row; the sequence is one understanding row, the generation rows, the rest."""
    first = min(1, T - G)
    positions = torch.empty(T, dtype=torch.int64, device=device)
    positions[:G] = torch.arange(G, device=device) + first
    positions[G:] = torch.cat([torch.arange(first), torch.arange(G + first, T)]).to(device)
    return positions


class _Sequence:
    """Conversion between packed (expert-major) and sequence order, and routing of rows to experts."""

    def __init__(self, x: torch.Tensor, G: int):
        positions = sequence_positions(x.shape[0], G, x.device)
        self.gen, self.und, self._positions = positions[:G].contiguous(), positions[G:].contiguous(), positions

    def to_sequence(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(rows).index_copy_(0, self._positions, rows)

    def to_packed(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[self._positions]

    def gather(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the generation and of the understanding expert."""
        return rows[self.gen], rows[self.und]

    def scatter(self, gen: torch.Tensor, und: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`gather`."""
        y = und.new_zeros(len(gen) + len(und), und.shape[1])
        y[self.und], y[self.gen] = und, gen
        return y

    def route(self, rows: torch.Tensor, expert_gen: Callable, expert_und: Callable) -> torch.Tensor:
        """Gather each expert's rows, run the expert, scatter the results, as the official layers do."""
        if not len(self.gen):
            return expert_und(rows)
        gen, und = self.gather(rows)
        return self.scatter(expert_gen(gen), expert_und(und))


def is_down_projection(x: torch.Tensor, w: torch.Tensor, residual: torch.Tensor | None) -> bool:
    """Whether a linear layer is an MLP's down projection: its residual is narrower than its input."""
    return residual is not None and x.shape[1] > w.shape[0]


def official_linear(
    x, w_first, w_rest, bias_first=None, bias_rest=None, *, G, residual=None, swiglu=False, wrap=lambda f: f
):
    """Gather, ``nn.Linear``, scatter, add.

    The official code gathers rows before an MLP and scatters them after it. Gate and up (two ``nn.Linear``, SiLU and
    product) therefore have no scatter, and the down projection has no gather.
    """
    sequence, down = _Sequence(x, G), is_down_projection(x, w_first, residual)
    rows, added = sequence.to_sequence(x), None if residual is None else sequence.to_sequence(residual)
    parts = sequence.gather(rows) if down and G else None
    weights = [(w[0::2].contiguous(), w[1::2].contiguous()) if swiglu else (w,) for w in (w_first, w_rest)]

    def expert(weights, bias):
        if swiglu:
            gate, up = weights
            return lambda part: F.silu(F.linear(part, gate)) * F.linear(part, up)
        return lambda part: F.linear(part, *weights, bias)

    expert_gen, expert_und = expert(weights[0], bias_first), expert(weights[1], bias_rest)

    def layer(rows, added):
        if swiglu and G:
            gen, und = sequence.gather(rows)
            return expert_gen(gen), expert_und(und)
        y = sequence.route(rows, expert_gen, expert_und)
        return y if added is None else added + y

    def down_layer(parts, added):
        return added + sequence.scatter(expert_gen(parts[0]), expert_und(parts[1]))

    if parts:
        layer, rows = down_layer, parts
    layer = wrap(layer)
    outputs = (lambda parts: (torch.cat(parts),)) if swiglu and G else (lambda y: (sequence.to_packed(y),))
    return PreparedCall(lambda: layer(rows, added), outputs)


def cublas_gemm(x, w_first, w_rest, bias_first=None, bias_rest=None, *, G, residual=None, swiglu=False):
    """One cuBLAS GEMM of all rows with one expert's weight and bias, without routing or other epilogues."""
    w, bias = (w_first, bias_first) if G else (w_rest, bias_rest)
    return PreparedCall(lambda: F.linear(x, w, bias), None)


def reference_linear(x, w_first, w_rest, bias_first=None, bias_rest=None, *, G, residual=None, swiglu=False):
    """The op's reference: cuBLAS on each expert's row range."""
    return PreparedCall(
        lambda: linear_reference(x, w_first, w_rest, bias_first, bias_rest, residual, G, swiglu), as_tuple
    )


def liger_swiglu(x, w_first, w_rest, bias_first=None, bias_rest=None, *, G, residual=None, swiglu=False):
    """cuBLAS on each expert's row range, then Liger's SwiGLU kernel over [gate | up]."""
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_forward

    if not swiglu:
        raise Unsupported("has no kernel for this epilogue")
    w_first, w_rest = (torch.cat([w[0::2], w[1::2]]) for w in (w_first, w_rest))

    def layer():
        product = linear_reference(x, w_first, w_rest, bias_first, bias_rest, None, G, False)
        return swiglu_fused_gate_up_forward(product)[1]

    return PreparedCall(layer, as_tuple)


def vllm_omni_linear(x, w_first, w_rest, bias_first=None, bias_rest=None, *, G, residual=None, swiglu=False):
    """vLLM-Omni's mixture GEMM in its default configuration, allocating outputs as its layers do."""
    if swiglu or is_down_projection(x, w_first, residual):
        raise Unsupported("the mixture GEMM supports only the attention projections")
    gemm = vllm_omni_ops("mot_gemm").invoke_mot_gemm
    sequence = _Sequence(x, G)
    rows, added = sequence.to_sequence(x), None if residual is None else sequence.to_sequence(residual)
    allocate = torch.zeros if residual is None else torch.empty  # its qkv layer zeroes the output

    def layer():
        y = allocate(rows.shape[0], w_first.shape[0], dtype=x.dtype, device=x.device)
        gemm(rows, w_rest.t(), w_first.t(), y, bias_rest, bias_first, sequence.und, sequence.gen,
             None, None, None, False, False, False, False, False, False)  # fmt: skip
        return y if added is None else added + y

    return PreparedCall(layer, lambda y: (sequence.to_packed(y),))


def official_rms_norm(x, residual, w_first, w_rest, G, eps, wrap=lambda f: f):
    """Add the residual, gather, Qwen2RMSNorm, scatter."""
    sequence = _Sequence(x, G)
    rows, added = sequence.to_sequence(x), None if residual is None else sequence.to_sequence(residual)

    def norm(w):
        def run(part):
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
            return w * wide.to(part.dtype)

        return run

    def layer(rows, added):
        summed = rows if added is None else added + rows
        return sequence.route(summed, norm(w_first), norm(w_rest)), summed

    layer = wrap(layer)
    return PreparedCall(lambda: layer(rows, added), lambda result: tuple(map(sequence.to_packed, result)))


def reference_rms_norm(x, residual, w_first, w_rest, G, eps):
    """The op's reference: ``F.rms_norm``, then a multiplication with each expert's weight."""
    return PreparedCall(lambda: rms_norm_reference(x, residual, w_first, w_rest, G, eps), tuple)


def liger_rms_norm(x, residual, w_first, w_rest, G, eps):
    """One of Liger's kernels per expert."""
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward
    from liger_kernel.ops.rms_norm import rms_norm_forward

    parts = [(rows, w) for rows, w in ((slice(0, G), w_first), (slice(G, None), w_rest)) if len(x[rows])]

    def layer():
        if residual is None:
            parts_out = [(rms_norm_forward(x[rows], w, eps, 0.0, "llama", None)[0], x[rows]) for rows, w in parts]
        else:
            parts_out = [
                fused_add_rms_norm_forward(x[rows], residual[rows], w, eps, 0.0, "llama")[:2] for rows, w in parts
            ]
        return parts_out

    return PreparedCall(layer, lambda result: tuple(map(torch.cat, zip(*result, strict=True))))


def vllm_omni_rms_norm(x, residual, w_first, w_rest, G, eps):
    """vLLM-Omni's mixture norm, after adding the residual if there is one."""
    norm = vllm_omni_ops("mot_rms_norm").mot_rms_norm
    sequence = _Sequence(x, G)
    rows, added = sequence.to_sequence(x), None if residual is None else sequence.to_sequence(residual)

    def layer():
        summed = rows if added is None else added + rows
        return norm(summed, w_rest, w_first, sequence.und, sequence.gen, eps=eps), summed

    return PreparedCall(layer, lambda result: tuple(map(sequence.to_packed, result)))


def official_qk_norm_rope(
    qkv, norm_first, norm_rest, cos, sin, slots, k_cache, v_cache, G, eps, wrap=lambda f: f
):  # fmt: skip
    """Cast to float32; gather, norm, scatter; half-split RoPE; write keys and values into new buffers."""
    sequence = _Sequence(qkv, G)
    S, kv_heads, D = k_cache.shape
    T, heads = qkv.shape[0], norm_first.shape[0]
    cos, sin = (sequence.to_sequence(torch.cat([table, table], 1)).unsqueeze(1) for table in (cos, sin))
    slot_index, rows = sequence.to_sequence(slots), sequence.to_sequence(qkv)

    def norm(w):
        return lambda part: part * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + eps) * w

    def rotate(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def layer(rows):
        q, k, v = rows.view(T, heads + kv_heads, D).split((heads - kv_heads, kv_heads, kv_heads), 1)
        rotated = []
        for x, heads_of in ((q, slice(0, heads - kv_heads)), (k, slice(heads - kv_heads, heads))):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            normed = torch.zeros_like(x)
            normed[sequence.und] = norm(norm_rest[heads_of])(x[sequence.und])
            normed[sequence.gen] = norm(norm_first[heads_of])(x[sequence.gen])
            rotated.append(rotate(normed).to(rows.dtype))
        keys, values = rows.new_zeros(S, kv_heads, D), rows.new_zeros(S, kv_heads, D)
        keys[slot_index], values[slot_index] = rotated[1], v
        return rotated[0], keys, values

    layer = wrap(layer)
    return PreparedCall(lambda: layer(rows), lambda result: (sequence.to_packed(result[0]), *result[1:]))


def reference_qk_norm_rope(qkv, norm_first, norm_rest, cos, sin, slots, k_cache, v_cache, G, eps):
    """The op's reference."""
    caches = k_cache.clone(), v_cache.clone()
    inputs = (qkv, norm_first, norm_rest, cos, sin, slots, *caches, G, eps)
    return PreparedCall(lambda: qk_norm_rope_reference(*inputs), lambda q: (q, *caches))


def official_group_norm(x, weight, bias, groups, eps, silu, wrap=lambda f: f):
    """``F.group_norm``, then SiLU, on the channels-last input as it is."""

    def norm(x):
        y = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(y) if silu else y

    norm = wrap(norm)
    return PreparedCall(lambda: norm(x), as_tuple)


def channels_first_group_norm(x, weight, bias, groups, eps, silu):
    """:func:`official_group_norm` on a channels-first (NCHW) input, the layout of the official autoencoder."""
    return official_group_norm(x.contiguous(), weight, bias, groups, eps, silu)


def official_cfg_euler_step(x, v, image_table, cfg_table, max_rows, guided=True, wrap=lambda f: f):
    """The formula in about ten operators per image. The tables are read on the host beforehand."""
    calls = []
    for (first, rows, *branches), scalars in zip(image_table.tolist(), cfg_table.tolist(), strict=True):
        dt, text_scale, image_scale, renorm_min, renorm = scalars
        scales = (text_scale, image_scale) if guided else (1.0, 1.0)
        velocities = [v[branch : branch + rows] for branch in branches]
        calls.append((x[first : first + rows], *velocities, *scales, RENORMS[int(renorm)], renorm_min, dt))

    def step(x, cond, no_text, no_img, text_scale, image_scale, renorm, renorm_min, dt):
        return x - guided_velocity_reference(cond, no_text, no_img, text_scale, image_scale, renorm, renorm_min) * dt

    step = wrap(step)
    return PreparedCall(lambda: [step(*call) for call in calls], lambda result: (torch.cat(result),))


def vllm_omni_ops(name: str) -> ModuleType:
    """Load a module of vLLM-Omni's ``mot/ops`` from its file; importing the package would require all of vLLM.

    Raises:
        Unsupported: vLLM-Omni is not installed.
    """
    package = importlib.util.find_spec("vllm_omni")
    if package is None or not package.submodule_search_locations:
        raise Unsupported("vllm-omni is not installed")
    path = Path(package.submodule_search_locations[0]) / "diffusion/models/bagel/mot/ops" / f"{name}.py"
    absent = [module for module in ("vllm", "vllm.triton_utils") if importlib.util.find_spec("vllm") is None]
    try:
        for module in absent:  # stub vLLM: these files import only Triton from it
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

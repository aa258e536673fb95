import pytest
import torch

from bagel_rt.kernels import qk_norm_rope
from bagel_rt.kernels.backend import runs_kernel

SHAPES = [
    pytest.param(T, G, Hq, Hkv, D, id=f"{T}rows-{G}gen-heads{Hq}+{Hkv}-d{D}")
    for T, G, Hq, Hkv, D in [
        (0, 0, 4, 2, 16), (1, 0, 4, 2, 16), (1, 1, 4, 2, 16), (3, 2, 1, 1, 2), (5, 5, 7, 1, 72), (9, 0, 28, 4, 128),
        (37, 20, 6, 3, 40), (4, 1, 32, 32, 128),
    ]
]  # fmt: skip
# One rounding: half a unit in the last place, relative; the absolute part is float32's own.
TOLERANCE = {
    torch.float64: dict(rtol=1e-13, atol=1e-13),
    torch.float32: dict(rtol=1e-6, atol=2e-6),
    torch.float16: dict(rtol=2**-11, atol=2e-6),
    torch.bfloat16: dict(rtol=2**-8, atol=2e-6),
}
EPS = 1e-6


def values(seed, *shape, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


def arguments(T, Hq, Hkv, D, dtype, device="cpu", S=64):
    """qkv, norm_first, norm_rest, cos, sin, slots, k_cache, v_cache; the caches are filled with 7."""
    angle = values(4, T, D // 2, device=device) * 3
    wide = torch.promote_types(dtype, torch.float32)
    slots = torch.randperm(S, generator=torch.Generator().manual_seed(5))[:T].to(device)
    caches = (torch.full((S, Hkv, D), 7.0, dtype=dtype, device=device) for _ in range(2))
    norms = (values(seed, Hq + Hkv, D, device=device).to(dtype) for seed in (2, 3))
    qkv = values(1, T, (Hq + 2 * Hkv) * D, device=device).to(dtype)
    return qkv, *norms, angle.cos().to(wide), angle.sin().to(wide), slots, *caches


def by_the_book(qkv, norm_first, norm_rest, cos, sin, Hkv, G):
    """(q, k, v) in float64; RoPE as multiplication by exp(i angle) of a + i b, (a, b) the halves of a head."""
    D = 2 * cos.shape[1]
    heads = qkv.shape[1] // D - Hkv
    x = qkv.double().unflatten(1, (heads + Hkv, D))
    qk, v = x[:, :heads], x[:, heads:]
    first = (torch.arange(len(qkv), device=qkv.device) < G)[:, None, None]
    if norm_first is not None and norm_first.dim() == 3:
        weight, bias = torch.where(first[None], norm_first.double()[:, None], norm_rest.double()[:, None])
        centered = qk - qk.mean(-1, keepdim=True)
        qk = centered / (centered.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight + bias
    elif norm_first is not None:
        qk = qk / (qk.pow(2).sum(-1, keepdim=True) / D + EPS).sqrt()
        qk = qk * torch.where(first, norm_first.double(), norm_rest.double())
    turned = torch.complex(qk[..., : D // 2], qk[..., D // 2 :]) * torch.complex(cos.double(), sin.double())[:, None]
    qk = torch.cat([turned.real, turned.imag], -1)
    return qk[:, : heads - Hkv], qk[:, heads - Hkv :], v


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T, G, Hq, Hkv, D", SHAPES)
def test_matches_the_formula_in_float64_and_rounds_once(T, G, Hq, Hkv, D, dtype, device):
    args = arguments(T, Hq, Hkv, D, dtype, device)
    *inputs, slots, k_cache, v_cache = args
    before = [t.clone() for t in args[:6]]
    q = qk_norm_rope(*args, G, EPS)
    want_q, want_k, want_v = by_the_book(*inputs, Hkv, G)
    assert q.dtype == dtype and q.shape == (T, Hq, D) and q.is_contiguous()
    torch.testing.assert_close(q.double(), want_q, **TOLERANCE[dtype])
    torch.testing.assert_close(k_cache[slots].double(), want_k, **TOLERANCE[dtype])
    assert torch.equal(v_cache[slots].double(), want_v)
    assert all(map(torch.equal, args[:6], before)), "an input was written to"


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_qk_norm_is_optional(dtype, device):
    qkv, _, _, *others = arguments(5, 7, 1, 72, dtype, device)
    _, _, slots, k_cache, v_cache = others
    q = qk_norm_rope(qkv, None, None, *others, None, EPS)
    want_q, want_k, want_v = by_the_book(qkv, None, None, *others[:2], 1, 5)
    torch.testing.assert_close(q.double(), want_q, **TOLERANCE[dtype])
    torch.testing.assert_close(k_cache[slots].double(), want_k, **TOLERANCE[dtype])
    assert torch.equal(v_cache[slots].double(), want_v)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T, G, Hq, Hkv, D", [(1, 0, 4, 2, 16), (5, 5, 7, 1, 72), (6, 2, 3, 2, 40)])
def test_layer_norm_with_bias_per_head(T, G, Hq, Hkv, D, dtype, device):
    qkv, _, _, *others = arguments(T, Hq, Hkv, D, dtype, device)
    _, _, slots, k_cache, _ = others
    qkv += 3  # a mean that only LayerNorm takes away
    norms = [values(seed, 2, Hq + Hkv, D, device=device).to(dtype) for seed in (6, 7)]
    q = qk_norm_rope(qkv, *norms, *others, G, EPS)
    want_q, want_k, _ = by_the_book(qkv, *norms, *others[:2], Hkv, G)
    tolerance = TOLERANCE[dtype] if dtype != torch.float32 else dict(rtol=2e-6, atol=5e-6)
    torch.testing.assert_close(q.double(), want_q, **tolerance)
    torch.testing.assert_close(k_cache[slots].double(), want_k, **tolerance)


def test_gradient_of_layer_norm_by_finite_differences():
    qkv, _, _, cos, sin, slots, k_cache, v_cache = arguments(4, 3, 1, 8, torch.float64, S=6)
    norms = [values(seed, 2, 4, 8) for seed in (6, 7)]

    def run(qkv, first, rest):
        k, v = k_cache.clone(), v_cache.clone()
        q = qk_norm_rope(qkv, first, rest, cos, sin, slots, k, v, 2, EPS)
        return q, k

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in (qkv, *norms)])


def test_one_norm_serves_all_rows(device):
    args, same = (list(arguments(5, 4, 2, 16, torch.float32, device)) for _ in range(2))
    same[2] = same[1]
    assert torch.equal(qk_norm_rope(*args[:2], None, *args[3:], None, EPS), qk_norm_rope(*same, 2, EPS))
    assert torch.equal(args[6], same[6])


def test_other_slots_are_unchanged(device):
    args = arguments(5, 4, 2, 16, torch.float32, device)
    *_, slots, k_cache, v_cache = args
    qk_norm_rope(*args, 2, EPS)
    untouched = torch.ones(64, dtype=torch.bool, device=device).index_fill(0, slots, False)
    assert (k_cache[untouched] == 7).all() and (v_cache[untouched] == 7).all()


@pytest.mark.parametrize("D", [16, 40, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_around_a_cache_slice_is_unchanged(dtype, D, device):
    args = arguments(5, 6, 3, D, dtype, device)
    *inputs, slots, _, _ = args
    by_slot = torch.full((66, 5, D + 2), 7.0, dtype=dtype, device=device)
    by_head = torch.full((5, 66, D), 7.0, dtype=dtype, device=device)
    views = by_slot[1:65, 1:4, 1:-1], by_head[1:4, 1:65].transpose(0, 1)
    for caches in (views, views[::-1]):
        qk_norm_rope(*inputs, slots, *caches, 2, EPS)
        for cache, expected in zip(caches, by_the_book(*inputs, 3, 2)[1:], strict=True):
            torch.testing.assert_close(cache[slots].double(), expected, **TOLERANCE[dtype])
            cache[slots] = 7
        assert (by_slot == 7).all() and (by_head == 7).all()


def test_eps_dominates_near_zero(device):
    args = arguments(4, 4, 2, 16, torch.float32, device)
    args[0].mul_(1e-3)
    args[0][1].zero_()
    q = qk_norm_rope(*args, 2, EPS)
    torch.testing.assert_close(q.double(), by_the_book(*args[:5], 2, 2)[0], **TOLERANCE[torch.float32])
    assert (q[1] == 0).all()


@pytest.mark.parametrize("dtype, magnitude", [(torch.float16, 3e4), (torch.bfloat16, 1e17)])
def test_squares_are_not_taken_in_half_precision(dtype, magnitude, device):
    args = arguments(4, 4, 2, 16, dtype, device)
    args[0].sign_().mul_(magnitude)
    q = qk_norm_rope(*args, 2, EPS)
    torch.testing.assert_close(q.double(), by_the_book(*args[:5], 2, 2)[0], **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_scores_depend_on_relative_positions_only(dtype, error, device):
    D, query, key = 32, values(1, 32, device=device), values(2, 32, device=device)
    frequency = 100.0 ** (-torch.arange(D // 2, dtype=torch.float64) / (D // 2))
    qkv, ones = torch.cat([query, key, key]).to(dtype).expand(2, -1), torch.ones(2, D, dtype=dtype, device=device)
    slots, scores = torch.tensor([0, 1], device=device), []
    for positions in ([3, 1], [1003, 1001]):
        angle = torch.tensor(positions)[:, None] * frequency
        cos, sin = angle.cos().to(device, dtype), angle.sin().to(device, dtype)
        k_cache, v_cache = torch.zeros(2, 2, 1, D, dtype=dtype, device=device)
        q = qk_norm_rope(qkv, ones, ones, cos, sin, slots, k_cache, v_cache, 0, EPS)
        scores.append(q[0, 0] @ k_cache[1, 0])
    assert scores[0].abs() > 1
    torch.testing.assert_close(scores[0], scores[1], rtol=error, atol=error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accepts_strided_inputs_and_caches(dtype, device):
    args = arguments(6, 4, 2, 16, dtype, device)
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in args]
    q, strided_q = qk_norm_rope(*args, 2, EPS), qk_norm_rope(*strided, 2, EPS)
    assert torch.equal(q, strided_q) and strided_q.is_contiguous()
    assert torch.equal(args[6], strided[6]) and torch.equal(args[7], strided[7])


def test_accepts_qkv_as_columns_of_a_wider_tensor(device):
    args = arguments(6, 4, 2, 16, torch.float32, device)
    wide = torch.full((6, 160), float("nan"), device=device)
    columns = wide[:, 16:144].copy_(args[0])
    assert torch.equal(qk_norm_rope(columns, *args[1:], 2, EPS), qk_norm_rope(*args, 2, EPS))


def test_accepts_float32_tables_with_float64_rows(device):
    args = arguments(6, 4, 2, 16, torch.float64, device)
    args = (*args[:3], args[3].float(), args[4].float(), *args[5:])
    q = qk_norm_rope(*args, 2, EPS)
    torch.testing.assert_close(q, by_the_book(*args[:5], 2, 2)[0], **TOLERANCE[torch.float64])


@pytest.mark.parametrize("wrong", [-1, 8], ids=["before", "past"])
def test_slot_outside_the_cache_is_rejected_or_not_written(wrong, device):
    *inputs, slots, _, _ = arguments(3, 4, 2, 16, torch.float32, device, S=8)
    slots[1] = wrong
    buffers = torch.full((2, 10, 2, 16), 7.0, device=device)
    caches = buffers[:, 1:9]
    if not runs_kernel(inputs[0]):
        with pytest.raises(IndexError):
            qk_norm_rope(*inputs, slots, *caches, 1, EPS)
        return
    q = qk_norm_rope(*inputs, slots, *caches, 1, EPS)
    want_q, want_k, want_v = by_the_book(*inputs, 2, 1)
    torch.testing.assert_close(q.double(), want_q, **TOLERANCE[torch.float32])
    torch.testing.assert_close(caches[0][slots[::2]].double(), want_k[::2], **TOLERANCE[torch.float32])
    assert torch.equal(caches[1][slots[::2]].double(), want_v[::2])
    caches[:, slots[::2]] = 7
    assert (buffers == 7).all()


WRONG = {
    "more-gen-than-rows": ({"G": 4}, "G must be from 0 to 3, the rows of qkv, got 4"),
    "odd-head-dim": (
        {"k_cache": torch.zeros(8, 2, 15), "v_cache": torch.zeros(8, 2, 15)},
        "head_dim must be positive and even, got 15",
    ),
    "qkv-of-half-a-head": ({"qkv": torch.zeros(3, 120)}, r"qkv must have \(Hq \+ 2\*2\) \* 16 columns.*got 120"),
    "qkv-without-queries": ({"qkv": torch.zeros(3, 64)}, "columns with Hq >= 1, got 64"),
    "one-norm-for-all-heads": ({"norm_first": torch.zeros(16)}, r"norm_first must be \(6, 16\).*got \(16,\) t"),
    "float64-norm": ({"norm_rest": torch.zeros(6, 16).double()}, "norm_rest must be .*got .*float64"),
    "full-width-cos": ({"cos": torch.zeros(3, 16)}, r"cos must be \(3, 8\).*got \(3, 16\) torch.float32"),
    "rounded-sin": ({"sin": torch.zeros(3, 8).bfloat16()}, "sin must be .* torch.float32.*got .* torch.bfloat16"),
    "int32-slots": ({"slots": torch.zeros(3, dtype=torch.int32)}, r"slots must be .*int64.*got \(3,\) torch.int32"),
    "v-cache-of-other-heads": ({"v_cache": torch.zeros(8, 4, 16)}, r"v_cache must be .*got \(8, 4, 16\)"),
    "k-cache-of-other-dtype": ({"k_cache": torch.zeros(8, 2, 16).half()}, "k_cache must be .*got .*float16"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_rejects_mismatched_argument(change, message):
    names = ("qkv", "norm_first", "norm_rest", "cos", "sin", "slots", "k_cache", "v_cache")
    inputs = dict(zip(names, arguments(3, 4, 2, 16, torch.float32, S=8), strict=True), G=1, eps=EPS)
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**(inputs | change))

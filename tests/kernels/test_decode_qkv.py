import pytest
import torch
import torch.nn.functional as F

from bagel_rt.kernels import decode_qkv, extension, qk_norm_rope
from bagel_rt.kernels.decode_qkv import decode_qkv_reference

EPS = 1e-6
# Of the roundings of the normalised row, of qkv and of the result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SLOTS = 24
SHAPES = {
    "one-head-of-one-block": (1, 8, 1, 1, 16),
    "more-blocks-than-run-at-once": (1, 264, 7, 1, 32),
    "two-rows": (2, 72, 4, 2, 48),
    "three-rows-of-the-model's-heads": (3, 136, 7, 1, 128),
    "eight-rows": (8, 1096, 2, 2, 64),
    "the-widest-heads": (5, 64, 2, 1, 128),
}


def arguments(B, H, Hq, Hkv, D, dtype=torch.bfloat16, device="cpu"):
    """Arguments of decode_qkv without eps; the caches are filled with 7."""
    generator = torch.Generator().manual_seed(B * 1000 + H + D)

    def values(*shape, deviation=1.0, dtype=dtype):
        return (torch.randn(*shape, generator=generator) * deviation).to(device, dtype)

    rows = (Hq + 2 * Hkv) * D
    angles = values(B, D // 2, deviation=3, dtype=torch.float32)
    slots = torch.randperm(SLOTS, generator=generator)[:B].to(device)
    caches = (torch.full((SLOTS, Hkv, D), 7.0, dtype=dtype, device=device) for _ in range(2))
    x, norm, w, bias = values(B, H, deviation=3), values(H), values(rows, H, deviation=H**-0.5), values(rows)
    return x, norm, w, bias, values(Hq + Hkv, D), angles.cos(), angles.sin(), slots, *caches


def wide(tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def assert_close(got, want, dtype):
    scale = want.abs() + want.square().mean(-1, keepdim=True).sqrt()
    assert got.dtype == dtype and ((got.double() - want).abs() <= TOLERANCE[dtype] * scale).all()


def check(given):
    """Compare q and the caches with the formula in float64; other slots must be unchanged. Return q."""
    slots = given[7]
    expected = [None if tensor is None else tensor.clone() for tensor in wide(given)]
    q = decode_qkv(*given, EPS)
    want = decode_qkv_reference(*expected, EPS)
    assert q.is_contiguous()
    assert_close(q, want, given[0].dtype)
    for cache, other in zip(given[-2:], expected[-2:], strict=True):
        assert_close(cache[slots], other[slots], given[0].dtype)
        others = torch.ones(len(cache), dtype=torch.bool, device=cache.device).index_fill(0, slots, False)
        assert (cache[others] == 7).all()
    return q


@pytest.mark.parametrize("dtype", extension.DTYPES)
@pytest.mark.parametrize("B, H, Hq, Hkv, D", SHAPES.values(), ids=SHAPES)
def test_matches_float64(extension_device, launches, B, H, Hq, Hkv, D, dtype):
    seen = launches("decode_qkv")
    given = arguments(B, H, Hq, Hkv, D, dtype, extension_device)
    check(given)
    assert seen == ["decode_qkv"]
    assert (extension.counters(given[0], 1) == 0).all(), "the next launch finds the counters used"


def test_repeated_launches_reuse_counters(extension_device):
    for seed in range(3):
        given = arguments(2, 72 + 8 * seed, 4, 2, 32, device=extension_device)
        check(given)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", extension.DTYPES)
def test_row_is_bitwise_independent_of_the_batch(extension_device, dtype):
    given = arguments(8, 1048, 2, 1, 64, dtype, extension_device)
    x, norm, w, bias, qk_norm, cos, sin, slots, k_cache, v_cache = given

    def run(rows):
        caches = k_cache.clone(), v_cache.clone()
        q = decode_qkv(x[rows], norm, w, bias, qk_norm, cos[rows], sin[rows], slots[rows], *caches, EPS)
        return q, *(cache[slots[rows]] for cache in caches)

    alone = [run(slice(b, b + 1)) for b in range(8)]
    for B in range(1, 9):
        together = run(slice(0, B))
        for got, want in zip(together, map(torch.cat, zip(*alone[:B], strict=True)), strict=True):
            assert torch.equal(got, want), B


def test_result_is_independent_of_the_schedule(emulated_extension):
    given = arguments(3, 136, 7, 1, 64)
    want = check(given)
    for seed in (1, 2, 3):
        emulated_extension.set_schedule(seed)
        assert torch.equal(check(arguments(3, 136, 7, 1, 64)), want)


def test_slot_outside_the_cache_is_not_written(extension_device):
    given = arguments(3, 64, 2, 1, 32, device=extension_device)
    want = decode_qkv(*[tensor.clone() for tensor in given], EPS)
    given[7][0], given[7][2] = -1, SLOTS
    whole = torch.full((2, 3 * SLOTS, 1, 32), 7.0, dtype=torch.bfloat16, device=extension_device)
    caches = whole[:, SLOTS : 2 * SLOTS].unbind(0)
    assert torch.equal(decode_qkv(*given[:8], *caches, EPS), want)
    written = (whole != 7).any(-1).nonzero()
    assert written[:, 1].unique().tolist() == [SLOTS + given[7][1].item()]


def test_accepts_slices_of_larger_caches_and_tables(extension_device, launches):
    seen = launches("decode_qkv")
    given = arguments(3, 64, 4, 2, 32, device=extension_device)
    want = decode_qkv(*given, EPS)
    by_slot = torch.full((SLOTS + 2, 4, 40), 7.0, dtype=torch.bfloat16, device=extension_device)
    by_head = torch.full((4, SLOTS + 2, 32), 7.0, dtype=torch.bfloat16, device=extension_device)
    caches = by_slot[1:-1, 1:3, 1:33], by_head[1:3, 1:-1].transpose(0, 1)
    parts = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in given[3:8]]
    for pair in (caches, caches[::-1]):
        assert torch.equal(decode_qkv(*given[:3], *parts, *pair, EPS), want)
        for cache, same in zip(pair, given[-2:], strict=True):
            assert torch.equal(cache, same)
            cache.fill_(7)
        assert (by_slot == 7).all() and (by_head == 7).all()
    assert len(seen) == 3


def test_unsupported_calls_compose_other_ops(extension_device, launches):
    seen = launches("decode_qkv")
    for given in (
        arguments(9, 64, 2, 1, 16, device=extension_device),
        arguments(16, 64, 2, 1, 16, device=extension_device),
        arguments(0, 64, 2, 1, 16, device=extension_device),
        arguments(2, 36, 2, 1, 16, device=extension_device),  # rows of 72 bytes
        arguments(2, 64, 2, 1, 24, device=extension_device),  # heads that are no multiple of 16
        arguments(1, 64, 1, 1, 144, device=extension_device),  # heads wider than a warp holds
    ):
        check(given)
    for dtype in (torch.float16, torch.float64):
        check(arguments(2, 64, 2, 1, 16, dtype, extension_device))
    given = arguments(2, 64, 2, 1, 16, torch.float32, extension_device)
    columns = [cache.repeat_interleave(2, -1)[..., ::2] for cache in given[-2:]]
    check([*given[:8], *columns])
    assert seen == []


@pytest.mark.parametrize("without", [{3}, {4}, {3, 4}], ids=["bias", "qk-norm", "both"])
def test_bias_and_qk_norm_are_optional(extension_device, launches, without):
    seen = launches("decode_qkv")
    given = arguments(2, 64, 4, 2, 16, torch.float32, extension_device)
    check([None if place in without else tensor for place, tensor in enumerate(given)])
    assert seen == []


def test_layer_norm_as_qk_norm_is_composed_of_other_ops(extension_device, launches):
    seen = launches("decode_qkv")
    x, norm, w, bias, qk_norm, *others = arguments(2, 64, 4, 2, 16, torch.float32, extension_device)
    layer_norm = torch.stack([qk_norm, qk_norm.flip(0)])
    q = decode_qkv(x, norm, w, bias, layer_norm, *others, EPS)
    caches = [cache.clone() for cache in others[3:]]
    qkv = F.linear(F.rms_norm(x, (64,), norm, EPS), w, bias)
    want = qk_norm_rope(qkv, layer_norm, None, *others[:3], *caches, None, EPS)
    assert seen == []
    torch.testing.assert_close(q, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(others[3], caches[0], rtol=1e-5, atol=1e-5)


def test_runs_without_an_extension(monkeypatch):
    monkeypatch.setattr(extension, "EXTENSION", None)
    check(arguments(2, 64, 2, 1, 16, torch.float32))


def test_reference_rejects_slot_outside_the_cache(monkeypatch):
    monkeypatch.setattr(extension, "EXTENSION", None)
    for slot in (-1, SLOTS):
        given = arguments(2, 64, 2, 1, 16, torch.float32)
        given[7][1] = slot
        with pytest.raises(IndexError):
            decode_qkv(*given, EPS)


def test_rejects_mismatched_argument():
    given = dict(
        zip(
            ("x", "norm", "w", "bias", "qk_norm", "cos", "sin", "slots", "k_cache", "v_cache"),
            arguments(2, 64, 2, 1, 16, torch.float32),
            strict=True,
        )
    )
    for name, changed, message in (
        ("norm", given["norm"][1:], r"norm must be \(64,\) torch.float32.*got \(63,\) torch.float32"),
        ("w", given["w"][:, 1:], r"w must be \(64, 64\) torch.float32.*got \(64, 63\) torch.float32"),
        ("w", given["w"][:40], r"w must have \(Hq \+ 2\*1\) \* 16 rows.*got 40"),
        ("w", given["w"][:32], r"w must have \(Hq \+ 2\*1\) \* 16 rows.*got 32"),
        ("bias", given["bias"].half(), r"bias must be \(64,\) torch.float32.*got \(64,\) torch.float16"),
        ("qk_norm", given["qk_norm"][1:], r"qk_norm must be \(3, 16\) torch.float32.*got \(2, 16\) torch.float32"),
        ("cos", given["cos"][1:], r"cos must be \(2, 8\) torch.float32.*got \(1, 8\) torch.float32"),
        ("sin", given["sin"].double(), r"sin must be \(2, 8\) torch.float32.*got \(2, 8\) torch.float64"),
        ("slots", given["slots"].int(), r"slots must be \(2,\) torch.int64.*got \(2,\) torch.int32"),
        ("v_cache", given["v_cache"][1:], r"v_cache must be \(24, 1, 16\) torch.fl.*got \(23, 1, 16\) torch.float32"),
        ("slots", given["slots"].to("meta"), "slots must be on cpu like x, got meta"),
        ("k_cache", given["k_cache"].to("meta"), "k_cache must be on cpu like x, got meta"),
        ("k_cache", given["k_cache"][..., 1:], "head_dim must be positive and even, got 15"),
    ):
        with pytest.raises(ValueError, match=f"decode_qkv: {message}"):
            decode_qkv(**given | {name: changed}, eps=EPS)

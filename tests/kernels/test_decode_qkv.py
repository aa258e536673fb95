import pytest
import torch
import torch.nn.functional as F

from bagel_rt.kernels import decode_qkv, extension, qk_norm_rope
from bagel_rt.kernels.decode_qkv import decode_qkv_reference

EPS = 1e-6
# Of the roundings of the normalized row, of qkv and of the result.
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


def assert_close(actual, expected, dtype):
    scale = expected.abs() + expected.square().mean(-1, keepdim=True).sqrt()
    assert actual.dtype == dtype and ((actual.double() - expected).abs() <= TOLERANCE[dtype] * scale).all()


def check(inputs):
    """Compare q and the caches with the formula in float64; other slots must be unchanged. Return q."""
    slots = inputs[7]
    copies = [None if tensor is None else tensor.clone() for tensor in wide(inputs)]
    q = decode_qkv(*inputs, EPS)
    expected = decode_qkv_reference(*copies, EPS)
    assert q.is_contiguous()
    assert_close(q, expected, inputs[0].dtype)
    for cache, other in zip(inputs[-2:], copies[-2:], strict=True):
        assert_close(cache[slots], other[slots], inputs[0].dtype)
        others = torch.ones(len(cache), dtype=torch.bool, device=cache.device).index_fill(0, slots, False)
        assert (cache[others] == 7).all()
    return q


@pytest.mark.parametrize("dtype", extension.DTYPES)
@pytest.mark.parametrize("B, H, Hq, Hkv, D", SHAPES.values(), ids=SHAPES)
def test_matches_float64(extension_device, launches, B, H, Hq, Hkv, D, dtype):
    seen = launches("decode_qkv")
    inputs = arguments(B, H, Hq, Hkv, D, dtype, extension_device)
    check(inputs)
    assert seen == ["decode_qkv"]
    assert (extension.counters(inputs[0], 1) == 0).all(), "the next launch finds the counters used"


def test_repeated_launches_reuse_counters(extension_device):
    for seed in range(3):
        inputs = arguments(2, 72 + 8 * seed, 4, 2, 32, device=extension_device)
        check(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", extension.DTYPES)
def test_row_is_bitwise_independent_of_the_batch(extension_device, dtype):
    inputs = arguments(8, 1048, 2, 1, 64, dtype, extension_device)
    x, norm, w, bias, qk_norm, cos, sin, slots, k_cache, v_cache = inputs

    def run(rows):
        caches = k_cache.clone(), v_cache.clone()
        q = decode_qkv(x[rows], norm, w, bias, qk_norm, cos[rows], sin[rows], slots[rows], *caches, EPS)
        return q, *(cache[slots[rows]] for cache in caches)

    alone = [run(slice(b, b + 1)) for b in range(8)]
    for B in range(1, 9):
        together = run(slice(0, B))
        for actual, expected in zip(together, map(torch.cat, zip(*alone[:B], strict=True)), strict=True):
            assert torch.equal(actual, expected), B


def test_result_is_independent_of_the_schedule(emulated_extension):
    inputs = arguments(3, 136, 7, 1, 64)
    expected = check(inputs)
    for seed in (1, 2, 3):
        emulated_extension.set_schedule(seed)
        assert torch.equal(check(arguments(3, 136, 7, 1, 64)), expected)


def test_slot_outside_the_cache_is_not_written(extension_device):
    inputs = arguments(3, 64, 2, 1, 32, device=extension_device)
    expected = decode_qkv(*[tensor.clone() for tensor in inputs], EPS)
    inputs[7][0], inputs[7][2] = -1, SLOTS
    whole = torch.full((2, 3 * SLOTS, 1, 32), 7.0, dtype=torch.bfloat16, device=extension_device)
    caches = whole[:, SLOTS : 2 * SLOTS].unbind(0)
    assert torch.equal(decode_qkv(*inputs[:8], *caches, EPS), expected)
    written = (whole != 7).any(-1).nonzero()
    assert written[:, 1].unique().tolist() == [SLOTS + inputs[7][1].item()]


def test_accepts_slices_of_larger_caches_and_tables(extension_device, launches):
    seen = launches("decode_qkv")
    inputs = arguments(3, 64, 4, 2, 32, device=extension_device)
    expected = decode_qkv(*inputs, EPS)
    by_slot = torch.full((SLOTS + 2, 4, 40), 7.0, dtype=torch.bfloat16, device=extension_device)
    by_head = torch.full((4, SLOTS + 2, 32), 7.0, dtype=torch.bfloat16, device=extension_device)
    caches = by_slot[1:-1, 1:3, 1:33], by_head[1:3, 1:-1].transpose(0, 1)
    parts = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in inputs[3:8]]
    for pair in (caches, caches[::-1]):
        assert torch.equal(decode_qkv(*inputs[:3], *parts, *pair, EPS), expected)
        for cache, same in zip(pair, inputs[-2:], strict=True):
            assert torch.equal(cache, same)
            cache.fill_(7)
        assert (by_slot == 7).all() and (by_head == 7).all()
    assert len(seen) == 3


def test_unsupported_calls_compose_other_ops(extension_device, launches):
    seen = launches("decode_qkv")
    for inputs in (
        arguments(9, 64, 2, 1, 16, device=extension_device),
        arguments(16, 64, 2, 1, 16, device=extension_device),
        arguments(0, 64, 2, 1, 16, device=extension_device),
        arguments(2, 36, 2, 1, 16, device=extension_device),  # rows of 72 bytes
        arguments(2, 64, 2, 1, 24, device=extension_device),  # heads that are no multiple of 16
        arguments(1, 64, 1, 1, 144, device=extension_device),  # heads wider than a warp holds
    ):
        check(inputs)
    for dtype in (torch.float16, torch.float64):
        check(arguments(2, 64, 2, 1, 16, dtype, extension_device))
    inputs = arguments(2, 64, 2, 1, 16, torch.float32, extension_device)
    columns = [cache.repeat_interleave(2, -1)[..., ::2] for cache in inputs[-2:]]
    check([*inputs[:8], *columns])
    assert seen == []


@pytest.mark.parametrize("without", [{3}, {4}, {3, 4}], ids=["bias", "qk-norm", "both"])
def test_bias_and_qk_norm_are_optional(extension_device, launches, without):
    seen = launches("decode_qkv")
    inputs = arguments(2, 64, 4, 2, 16, torch.float32, extension_device)
    check([None if place in without else tensor for place, tensor in enumerate(inputs)])
    assert seen == []


def test_layer_norm_as_qk_norm_is_composed_of_other_ops(extension_device, launches):
    seen = launches("decode_qkv")
    x, norm, w, bias, qk_norm, *others = arguments(2, 64, 4, 2, 16, torch.float32, extension_device)
    layer_norm = torch.stack([qk_norm, qk_norm.flip(0)])
    q = decode_qkv(x, norm, w, bias, layer_norm, *others, EPS)
    caches = [cache.clone() for cache in others[3:]]
    qkv = F.linear(F.rms_norm(x, (64,), norm, EPS), w, bias)
    expected = qk_norm_rope(qkv, layer_norm, None, *others[:3], *caches, None, EPS)
    assert seen == []
    torch.testing.assert_close(q, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(others[3], caches[0], rtol=1e-5, atol=1e-5)


def test_runs_without_an_extension(monkeypatch):
    monkeypatch.setattr(extension, "EXTENSION", None)
    check(arguments(2, 64, 2, 1, 16, torch.float32))


def test_reference_rejects_slot_outside_the_cache(monkeypatch):
    monkeypatch.setattr(extension, "EXTENSION", None)
    for slot in (-1, SLOTS):
        inputs = arguments(2, 64, 2, 1, 16, torch.float32)
        inputs[7][1] = slot
        with pytest.raises(IndexError):
            decode_qkv(*inputs, EPS)


def test_rejects_mismatched_argument():
    inputs = dict(
        zip(
            ("x", "norm", "w", "bias", "qk_norm", "cos", "sin", "slots", "k_cache", "v_cache"),
            arguments(2, 64, 2, 1, 16, torch.float32),
            strict=True,
        )
    )
    for name, changed, message in (
        ("norm", inputs["norm"][1:], r"norm must be \(64,\) torch.float32.*got \(63,\) torch.float32"),
        ("w", inputs["w"][:, 1:], r"w must be \(64, 64\) torch.float32.*got \(64, 63\) torch.float32"),
        ("w", inputs["w"][:40], r"w must have \(Hq \+ 2\*1\) \* 16 rows.*got 40"),
        ("w", inputs["w"][:32], r"w must have \(Hq \+ 2\*1\) \* 16 rows.*got 32"),
        ("bias", inputs["bias"].half(), r"bias must be \(64,\) torch.float32.*got \(64,\) torch.float16"),
        ("qk_norm", inputs["qk_norm"][1:], r"qk_norm must be \(3, 16\) torch.float32.*got \(2, 16\) torch.float32"),
        ("cos", inputs["cos"][1:], r"cos must be \(2, 8\) torch.float32.*got \(1, 8\) torch.float32"),
        ("sin", inputs["sin"].double(), r"sin must be \(2, 8\) torch.float32.*got \(2, 8\) torch.float64"),
        ("slots", inputs["slots"].int(), r"slots must be \(2,\) torch.int64.*got \(2,\) torch.int32"),
        ("v_cache", inputs["v_cache"][1:], r"v_cache must be \(24, 1, 16\) torch.fl.*got \(23, 1, 16\) torch.float32"),
        ("slots", inputs["slots"].to("meta"), "slots must be on cpu like x, got meta"),
        ("k_cache", inputs["k_cache"].to("meta"), "k_cache must be on cpu like x, got meta"),
        ("k_cache", inputs["k_cache"][..., 1:], "head_dim must be positive and even, got 15"),
    ):
        with pytest.raises(ValueError, match=f"decode_qkv: {message}"):
            decode_qkv(**inputs | {name: changed}, eps=EPS)

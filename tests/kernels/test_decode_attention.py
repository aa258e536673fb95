from importlib import import_module

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bagel_rt.kernels import attention_dense_reference, decode_attention, extension
from bagel_rt.kernels.backend import choose_backend

op = import_module("bagel_rt.kernels.decode_attention")  # the package has the function under this name

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
RANGES = {
    "no-sequence": ([], []),
    "one-key": ([0], [1]),
    "one-sequence": ([3], [77]),
    "no-key": ([5], [0]),
    "several-sequences": ([0, 40, 90], [33, 50, 1]),
    "some-see-nothing": ([0, 7, 60], [5, 0, 40]),
    "shared-prefix": ([2, 2], [30, 31]),
    "to-the-last-slot": ([10, 99], [90, 1]),
}


def values(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def _no_extension_unless_asked_for(request, monkeypatch):
    """Disable the extension, so that the reference or the Triton kernel runs."""
    if not {"emulated_extension", "extension_device"} & set(request.fixturenames):
        monkeypatch.setattr(extension, "EXTENSION", None)


@pytest.fixture
def cuda_kernel(extension_device, monkeypatch):
    """The device on which the op must run the extension's kernel, not a fallback."""
    for other in ("launch_kernel", "decode_attention_reference"):
        monkeypatch.setattr(op, other, lambda *_, **__: pytest.fail("the CUDA kernel was passed over"))
    yield extension_device
    used = extension.counters(torch.empty(0, device=extension_device), extension.COUNTERS)
    assert not used.any(), "counters are left that are not zero"


def check(device, starts, lengths, Hq=4, Hkv=2, D=16, dtype=torch.float32, index=torch.int64, scale=None, slots=100):
    """Compare with dense attention in float64. Slots that no row attends to hold NaN, so that a read shows."""
    mask = torch.zeros(len(starts), slots, dtype=torch.bool)
    for row, start, length in zip(mask, starts, lengths, strict=True):
        row[start : start + length] = True
    q = values(1, len(starts), Hq, D, dtype=dtype)
    k, v = (values(seed, slots, Hkv, D, dtype=dtype) for seed in (2, 3))
    expected = attention_dense_reference(q.double(), k.double(), v.double(), mask, scale)
    k[~mask.any(0)] = v[~mask.any(0)] = torch.nan
    bounds = (torch.tensor(numbers, dtype=index) for numbers in (starts, lengths))
    out = decode_attention(*(tensor.to(device) for tensor in (q, k, v, *bounds)), scale).cpu()
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert (out[~mask.any(1)] == 0).all()


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("starts, lengths", RANGES.values(), ids=RANGES)
def test_matches_dense_softmax_on(device, starts, lengths, index):
    check(device, starts, lengths, index=index)


HEADS = [(7, 1, 16), (4, 2, 32), (4, 1, 64), (3, 3, 72), (28, 4, 128)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("Hq, Hkv, D", HEADS, ids=[f"{Hq}-heads-on-{Hkv}-d{D}" for Hq, Hkv, D in HEADS])
def test_matches_dense_softmax_for_heads(device, Hq, Hkv, D, dtype):
    check(device, [5, 20], [60, 33], Hq, Hkv, D, dtype)


@pytest.mark.parametrize("starts, lengths", RANGES.values(), ids=RANGES)
def test_works_without_fused_sdpa_backends(starts, lengths):
    with sdpa_kernel(SDPBackend.MATH):
        check("cpu", starts, lengths)


def test_scale_replaces_the_default(device):
    for scale in (1.0, 0.03, 1e4):
        check(device, [5, 20], [60, 33], scale=scale)


def test_accepts_strided_inputs_and_does_not_modify_them(device):
    q, caches = values(1, 2, 4, 32).to(device)[..., ::2], values(2, 50, 2, 2, 16).to(device)
    k, v = caches.unbind(1)
    before = [t.clone() for t in (q, k, v)]
    starts, lengths = torch.tensor([3, 9], device=device), torch.tensor([10, 41], device=device)
    out = decode_attention(q, k, v, starts, lengths)
    torch.testing.assert_close(out, decode_attention(*(t.contiguous() for t in (q, k, v)), starts, lengths))
    assert torch.equal(out[:1], decode_attention(q[:1], k, v, starts[:1], lengths[:1])), "depends on its neighbor"
    assert all(map(torch.equal, (q, k, v), before))


@pytest.mark.parametrize("starts, lengths", RANGES.values(), ids=RANGES)
def test_cuda_kernel_matches_dense_softmax_on(cuda_kernel, starts, lengths):
    check(cuda_kernel, starts, lengths)
    check(cuda_kernel, starts, lengths, index=torch.int32)


@pytest.mark.parametrize("B", [16, 32])
def test_cuda_kernel_supports_more_than_8_sequences(cuda_kernel, B):
    check(cuda_kernel, [2 * b for b in range(B)], [b + 1 for b in range(B)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "Hq, Hkv, D",
    [(1, 1, 16), (4, 2, 32), (3, 1, 64), (14, 2, 128), (5, 1, 64), (8, 1, 8), (16, 2, 16), (16, 1, 64), (11, 1, 32)],
    ids=lambda number: str(number),
)
def test_cuda_kernel_matches_dense_softmax_for_heads(cuda_kernel, Hq, Hkv, D, dtype):
    """Group sizes 1, 2, 3, 7, 5, 8, 8, 16 and 11: full and partial head tiles, and two tiles per group."""
    check(cuda_kernel, [5, 20, 0, 7], [60, 33, 200, 1], Hq, Hkv, D, dtype, slots=210)


def test_cuda_kernel_supports_the_widest_heads(cuda_kernel):
    check(cuda_kernel, [5], [70], 7, 1, 256, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 63, 64, 65, 127, 129, 2048, 2049, 5000])
def test_cuda_kernel_splits_any_length(cuda_kernel, length):
    check(cuda_kernel, [17], [length], 7, 1, 16, slots=5100)
    check(cuda_kernel, [17], [length], 2, 1, 16, torch.bfloat16, torch.int32, slots=5100)


def test_cuda_kernel_matches_dense_softmax_for_bagel_heads(cuda_kernel):
    check(cuda_kernel, [3, 0], [700, 65], 28, 4, 128, torch.bfloat16, slots=800)


def test_cuda_kernel_accepts_mixed_bound_dtypes_and_strides(cuda_kernel):
    device = cuda_kernel
    q = values(1, 2, 8, 16).to(device)
    k, v = values(2, 50, 2, 2, 16).to(device).unbind(1)
    starts, lengths = torch.tensor([3, 0, 9, 0])[::2].to(device), torch.tensor([10, 41], device=device)
    expected = decode_attention(q[:, :4].contiguous(), k.contiguous(), v.contiguous(), starts, lengths)
    for wide, narrow in ((starts, lengths.int()), (starts.int(), lengths)):
        assert torch.equal(decode_attention(q[:, :4], k, v, wide, narrow), expected)


def test_cuda_kernel_applies_scale(cuda_kernel):
    for scale in (1.0, 0.03, 1e4):
        check(cuda_kernel, [5, 20], [60, 33], scale=scale)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_kernel_result_is_independent_of_the_batch(cuda_kernel, dtype):
    q = values(1, 5, 7, 32, dtype=dtype).to(cuda_kernel)
    k, v = (values(seed, 900, 1, 32, dtype=dtype).to(cuda_kernel) for seed in (2, 3))
    starts = torch.tensor([0, 100, 3, 800, 64], device=cuda_kernel)
    lengths = torch.tensor([64, 800, 300, 100, 0], device=cuda_kernel)
    together = decode_attention(q, k, v, starts, lengths)
    for row in range(5):
        one = slice(row, row + 1)
        assert torch.equal(decode_attention(q[one], k, v, starts[one], lengths[one]), together[one])
    assert torch.equal(decode_attention(q.flip(0), k, v, starts.flip(0), lengths.flip(0)), together.flip(0))
    moved = torch.cat([k[:50], k]), torch.cat([v[:50], v])
    assert torch.equal(decode_attention(q, *moved, starts + 50, lengths), together), "depends on the place"


def test_cuda_kernel_is_deterministic_under_any_schedule(emulated_extension):
    q, k, v = values(1, 2, 7, 16), *(values(seed, 400, 1, 16) for seed in (2, 3))
    starts, lengths = torch.tensor([0, 30]), torch.tensor([400, 70])
    expected = op._run_extension(q, k, v, starts, lengths, 0.25)
    for seed in range(1, 6):
        emulated_extension.set_schedule(seed)
        assert torch.equal(op._run_extension(q, k, v, starts, lengths, 0.25), expected)


def test_cuda_kernel_propagates_nan(cuda_kernel):
    q, k, v = values(1, 1, 2, 16), values(2, 80, 1, 16), values(3, 80, 1, 16)
    v[70, 0, 3] = torch.nan
    bounds = torch.tensor([0], device=cuda_kernel), torch.tensor([80], device=cuda_kernel)
    out = decode_attention(*(t.to(cuda_kernel) for t in (q, k, v)), *bounds)
    assert out.isnan()[0, :, 3].all() and out.isnan().sum() == 2
    k[70] = torch.nan
    assert decode_attention(*(t.to(cuda_kernel) for t in (q, k, v)), *bounds).isnan().all()


LEFT_TO_TRITON = {
    "float16": lambda make: make(torch.float16, 16),
    "heads-of-72": lambda make: make(torch.float32, 72),
    "a-head-of-less-than-16-bytes": lambda make: make(torch.bfloat16, 4),
    "an-address-off-16-bytes": lambda make: tuple(torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in
                                                  make(torch.float32, 16)),
    "slots-off-16-bytes": lambda make: tuple(t[..., :16] for t in make(torch.float32, 18)),
    "channels-apart": lambda make: tuple(t[..., ::2] for t in make(torch.float32, 32)),
}  # fmt: skip


@pytest.mark.parametrize("inputs", LEFT_TO_TRITON.values(), ids=LEFT_TO_TRITON)
def test_unsupported_inputs_fall_back(extension_device, monkeypatch, inputs):
    def make(dtype, D):
        return tuple(values(seed, *shape, D, dtype=dtype) for seed, shape in enumerate([(2, 4), (90, 2), (90, 2)]))

    monkeypatch.setattr(op, "_run_extension", lambda *_: pytest.fail("the CUDA kernel cannot take this"))
    q, k, v = (t.to(extension_device) for t in inputs(make))
    bounds = torch.tensor([3, 9], device=extension_device), torch.tensor([10, 81], device=extension_device)
    actual = decode_attention(q, k, v, *bounds)
    choose_backend("reference")
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(actual, decode_attention(q, k, v, *bounds), rtol=tolerance, atol=tolerance)


def test_gradient_bypasses_the_cuda_kernel(extension_device, monkeypatch):
    monkeypatch.setattr(op, "_run_extension", lambda *_: pytest.fail("the extension has no gradient"))
    q, k, v = (values(seed, *shape, 16).to(extension_device) for seed, shape in enumerate([(1, 4), (9, 2), (9, 2)]))
    bounds = torch.tensor([3], device=extension_device), torch.tensor([5], device=extension_device)
    decode_attention(q.requires_grad_(), k, v, *bounds).sum().backward()
    assert q.grad.abs().sum() > 0


@pytest.mark.parametrize("differentiable", [0, 1, 2], ids=["q", "k_cache", "v_cache"])
def test_gradient_bypasses_the_triton_kernel(device, differentiable):
    inputs = [values(seed, *shape, 16).to(device) for seed, shape in enumerate([(1, 4), (9, 2), (9, 2)])]
    bounds = torch.tensor([3], device=device), torch.tensor([5], device=device)
    inputs[differentiable].requires_grad_()
    decode_attention(*inputs, *bounds).sum().backward()
    assert inputs[differentiable].grad.abs().sum() > 0


def test_reference_rejects_range_past_the_cache():
    cache = torch.zeros(4, 2, 16)
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        decode_attention(torch.zeros(1, 4, 16), cache, cache, torch.tensor([2]), torch.tensor([3]))


WRONG = {
    "heads-that-do-not-group": ({"q": torch.zeros(2, 3, 16)}, "query heads must be a multiple.*got 3 and 2"),
    "head-dim": ({"k_cache": torch.zeros(8, 2, 32)}, r"k_cache must be \(8, 2, 16\).*got \(8, 2, 32\) torch.float32"),
    "cache-dtype": ({"v_cache": torch.zeros(8, 2, 16).half()}, "v_cache must be .*float32.*got .* torch.float16"),
    "one-start-for-all": ({"starts": torch.tensor([0])}, r"starts must be \(2,\).*got \(1,\) torch.int64"),
    "zero-scale": ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
    "another-device": ({"starts": torch.tensor([0, 0], device="meta")}, "starts must be on cpu like q, got meta"),
    "float-lengths": ({"lengths": torch.ones(2)}, r"lengths must be \(2,\) int32 or int64.*got \(2,\) torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_rejects_mismatched_argument(change, message):
    good = {"q": torch.zeros(2, 4, 16), "k_cache": torch.zeros(8, 2, 16), "v_cache": torch.zeros(8, 2, 16),
            "starts": torch.tensor([0, 0]), "lengths": torch.tensor([1, 1])}  # fmt: skip
    with pytest.raises(ValueError, match=f"decode_attention: {message}"):
        decode_attention(**(good | change))

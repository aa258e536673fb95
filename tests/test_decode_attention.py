import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bagel_rt.kernels import attention_dense_reference, decode_attention

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


def check(device, starts, lengths, Hq=4, Hkv=2, D=16, dtype=torch.float32, index=torch.int64, scale=None):
    """Equals dense attention in float64. Slots nobody sees hold NaN: reading one shows."""
    mask = torch.zeros(len(starts), 100, dtype=torch.bool)
    for row, start, length in zip(mask, starts, lengths, strict=True):
        row[start : start + length] = True
    q = values(1, len(starts), Hq, D, dtype=dtype)
    k, v = (values(seed, 100, Hkv, D, dtype=dtype) for seed in (2, 3))
    want = attention_dense_reference(q.double(), k.double(), v.double(), mask, scale)
    k[~mask.any(0)] = v[~mask.any(0)] = torch.nan
    bounds = (torch.tensor(numbers, dtype=index) for numbers in (starts, lengths))
    out = decode_attention(*(tensor.to(device) for tensor in (q, k, v, *bounds)), scale).cpu()
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
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
def test_does_not_need_a_fused_backend_of_torch(starts, lengths):
    with sdpa_kernel(SDPBackend.MATH):
        check("cpu", starts, lengths)


def test_scale_replaces_the_default(device):
    for scale in (1.0, 0.03, 1e4):
        check(device, [5, 20], [60, 33], scale=scale)


def test_inputs_need_not_be_contiguous_and_are_left_alone(device):
    q, caches = values(1, 2, 4, 32).to(device)[..., ::2], values(2, 50, 2, 2, 16).to(device)
    k, v = caches.unbind(1)
    before = [t.clone() for t in (q, k, v)]
    starts, lengths = torch.tensor([3, 9], device=device), torch.tensor([10, 41], device=device)
    out = decode_attention(q, k, v, starts, lengths)
    torch.testing.assert_close(out, decode_attention(*(t.contiguous() for t in (q, k, v)), starts, lengths))
    assert torch.equal(out[:1], decode_attention(q[:1], k, v, starts[:1], lengths[:1])), "depends on its neighbour"
    assert all(map(torch.equal, (q, k, v), before))


def test_refuses_a_range_past_the_cache():
    cache = torch.zeros(4, 2, 16)
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        decode_attention(torch.zeros(1, 4, 16), cache, cache, torch.tensor([2]), torch.tensor([3]))


WRONG = {
    "heads-that-do-not-group": ({"q": torch.zeros(2, 3, 16)}, "3 query heads do not divide into groups over 2"),
    "head-dim": ({"k_cache": torch.zeros(8, 2, 32)}, r"k_cache is \(8, 2, 32\) torch.float32, expected \(8, 2, 16\)"),
    "cache-dtype": ({"v_cache": torch.zeros(8, 2, 16).half()}, "v_cache is .* torch.float16, expected .*float32"),
    "one-start-for-all": ({"starts": torch.tensor([0])}, r"starts is \(1,\) torch.int64, expected \(2,\)"),
    "zero-scale": ({"scale": 0.0}, "scale=0.0 is not a positive number"),
    "float-lengths": ({"lengths": torch.ones(2)}, r"lengths is \(2,\) torch.float32, expected \(2,\) int32 or int64"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_names_the_argument_that_does_not_fit(change, message):
    good = {"q": torch.zeros(2, 4, 16), "k_cache": torch.zeros(8, 2, 16), "v_cache": torch.zeros(8, 2, 16),
            "starts": torch.tensor([0, 0]), "lengths": torch.tensor([1, 1])}  # fmt: skip
    with pytest.raises(ValueError, match=f"decode_attention: {message}"):
        decode_attention(**(good | change))

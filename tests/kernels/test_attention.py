import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from bagel_rt.kernels import attention, attention_dense_reference
from bagel_rt.runtime.plan import Segment, build_plan, visibility

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LSE_TOLERANCE = {torch.float64: 1e-12} | dict.fromkeys([torch.float32, torch.float16, torch.bfloat16], 2e-6)


def values(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def int32(rows):
    return torch.tensor(rows, dtype=torch.int32)


def check(device, limits, blocks, mask, Hq=4, Hkv=2, D=16, dtype=torch.float32, scale=None):
    """Attention and its log-sum-exp under (limits, blocks) equal dense ones in float64 under ``mask``, bool [T, S].

    Slots that no row attends to hold NaN, so that a read shows.
    """
    T, S = mask.shape
    q, k, v = values(1, T, Hq, D, dtype=dtype), values(2, S, Hkv, D, dtype=dtype), values(3, S, Hkv, D, dtype=dtype)
    unseen = ~mask.any(0)
    expected = attention_dense_reference(q.double(), k.double(), v.double(), mask, scale)
    k[unseen] = v[unseen] = torch.nan
    inputs = [tensor.to(device) for tensor in (q, k, v, limits, blocks)]
    out, lse = attention(*inputs, scale, return_lse=True)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert (out.cpu()[~mask.any(1)] == 0).all()
    torch.testing.assert_close(attention(*inputs, scale), out, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = dense_lse(q.double(), k.double(), mask, D**-0.5 if scale is None else scale)
    torch.testing.assert_close(lse.cpu().double(), expected, rtol=LSE_TOLERANCE[dtype], atol=LSE_TOLERANCE[dtype])


def dense_lse(q, k, mask, scale):
    """Log-sum-exp of the scores, [Hq, T]; -inf for rows with no visible slot."""
    k = k.nan_to_num().repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (torch.einsum("thd,shd->hts", q, k) * scale).masked_fill(~mask, -torch.inf).logsumexp(-1)


def check_plan(device, segments, block_q=128, **shape):
    plan = build_plan(segments, block_q)
    mask = torch.from_numpy(visibility(plan))
    check(device, torch.from_numpy(plan.limits), torch.from_numpy(plan.blocks), mask, **shape)


def segment(mode, rows, gen, key_start, visible, write=None):
    """A routing of ``rows`` rows; those in the range ``gen`` belong to the generation expert."""
    routed = np.zeros(rows, bool)
    routed[slice(*gen)] = True
    return Segment(mode, routed, key_start, visible, key_start + visible if write is None else write)


UND, NO_GEN = (0, 0), (0, 0)
PLANS = {
    "no-segments": [],
    "one-token": [segment("causal", 1, UND, 0, 0)],
    "one-token-after-a-context": [segment("causal", 1, UND, 5, 30)],
    "text": [segment("causal", 21, UND, 0, 0)],
    "text-after-a-context": [segment("causal", 25, UND, 3, 21)],
    "vit-image": [segment("full", 37, UND, 0, 19)],
    "vae-image-with-markers": [segment("full", 26, (1, 25), 0, 19)],
    "text-then-image-then-text": [
        segment("causal", 9, UND, 2, 0), segment("full", 12, (1, 11), 2, 9), segment("causal", 4, UND, 2, 21),
    ],
    "two-images-that-never-meet": [segment("full", 20, UND, 0, 0), segment("full", 30, UND, 20, 0)],
    "denoising-behind-its-context": [segment("full", 18, (1, 17), 4, 10)],
    "denoising-away-from-its-context": [segment("full", 18, (1, 17), 0, 10, write=40)],
    "denoising-without-a-context": [segment("full", 18, (1, 17), 0, 0, write=40)],
    "three-branches-on-one-context": [
        segment("full", 18, (1, 17), 0, 10, write=40), segment("full", 18, (1, 17), 0, 7, write=60),
        segment("full", 18, (1, 17), 100, 0),
    ],
    "text-and-denoising-of-other-contexts": [
        segment("causal", 7, UND, 50, 3), segment("full", 18, (1, 17), 0, 10, write=20),
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("block_q", [5, 128], ids="blocks-of-{}".format)
@pytest.mark.parametrize("segments", PLANS.values(), ids=PLANS)
def test_matches_dense_softmax_on(device, segments, block_q):
    check_plan(device, segments, block_q)


HEADS = [(7, 1, 16), (4, 2, 32), (4, 1, 64), (3, 3, 72), (28, 4, 128)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("Hq, Hkv, D", HEADS, ids=[f"{Hq}-heads-on-{Hkv}-d{D}" for Hq, Hkv, D in HEADS])
def test_matches_dense_softmax_for_heads(device, Hq, Hkv, D, dtype):
    segments = PLANS["text-then-image-then-text"] + [segment("full", 9, (1, 8), 30, 5, write=60)]
    check_plan(device, segments, 16, Hq=Hq, Hkv=Hkv, D=D, dtype=dtype)


@st.composite
def packed_segments(draw):
    """Segments of several contexts in one cache, each behind stored keys, with the contexts interleaved."""
    segments, slot = [], 0
    for _ in range(draw(st.integers(1, 3))):
        key_start, visible = slot, draw(st.integers(0, 9))
        branches = []
        for _ in range(draw(st.integers(0, 3))):
            mode, rows = draw(st.sampled_from(["causal", "full"])), draw(st.integers(1, 12))
            gen = (1, rows - 1) if rows > 2 and mode != "causal" else NO_GEN
            if draw(st.booleans()):
                branches.append((mode, rows, gen, key_start, visible))
                continue
            segments.append(segment(mode, rows, gen, key_start, visible))
            visible += rows
        slot = key_start + visible + draw(st.integers(0, 2))
        for mode, rows, gen, context, seen in branches:
            slot += 1
            segments.append(segment(mode, rows, gen, context, seen, write=slot))
            slot += rows
    return draw(st.permutations(segments))


@pytest.mark.slow
@settings(max_examples=60)
@given(segments=packed_segments(), block_q=st.sampled_from([3, 16]))
def test_matches_dense_softmax_on_any_plan(device, segments, block_q):
    check_plan(device, segments, block_q)


HAND_MADE = {
    "a-row-that-sees-nothing-among-rows-that-do": ([0, 2, 3], [[0, 3, 1, 0, 3, 0, 0]]),
    "rows-that-all-see-nothing": ([0, 0], [[0, 2, 3, 0, 0, 0, 0]]),
    "nothing-then-something": ([0, 0, 4], [[0, 2, 3, 0, 0, 0, 0], [2, 3, 3, 4, 4, 0, 0]]),
    "limits-that-fall": ([6, 4, 1], [[0, 3, 0, 1, 6, 0, 0]]),
    "a-partial-prefix-beside-own-keys": ([0, 2, 5], [[0, 3, 1, 0, 5, 8, 11]]),
    "own-keys-before-the-prefix": ([3, 3], [[0, 2, 6, 3, 3, 1, 4]]),
    "equal-limits-of-two-contexts": ([3, 3], [[0, 1, 0, 3, 3, 0, 0], [1, 2, 5, 3, 3, 0, 0]]),
    "equal-prefixes-with-other-own-keys": ([3, 3], [[0, 1, 0, 3, 3, 4, 6], [1, 2, 0, 3, 3, 6, 9]]),
    "two-causal-blocks-with-equal-spans": ([2, 5, 2, 5], [[0, 2, 0, 2, 5, 0, 0], [2, 4, 0, 2, 5, 0, 0]]),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("limits, blocks", HAND_MADE.values(), ids=HAND_MADE)
def test_matches_dense_softmax_with(device, limits, blocks, dtype):
    mask = torch.zeros(len(limits), 16, dtype=torch.bool)
    for row_start, row_end, key_start, _, _, own_start, own_end in blocks:
        for row in range(row_start, row_end):
            mask[row, key_start : key_start + limits[row]] = True
            mask[row, own_start:own_end] = True
    check(device, int32(limits), int32(blocks), mask, dtype=dtype)


@pytest.mark.parametrize("limits, blocks", HAND_MADE.values(), ids=HAND_MADE)
def test_works_without_fused_sdpa_backends(limits, blocks):
    with sdpa_kernel(SDPBackend.MATH):
        test_matches_dense_softmax_with("cpu", limits, blocks, torch.float32)


def test_scale_replaces_the_default(device):
    mask = torch.ones(3, 8, dtype=torch.bool)
    for scale in (1.0, 0.03):
        check(device, int32([8] * 3), int32([[0, 3, 0, 8, 8, 0, 0]]), mask, scale=scale)


def test_large_scores_do_not_overflow(device):
    check(device, int32([8] * 3), int32([[0, 3, 0, 8, 8, 0, 0]]), torch.ones(3, 8, dtype=torch.bool), scale=1e4)


def test_accepts_strided_inputs_and_does_not_modify_them(device):
    q, k, v = values(1, 9, 3, 4, 16).to(device).unbind(1)  # as a fused projection leaves them
    limits, blocks = int32(range(1, 10)).to(device), int32([[0, 5, 0, 1, 5, 0, 0], [5, 9, 0, 6, 9, 0, 0]]).to(device)
    before = [t.clone() for t in (q, k, v)]
    out = attention(q, k, v, limits, blocks)
    expected = attention_dense_reference(q, k, v, torch.ones(9, 9, dtype=torch.bool, device=device).tril())
    torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)
    assert all(map(torch.equal, (q, k, v), before))
    assert attention(q.mT.contiguous().mT, k.mT.contiguous().mT, v, limits, blocks).allclose(out, atol=2e-6)


def test_dense_reference_matches_explicit_loops():
    q, k, v = (values(seed, n, heads, 2, dtype=torch.float64) for seed, n, heads in ((1, 3, 4), (2, 5, 2), (3, 5, 2)))
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    out = attention_dense_reference(q, k, v, mask)
    for row, visible in enumerate(mask):
        for head in range(4):
            expected, total = torch.zeros(2, dtype=torch.float64), 0.0
            for key, value in zip(k[visible, head // 2], v[visible, head // 2], strict=True):
                weight = (q[row, head] @ key / 2**0.5).exp()
                expected, total = expected + weight * value, total + weight
            torch.testing.assert_close(out[row, head], expected / total if total else expected)


def test_reference_rejects_spans_past_the_cache():
    q, cache = torch.zeros(1, 2, 16), torch.zeros(4, 2, 16)
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        attention(q, cache, cache, int32([3]), int32([[0, 1, 2, 3, 3, 0, 0]]))


WRONG = {
    "heads-that-do-not-group": ({"q": torch.zeros(3, 5, 16)}, "query heads must be a multiple.*got 5 and 2"),
    "head-dim": ({"k_cache": torch.zeros(8, 2, 32)}, r"k_cache must be \(8, 2, 16\).*got \(8, 2, 32\) torch.float32"),
    "shorter-values": ({"v_cache": torch.zeros(7, 2, 16)}, r"v_cache must be \(8,.*got \(7, 2, 16\) torch.float32"),
    "cache-dtype": ({"v_cache": torch.zeros(8, 2, 16).half()}, "v_cache must be .*float32.*got .* torch.float16"),
    "limits-of-other-rows": ({"limits": int32([8] * 4)}, r"limits must be \(3,\) torch.int32.*got \(4,\) torch.int32"),
    "int64-limits": ({"limits": torch.tensor([8] * 3)}, r"limits must be .*got \(3,\) torch.int64"),
    "int64-blocks": ({"blocks": torch.zeros(1, 7).long()}, r"blocks must be \(n, 7\).*got \(1, 7\) torch.int64"),
    "negative-scale": ({"scale": -1.0}, "scale must be positive and finite, got -1.0"),
    "short-blocks": ({"blocks": int32([[0, 3, 0, 8, 8]])}, r"blocks must be \(n, 7\).*got \(1, 5\) torch.int32"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_rejects_mismatched_argument(change, message):
    good = {"q": torch.zeros(3, 4, 16), "k_cache": torch.zeros(8, 2, 16), "v_cache": torch.zeros(8, 2, 16),
            "limits": int32([8] * 3), "blocks": int32([[0, 3, 0, 8, 8, 0, 0]])}  # fmt: skip
    with pytest.raises(ValueError, match=f"attention: {message}"):
        attention(**(good | change))

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import PLANS, dense_lse, int32, packed_segments, segment, values

from bagel_rt.kernels import attention, attention_dense_reference
from bagel_rt.kernels.attention_backward import visits
from bagel_rt.runtime.plan import Segment, build_plan, visibility

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def gradients(function, inputs, *upstream):
    """Return (outputs, gradients of every input) for the given output gradients."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*inputs)
    return outputs, torch.autograd.grad(outputs, inputs, upstream)


def check(device, segments, Hq=4, Hkv=2, D=16, dtype=torch.float32, block_q=128, extra_slots=0):
    """Gradients through out and lse equal those of dense attention in float64, zero for slots no row attends to."""
    plan = build_plan(segments, block_q)
    mask = torch.from_numpy(visibility(plan))
    mask = torch.nn.functional.pad(mask, (0, extra_slots))
    T, S = mask.shape
    inputs = [values(seed, n, h, D, dtype=dtype) for seed, n, h in ((1, T, Hq), (2, S, Hkv), (3, S, Hkv))]
    upstream = values(4, T, Hq, D, dtype=dtype), values(5, Hq, T)
    upstream[1][:, ~mask.any(1)] = 0  # an lse of -inf has no gradient

    def dense(q, k, v):
        lse = dense_lse(q, k, mask, D**-0.5)
        return attention_dense_reference(q, k, v, mask), lse.nan_to_num(neginf=0)

    _, references = gradients(dense, [x.double() for x in inputs], *(g.double() for g in upstream))
    limits, blocks = torch.from_numpy(plan.limits).to(device), torch.from_numpy(plan.blocks).to(device)
    inputs[1][~mask.any(0)] = inputs[2][~mask.any(0)] = torch.nan
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    _, found = gradients(
        lambda q, k, v: attention(q, k, v, limits, blocks, return_lse=True),
        [x.to(device) for x in inputs], upstream[0].to(device), upstream[1].to(device, wide),
    )  # fmt: skip
    for name, gradient, expected in zip("qkv", found, references, strict=True):
        assert gradient.dtype == dtype and gradient.is_contiguous(), name
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        torch.testing.assert_close(
            gradient.cpu().double() / scale, expected.nan_to_num() / scale, rtol=0, atol=TOLERANCE[dtype], msg=name
        )
    assert not found[1][~mask.any(0).to(device)].any() and not found[2][~mask.any(0).to(device)].any()


@pytest.mark.slow
@pytest.mark.parametrize("segments", PLANS.values(), ids=PLANS)
def test_matches_dense_attention_on(device, segments):
    check(device, segments, block_q=5)


HEADS = [(7, 1, 16), (4, 2, 32), (4, 1, 64), (3, 3, 72), (28, 4, 128)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("Hq, Hkv, D", HEADS, ids=[f"{Hq}-heads-on-{Hkv}-d{D}" for Hq, Hkv, D in HEADS])
def test_matches_dense_attention_for_heads(device, Hq, Hkv, D, dtype):
    segments = [segment("causal", 9, (0, 0), 0, 0), segment("full", 9, (1, 8), 0, 5, write=12)]
    check(device, segments, Hq, Hkv, D, dtype, block_q=16)


TRAINING = [
    segment("causal", 30, (0, 0), 0, 0), segment("full", 25, (1, 24), 0, 30), segment("full", 40, (1, 39), 0, 55, 120),
    segment("causal", 12, (0, 0), 0, 55), segment("full", 37, (1, 36), 0, 67, 170),
    segment("full", 50, (0, 0), 210, 0),
]  # fmt: skip


def test_matches_dense_attention_on_a_training_batch_of_several_tiles(device):
    check(device, TRAINING, Hq=3, Hkv=1, block_q=32, extra_slots=9)


@pytest.mark.slow
@settings(max_examples=25)
@given(segments=packed_segments(), block_q=st.sampled_from([3, 16]))
def test_matches_dense_attention_on_any_plan(device, segments, block_q):
    check(device, segments, 2, 1, block_q=block_q)


@pytest.mark.slow
def test_gradcheck(device):
    plan = build_plan([segment("causal", 2, (0, 0), 0, 1), segment("full", 2, (0, 1), 0, 1, write=4)])
    limits, blocks = torch.from_numpy(plan.limits).to(device), torch.from_numpy(plan.blocks).to(device)
    shapes = (4, 2, 3), (6, 1, 3), (6, 1, 3)
    inputs = [values(n, *shape, dtype=torch.float64).to(device).requires_grad_() for n, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, limits, blocks, 0.7, True), inputs)


def test_only_inputs_that_require_a_gradient_get_one(device):
    q, k, v = (values(n, 5, 2, 16).to(device) for n in range(3))
    q.requires_grad_()
    out = attention(q, k, v, int32([5] * 5).to(device), int32([[0, 5, 0, 5, 5, 0, 0]]).to(device))
    out.square().sum().backward()
    assert q.grad is not None and k.grad is None and v.grad is None
    with torch.no_grad():
        again = attention(q, k, v, int32([5] * 5).to(device), int32([[0, 5, 0, 5, 5, 0, 0]]).to(device))
    assert again.grad_fn is None and torch.allclose(again, out)


def test_compiled_call_has_the_same_gradients():
    plan = build_plan(TRAINING[:3])
    limits, blocks = torch.from_numpy(plan.limits), torch.from_numpy(plan.blocks)
    inputs = [values(n, rows, heads, 16) for n, (rows, heads) in enumerate(((95, 2), (160, 1), (160, 1)))]
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    _, expected = gradients(lambda q, k, v: attention(q, k, v, limits, blocks), inputs, values(4, 95, 2, 16))
    _, found = gradients(lambda q, k, v: compiled(q, k, v, limits, blocks), inputs, values(4, 95, 2, 16))
    torch.testing.assert_close(found, expected)


@given(segments=packed_segments(), block_q=st.sampled_from([1, 3, 16]), tile=st.sampled_from([1, 4, 7, 64]))
def test_visits_cover_every_visible_pair_and_full_visits_need_no_mask(segments, block_q, tile):
    plan = build_plan(segments, block_q)
    mask = visibility(plan)
    order, counts = visits(torch.from_numpy(plan.blocks), mask.shape[1], tile)
    assert order.dtype == counts.dtype == torch.int32
    for number, (blocks, (full, seen)) in enumerate(zip(order.tolist(), counts.tolist(), strict=True)):
        assert sorted(blocks) == list(range(len(plan.blocks)))
        for position, block in enumerate(blocks):
            row_start, row_end = plan.blocks[block, :2]
            tile_mask = mask[row_start:row_end, number * tile : (number + 1) * tile]
            if position < full:
                assert tile_mask.all()
            if position >= seen:
                assert not tile_mask.any()


def test_fully_visible_tile_is_a_full_visit():
    plan = build_plan([Segment("full", np.zeros(8, bool), 0, 8, 8)])
    _, counts = visits(torch.from_numpy(plan.blocks), 20, 8)
    assert counts.tolist() == [[1, 1], [1, 1], [0, 0]]

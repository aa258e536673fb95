"""Tests specific to the Triton attention kernels: tile boundaries, descriptors, tiles of (row, head) pairs."""

import sys

import pytest
import torch
from conftest import DEVICE
from test_attention import check as check_forward
from test_attention import check_plan, int32, segment, values
from test_attention_backward import check as check_backward

from bagel_rt.kernels import attention, attention_dense_reference, configs, decode_attention
from bagel_rt.kernels.attention_tiles import describe_tiles, shape_class
from bagel_rt.runtime.plan import build_plan

pytestmark = pytest.mark.usefixtures("kernels")
attention_module = sys.modules["bagel_rt.kernels.attention"]  # the package's attribute of that name is the function

LONG = [
    segment("causal", 25, (0, 0), 0, 37), segment("full", 20, (1, 19), 0, 62),
    segment("full", 37, (1, 36), 0, 82, 90), segment("full", 37, (1, 36), 0, 50, 130),
]  # fmt: skip
LOADS = ["pointers", "host descriptors", "device descriptors"]


@pytest.fixture(params=LOADS)
def small_tiles(request, monkeypatch):
    """Use small tiles, so that few rows give whole and partial tiles of both spans and several query tiles."""
    tiles = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    walk = tiles | {"BLOCK_TAIL": 16, "LOADS": request.param}
    for op, chosen in (("attention", walk), ("attention_dq", walk), ("attention_dk_dv", tiles)):
        for name in configs.TABLE[op]["sm_90"]:
            entry = {"tiles": chosen, "source": "a test"}
            monkeypatch.setitem(configs.TABLE[op][configs.architecture(DEVICE)], name, entry)
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize(
    "Hq, Hkv, D, dtype",
    [(3, 1, 16, torch.float32), (2, 2, 72, torch.float16), (7, 1, 32, torch.bfloat16), (4, 2, 8, torch.float16)],
    ids=str,
)
def test_whole_and_partial_tiles_of_both_spans(small_tiles, Hq, Hkv, D, dtype):
    check_plan(DEVICE, LONG, Hq=Hq, Hkv=Hkv, D=D, dtype=dtype)


@pytest.mark.slow
def test_gradients_of_whole_and_partial_tiles(small_tiles):
    check_backward(DEVICE, LONG, Hq=3, Hkv=1, dtype=torch.float16)


@pytest.mark.parametrize("key_start, full_end, own", [(0, 64, 32), (5, 63, 31), (1, 65, 33), (0, 0, 64), (3, 32, 0)])
def test_spans_that_end_at_or_next_to_a_tile_boundary(small_tiles, key_start, full_end, own):
    own_start = key_start + full_end + 7 if own else 0
    limits, mask = [full_end, full_end + 3, full_end], torch.zeros(3, 180, dtype=torch.bool)
    for row, limit in enumerate(limits):
        mask[row, key_start : key_start + limit] = True
        mask[row, own_start : own_start + own] = True
    block = [0, 3, key_start, full_end, full_end + 3, own_start, own_start + own]
    check_forward(DEVICE, int32(limits), int32([block]), mask)


def strided(cache, dtype):
    """Cache views that TMA descriptors can and cannot address."""
    S, heads, D = cache.shape
    wide = torch.full((S, heads, D + 8), torch.nan, dtype=dtype, device=DEVICE)
    wide[..., :D] = cache
    layers = torch.full((3, S, heads, D), torch.nan, dtype=dtype, device=DEVICE)
    layers[1] = cache
    odd = torch.full((S * heads * D + 1,), torch.nan, dtype=dtype, device=DEVICE)[1:].view(S, heads, D)
    odd.copy_(cache)
    apart = cache.new_empty(S, heads, D, 2)[..., 0].copy_(cache)
    return {"wider-heads": wide[..., :D], "one-of-three-layers": layers[1], "odd-address": odd, "channels-apart": apart}


@pytest.mark.slow
def test_reads_strided_caches_in_place(small_tiles):
    plan = build_plan(LONG[2:3])
    limits, blocks = torch.from_numpy(plan.limits).to(DEVICE), torch.from_numpy(plan.blocks).to(DEVICE)
    q = values(1, len(plan.order), 4, 16, dtype=torch.float16).to(DEVICE)
    k, v = (values(seed, 130, 2, 16, dtype=torch.float16).to(DEVICE) for seed in (2, 3))
    expected = attention(q, k, v, limits, blocks)
    for name, view in strided(k, q.dtype).items():
        found = attention(q, view, strided(v, q.dtype)[name], limits, blocks)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=name)


def test_unaligned_caches_are_read_through_pointers():
    tiles = {"LOADS": "host descriptors", "BLOCK_N": 16}
    aligned = torch.zeros(8, 2, 16, dtype=torch.float16)
    odd = torch.zeros(8 * 2 * 16 + 1, dtype=torch.float16)[1:].view(8, 2, 16)
    narrow = torch.zeros(8, 2, 12, dtype=torch.float16)[..., :4]
    described = describe_tiles(aligned, aligned, 16, tiles)
    assert [x.block_shape for x in described[:2]] == [[16, 1, 16]] * 2 and described[2] == tiles
    for cache in (odd, narrow, aligned[:0]):
        k, v, changed = describe_tiles(aligned, cache, 16, tiles)
        assert k is aligned and v is cache and changed["LOADS"] == "pointers"


def test_blocks_of_few_rows_do_not_affect_other_blocks(small_tiles):
    q = values(1, 5, 7, 16, dtype=torch.float16).to(DEVICE)
    k, v = (values(seed, 80, 1, 16, dtype=torch.float16).to(DEVICE) for seed in (2, 3))
    limits = int32([60, 61, 62, 9, 70]).to(DEVICE)
    blocks = int32([[0, 3, 2, 60, 62, 0, 0], [3, 4, 0, 9, 9, 70, 73], [4, 5, 4, 70, 70, 0, 0]]).to(DEVICE)
    out = attention(q, k, v, limits, blocks)
    for row, (start, limit, own) in enumerate([(2, 60, None), (2, 61, None), (2, 62, None), (0, 9, 70), (4, 70, None)]):
        seen = list(range(start, start + limit)) + ([] if own is None else list(range(own, own + 3)))
        mask = torch.ones(1, len(seen), dtype=torch.bool, device=DEVICE)
        expected = attention_dense_reference(q[row : row + 1].double(), k[seen].double(), v[seen].double(), mask)
        torch.testing.assert_close(out[row : row + 1].double(), expected, rtol=2e-3, atol=2e-3)


def test_one_row_blocks_use_whole_tiles(small_tiles):
    q = values(1, 3, 7, 16, dtype=torch.float16).to(DEVICE)
    k, v = (values(seed, 200, 1, 16, dtype=torch.float16).to(DEVICE) for seed in (2, 3))
    starts, lengths = torch.tensor([0, 3, 60], device=DEVICE), torch.tensor([64, 130, 0], device=DEVICE)
    mask = torch.zeros(3, 200, dtype=torch.bool, device=DEVICE)
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        mask[row, start : start + length] = True
    expected = attention_dense_reference(q.double(), k.double(), v.double(), mask)
    out = decode_attention(q, k, v, starts, lengths)
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)


def test_table_has_every_shape_class_for_every_architecture():
    queries = [torch.zeros(1, Hq, D, dtype=dtype) for Hq in (1, 28) for D in (4, 16, 64, 72, 128)
               for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)]  # fmt: skip
    forward = {shape_class(q, rows) for q in queries for rows in (1, 128)}
    backward = {shape_class(q) for q in queries}
    for architecture in configs.ARCHITECTURES:
        assert set(configs.TABLE["attention"][architecture]) == forward
        assert set(configs.TABLE["attention_dq"][architecture]) == backward
        assert set(configs.TABLE["attention_dk_dv"][architecture]) == backward


def test_heads_above_max_head_dim_run_the_reference(monkeypatch):
    monkeypatch.setattr(attention_module, "launch_kernel", None)
    q = values(1, 2, 1, 160).to(DEVICE)
    out = attention(q, q, q, int32([2, 2]).to(DEVICE), int32([[0, 2, 0, 2, 2, 0, 0]]).to(DEVICE))
    expected = attention_dense_reference(q, q, q, torch.ones(2, 2, dtype=torch.bool, device=DEVICE))
    torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)

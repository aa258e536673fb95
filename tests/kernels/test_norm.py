import pytest
import torch

from bagel_rt.kernels import rms_norm

SHAPES = [
    pytest.param(T, G, H, id=f"{T}rows-{G}gen-h{H}")
    for T, G, H in [
        (0, 0, 64), (1, 0, 64), (1, 1, 64), (5, 5, 1), (7, 3, 3584), (130, 128, 72), (33, 0, 100), (13, 6, 1031),
        (2, 1, 9001),
    ]
]  # fmt: skip
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def rows(seed, *shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def by_the_book(x, w_first, w_rest, G, eps):
    """The formula in float64 on the CPU."""
    x, w_first, w_rest = x.cpu().double(), w_first.cpu().double(), w_rest.cpu().double()
    out = torch.empty_like(x)
    for r, row in enumerate(x):
        out[r] = row / (row.pow(2).sum() / len(row) + eps).sqrt() * (w_first if r < G else w_rest)
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scale", [30.0, 1e-3], ids=["large", "near-eps"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("T, G, H", SHAPES)
def test_matches_the_formula_in_float64(T, G, H, with_residual, scale, dtype, device):
    x, r = (rows(seed, T, H).mul(scale).to(device, dtype) for seed in (1, 2))
    w_first, w_rest = (rows(seed, H, dtype=dtype, device=device) for seed in (3, 4))
    y, summed = rms_norm(x, r if with_residual else None, w_first, w_rest, G, 1e-6)
    want_summed = x + r if with_residual else x
    assert torch.equal(summed, want_summed)
    expected = by_the_book(want_summed, w_first, w_rest, G, 1e-6)
    assert y.dtype == dtype
    torch.testing.assert_close(y.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_the_normalized_value_before_the_weight(dtype, device):
    x, w = rows(1, 40, 96, dtype=dtype, device=device), rows(2, 96, dtype=dtype, device=device)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    y, _ = rms_norm(x, None, w, w, 13, 1e-6)
    rounded_first, rounded_last = normed.to(dtype) * w, (normed * w.float()).to(dtype)
    assert (y != rounded_first).sum() <= 4, "more than the last bit of a float32 sum explains"
    assert (y != rounded_last).sum() > 400, "these inputs do not tell the two orders apart"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_the_residual_sum_before_the_norm(dtype, device):
    x, r = (rows(seed, 40, 96, dtype=dtype, device=device) for seed in (1, 2))
    ones = torch.ones(96, dtype=dtype, device=device)
    y, _ = rms_norm(x, r, ones, ones, 13, 1e-6)
    unrounded = x.float() + r.float()
    late = unrounded * torch.rsqrt(unrounded.square().mean(-1, keepdim=True) + 1e-6)
    assert (y != rms_norm(x + r, None, ones, ones, 13, 1e-6)[0]).sum() <= 4
    assert (y != late.to(dtype)).sum() > 400, "these inputs do not tell the two orders apart"


@pytest.mark.parametrize("dtype, magnitude", [(torch.float16, 6e4), (torch.bfloat16, 1e17), (torch.float32, 1e17)])
def test_squares_are_not_taken_in_half_precision(dtype, magnitude, device):
    x, w = rows(1, 3, 512, device=device).sign().mul(magnitude).to(dtype), torch.ones(512, dtype=dtype, device=device)
    torch.testing.assert_close(rms_norm(x, None, w, w, 1, 1e-6)[0].float(), x.sign().float(), rtol=1e-6, atol=0)


def test_rows_of_zeros_stay_zero(device):
    zeros, ones = torch.zeros(2, 8, device=device), torch.ones(8, device=device)
    y, _ = rms_norm(zeros, None, ones, ones, 1, 1e-6)
    assert torch.equal(y, zeros)


def test_without_residual_returns_the_input_itself(device):
    x, ones = rows(1, 3, 8, device=device), torch.ones(8, device=device)
    assert rms_norm(x, None, ones, ones, 1, 1e-6)[1] is x


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_accepts_strided_inputs_and_does_not_modify_them(with_residual, device):
    w_first, w_rest = rows(1, 32, device=device)[::2], rows(2, 16, device=device)
    among_nans = torch.full((8, 40), float("nan"), device=device)
    among_nans[1:7, 8:24] = rows(3, 6, 16, device=device)
    strides = (
        rows(4, 12, 16, device=device)[::2],
        rows(5, 16, 6, device=device).t(),
        rows(6, 16, device=device).expand(6, -1),
    )
    for strided in (among_nans[1:7, 8:24], *strides):
        before = strided.clone()
        r = strided.flip(0) if with_residual else None
        y, summed = rms_norm(strided, r, w_first, w_rest, 2, 1e-6)
        expected, want_summed = rms_norm(strided.contiguous(), r, w_first.contiguous(), w_rest, 2, 1e-6)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(summed, want_summed)
        assert torch.equal(strided, before)
        assert y.is_contiguous() and (r is None or summed.is_contiguous())


def test_adds_a_strided_residual(device):
    x, ones = rows(1, 6, 16, device=device), torch.ones(16, device=device)
    for residual in (rows(2, 6, 40, device=device)[:, 8:24], rows(3, 16, 6, device=device).t()):
        assert torch.equal(rms_norm(x, residual, ones, ones, 2, 1e-6)[1], x + residual)


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_one_weight_serves_all_rows(with_residual, device):
    x, w = rows(1, 5, 72, device=device), rows(2, 72, device=device)
    residual = x if with_residual else None
    for one, other in zip(rms_norm(x, residual, w), rms_norm(x, residual, w, w, 3, 1e-6), strict=True):
        assert torch.equal(one, other)


def test_rejects_g_above_the_number_of_rows():
    with pytest.raises(ValueError, match="G must be from 0 to 3, the rows of x, got 4"):
        rms_norm(torch.zeros(3, 8), None, torch.ones(8), torch.ones(8), 4, 1e-6)


def test_rejects_negative_g():
    with pytest.raises(ValueError, match="G must be from 0 to 3, the rows of x, got -1"):
        rms_norm(torch.zeros(3, 8), None, torch.ones(8), torch.ones(8), -1, 1e-6)


def test_rejects_mismatched_argument():
    x, w = torch.zeros(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"w_first must be \(8,\) torch.float32.*got \(7,\) torch.float32"):
        rms_norm(x, None, torch.ones(7), w, 1, 1e-6)
    with pytest.raises(ValueError, match=r"w_rest must be \(8,\) torch.float32.*got \(8,\) torch.float64"):
        rms_norm(x, None, w, w.double(), 1, 1e-6)
    with pytest.raises(ValueError, match=r"residual must be \(3, 8\) torch.float32.*got \(2, 8\) torch.float32"):
        rms_norm(x, x[:2], w, w, 1, 1e-6)

import pytest
import torch

from bagel_rt.kernels import rms_norm

SHAPES = [
    pytest.param(T, G, H, id=f"{T}rows-{G}gen-h{H}")
    for T, G, H in [(0, 0, 64), (1, 0, 64), (1, 1, 64), (5, 5, 1), (7, 3, 3584), (130, 128, 72), (33, 0, 100)]
]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def rows(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_the_book(x, w_gen, w_und, G, eps):
    out = torch.empty_like(x)
    for r, row in enumerate(x):
        out[r] = row / (row.pow(2).sum() / len(row) + eps).sqrt() * (w_gen if r < G else w_und)
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scale", [30.0, 1e-3], ids=["large", "near-eps"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("T, G, H", SHAPES)
def test_matches_the_formula_in_float64(T, G, H, with_residual, scale, dtype):
    x, r = (rows(seed, T, H).mul(scale).to(dtype) for seed in (1, 2))
    w_gen, w_und = (rows(seed, H, dtype=dtype) for seed in (3, 4))
    y, summed = rms_norm(x, r if with_residual else None, w_gen, w_und, G, 1e-6)
    want_summed = x + r if with_residual else x
    assert torch.equal(summed, want_summed)
    want = by_the_book(want_summed.double(), w_gen.double(), w_und.double(), G, 1e-6)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_the_normalised_value_before_the_weight(dtype):
    x, w = rows(1, 40, 96, dtype=dtype), rows(2, 96, dtype=dtype)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    y, _ = rms_norm(x, None, w, w, 13, 1e-6)
    assert torch.equal(y, normed.to(dtype) * w)
    assert not torch.equal(y, (normed * w.float()).to(dtype)), "these inputs do not tell the two orders apart"


def test_rows_of_zeros_stay_zero():
    y, _ = rms_norm(torch.zeros(2, 8), None, torch.ones(8), torch.ones(8), 1, 1e-6)
    assert torch.equal(y, torch.zeros(2, 8))


def test_without_residual_hands_back_the_input_itself():
    x = rows(1, 3, 8)
    assert rms_norm(x, None, torch.ones(8), torch.ones(8), 1, 1e-6)[1] is x


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_inputs_are_left_alone_and_need_not_be_contiguous(with_residual):
    w_gen, w_und = rows(1, 16), rows(2, 16)
    for strided in (rows(3, 6, 40)[:, 8:24], rows(4, 12, 16)[::2], rows(5, 16, 6).t()):
        before = strided.clone()
        r = strided.flip(0) if with_residual else None
        y, _ = rms_norm(strided, r, w_gen, w_und, 2, 1e-6)
        want, _ = rms_norm(strided.contiguous(), r, w_gen, w_und, 2, 1e-6)
        torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
        assert torch.equal(strided, before)


def test_refuses_more_generation_rows_than_rows():
    with pytest.raises(ValueError, match="G=4 generation rows, but x has 3 rows"):
        rms_norm(torch.zeros(3, 8), None, torch.ones(8), torch.ones(8), 4, 1e-6)


def test_refuses_negative_generation_rows():
    with pytest.raises(ValueError, match="G=-1"):
        rms_norm(torch.zeros(3, 8), None, torch.ones(8), torch.ones(8), -1, 1e-6)


def test_names_the_tensor_that_does_not_fit():
    x, w = torch.zeros(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"w_gen is \(7,\) torch.float32, expected \(8,\) torch.float32"):
        rms_norm(x, None, torch.ones(7), w, 1, 1e-6)
    with pytest.raises(ValueError, match=r"w_und is \(8,\) torch.float64, expected \(8,\) torch.float32"):
        rms_norm(x, None, w, w.double(), 1, 1e-6)
    with pytest.raises(ValueError, match=r"residual is \(2, 8\) torch.float32, expected \(3, 8\) torch.float32"):
        rms_norm(x, x[:2], w, w, 1, 1e-6)

import pytest
import torch

from bagel_rt.kernels import linear

SHAPES = [
    pytest.param(T, G, K, N, id=f"{T}rows-{G}gen-k{K}-n{N}")
    for T, G, K, N in [
        (0, 0, 64, 96), (1, 0, 64, 96), (1, 1, 64, 96), (5, 5, 3, 2), (6, 1, 1, 2), (7, 3, 100, 66),
        (130, 128, 129, 258),
    ]
]  # fmt: skip
EPILOGUES = ["none", "bias", "residual", "swiglu", "bias-swiglu"]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def values(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(T, K, N, epilogue, dtype):
    """x, w_gen, w_und with outputs of order one, and the keyword arguments of an epilogue."""
    x, w_gen, w_und = values(1, T, K, dtype=dtype), values(2, N, K) / K**0.5, values(3, N, K) / K**0.5
    extra = {"swiglu": "swiglu" in epilogue}
    if "bias" in epilogue:
        extra |= {"bias_gen": values(4, N, dtype=dtype), "bias_und": values(5, N, dtype=dtype)}
    if epilogue == "residual":
        extra |= {"residual": values(6, T, N, dtype=dtype)}
    return (x, w_gen.to(dtype), w_und.to(dtype)), extra


def by_the_book(x, w_gen, w_und, G, bias_gen=None, bias_und=None, residual=None, swiglu=False):
    rows = []
    for r in range(len(x)):
        w, bias = (w_gen, bias_gen) if r < G else (w_und, bias_und)
        row = (w.double() * x[r].double()).sum(1)
        if bias is not None:
            row = row + bias.double()
        if residual is not None:
            row = row + residual[r].double()
        if swiglu:
            gate, up = row[0::2], row[1::2]
            row = gate / (1 + torch.exp(-gate)) * up
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros(0, len(w_gen) // (2 if swiglu else 1), dtype=torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("T, G, K, N", SHAPES)
def test_matches_the_formula_in_float64(T, G, K, N, epilogue, dtype):
    args, extra = arguments(T, K, N, epilogue, dtype)
    y = linear(*args, G=G, **extra)
    assert y.dtype == dtype and y.is_contiguous()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(y.double(), by_the_book(*args, G, **extra), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("G", [0, 2, 6], ids=lambda G: f"{G}gen")
def test_inputs_need_not_be_contiguous_and_are_left_alone(G, epilogue):
    args, extra = arguments(6, 16, 8, epilogue, torch.float32)
    spread = {name: t.repeat_interleave(2, -1)[..., ::2] for name, t in extra.items() if isinstance(t, torch.Tensor)}
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in args]
    before = [t.clone() for t in (*strided, *spread.values())]
    torch.testing.assert_close(linear(*strided, G=G, **(extra | spread)), linear(*args, G=G, **extra))
    assert all(map(torch.equal, (*strided, *spread.values()), before))


@pytest.mark.parametrize("dtype, step", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
@pytest.mark.parametrize("G", [0, 2, 5], ids=lambda G: f"{G}gen")
def test_sum_with_the_residual_is_rounded_once(G, dtype, step):
    x = torch.tensor([1, step], dtype=dtype).expand(5, 2)  # the product 1 + step rounds to 1; less 1 it is exact
    w, residual = torch.ones(3, 2, dtype=dtype), -torch.ones(5, 3, dtype=dtype)
    assert (linear(x, w, w, G=G, residual=residual) == step).all()


def test_refuses_epilogues_that_exclude_each_other():
    x, w, b = torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(4)
    with pytest.raises(ValueError, match="residual excludes a bias"):
        linear(x, w, w, b, b, G=1, residual=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="residual excludes swiglu"):
        linear(x, w, w, G=1, residual=torch.zeros(3, 4), swiglu=True)


def test_names_the_argument_that_does_not_fit():
    x, w, b = torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(4)
    with pytest.raises(ValueError, match="G=4 generation rows, but x has 3 rows"):
        linear(x, w, w, G=4)
    with pytest.raises(ValueError, match=r"w_gen is \(4, 7\) torch.float32, expected \(4, 8\)"):
        linear(x, w[:, :7], w, G=1)
    with pytest.raises(ValueError, match=r"w_und is \(5, 8\) torch.float32, expected \(4, 8\)"):
        linear(x, w, torch.zeros(5, 8), G=1)
    with pytest.raises(ValueError, match="w_gen is .* torch.bfloat16, expected .* torch.float32"):
        linear(x, w.bfloat16(), w.bfloat16(), G=1)
    with pytest.raises(ValueError, match="bias_und is None but the other bias is given"):
        linear(x, w, w, b, G=1)
    with pytest.raises(ValueError, match=r"bias_gen is \(3,\) torch.float32, expected \(4,\)"):
        linear(x, w, w, b[:3], b, G=1)
    with pytest.raises(ValueError, match=r"residual is \(3, 5\) torch.float32, expected \(3, 4\)"):
        linear(x, w, w, G=1, residual=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="swiglu pairs weight rows .* but there are 3 rows"):
        linear(x, w[:3], w[:3], G=1, swiglu=True)

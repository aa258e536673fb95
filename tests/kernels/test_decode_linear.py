import pytest
import torch
import torch.nn.functional as F

from bagel_rt.kernels import decode_linear, extension, linear, rms_norm

# Of one rounding of y and two of the normalised row, whose errors mix in the sum.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}
EPILOGUES = ("none", "residual", "swiglu")
SHAPES = {
    "one-output-of-one-chunk": (1, 8, 2),
    "one-chunk-in-a-second-step-of-a-lane": (1, 264, 18),
    "a-row-longer-than-what-is-in-flight": (2, 1032, 4),
    "more-outputs-than-blocks": (1, 64, 198),
    "three-rows": (3, 136, 34),
    "five-rows-in-several-rounds": (5, 520, 130),
    "eight-rows": (8, 1096, 66),
}


def guarded(tensor, device):
    """Copy a tensor into a larger one of NaN, so that an out-of-bounds read shows."""
    apart = 64  # elements: 16-byte alignment stays
    held = torch.full((tensor.numel() + 2 * apart,), torch.nan, dtype=tensor.dtype, device=device)
    inside = held[apart:-apart].view(tensor.shape)
    return inside.copy_(tensor)


def arguments(B, K, N, epilogue="none", norm=True, dtype=torch.bfloat16, device="cpu"):
    generator = torch.Generator().manual_seed(B * 1000 + K + N)

    def values(*shape, deviation=1.0):
        return guarded((torch.randn(*shape, generator=generator) * deviation).to(dtype), device)

    x, w = values(B, K, deviation=3), values(N, K, deviation=K**-0.5)
    given = {"norm": values(K) if norm else None, "eps": 1e-6}
    return x, w, given | {"residual": values(B, N) if epilogue == "residual" else None, "swiglu": epilogue == "swiglu"}


def formula(x, w, norm, eps, residual, swiglu):
    """The formula in float64."""
    x, w = x.double(), w.double()
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.double()
    y = x @ w.T
    if residual is not None:
        y = y + residual.double()
    return F.silu(y[:, 0::2]) * y[:, 1::2] if swiglu else y


def assert_right(got, x, w, given):
    want = formula(x, w, **given)
    scale = want.abs() + want.square().mean().sqrt()
    error = ((got.double() - want) / scale).abs().max()
    assert got.dtype == x.dtype and got.shape == want.shape and got.is_contiguous()
    assert error <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("B, K, N", SHAPES.values(), ids=SHAPES)
def test_matches_float64(extension_device, launches, B, K, N, epilogue, norm, dtype):
    seen = launches("decode_linear")
    x, w, given = arguments(B, K, N, epilogue, norm, dtype, extension_device)
    assert_right(decode_linear(x, w, **given), x, w, given)
    assert seen == ["decode_linear"]


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("B", [9, 16, 32])
def test_more_rows_than_the_kernel_supports_fall_back(extension_device, launches, B, epilogue):
    seen = launches("decode_linear")
    x, w, given = arguments(B, 136, 34, epilogue, device=extension_device)
    assert_right(decode_linear(x, w, **given), x, w, given)
    assert seen == []


@pytest.mark.parametrize("N", [1, 15, 49])
def test_odd_number_of_outputs(extension_device, N):
    for epilogue in ("none", "residual"):
        x, w, given = arguments(2, 72, N, epilogue, device=extension_device)
        assert_right(decode_linear(x, w, **given), x, w, given)


@pytest.mark.parametrize("B", [1, 2])
def test_full_depth_down_projection(extension_device, B):
    x, w, given = arguments(B, 18944, 6, "residual", norm=False, device=extension_device)
    assert_right(decode_linear(x, w, **given), x, w, given)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
def test_row_is_bitwise_independent_of_the_batch(extension_device, epilogue, norm, dtype):
    x, w, given = arguments(8, 1048, 50, epilogue, norm, dtype, extension_device)
    alone = []
    for b in range(8):
        residual = None if given["residual"] is None else given["residual"][b : b + 1]
        alone.append(decode_linear(x[b : b + 1], w, **given | {"residual": residual}))
    for B in range(1, 9):
        residual = None if given["residual"] is None else given["residual"][:B]
        together = decode_linear(x[:B], w, **given | {"residual": residual})
        assert torch.equal(together, torch.cat(alone[:B])), B


def test_nan_and_infinity_stay_in_their_row(extension_device):
    x, w, given = arguments(3, 136, 20, device=extension_device)
    want = decode_linear(x[:1], w, **given)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    got = decode_linear(x, w, **given)
    assert torch.equal(got[:1], want) and got[1:].isnan().all()


def test_result_is_independent_of_the_schedule(emulated_extension):
    x, w, given = arguments(3, 520, 130, "swiglu")
    want = decode_linear(x, w, **given)
    for seed in (1, 2):
        emulated_extension.set_schedule(seed)
        assert torch.equal(decode_linear(x, w, **given), want)


def test_large_activation_does_not_overflow_silu(extension_device):
    x, w, given = arguments(1, 64, 8, "swiglu", norm=False, device=extension_device)
    x *= 2000
    assert_right(decode_linear(x, w, **given), x, w, given)


def test_accepts_slices_of_larger_tensors(extension_device, launches):
    seen = launches("decode_linear")
    x, w, given = arguments(4, 256, 40, "residual", device=extension_device)
    same = decode_linear(x, w, **given)
    wide_x, wide_w = torch.full((4, 264), torch.nan), torch.full((40, 272), torch.nan)
    wide_x, wide_w = (t.to(extension_device, torch.bfloat16) for t in (wide_x, wide_w))
    wide_x[:, :256], wide_w[:, 8:264] = x, w
    residual = given["residual"].mT.contiguous().mT
    got = decode_linear(wide_x[:, :256], wide_w[:, 8:264], **given | {"residual": residual})
    assert torch.equal(got, same)
    column_major = x.mT.contiguous().mT
    assert torch.equal(decode_linear(column_major, w, **given), same)
    odd = torch.zeros(4, 257, device=extension_device, dtype=x.dtype)
    odd[:, :256] = x
    assert torch.equal(decode_linear(odd[:, :256], w, **given), same)
    assert len(seen) == 4


def test_unsupported_calls_compose_other_ops(extension_device, launches):
    seen = launches("decode_linear")
    x, w, given = arguments(9, 64, 16, device=extension_device)

    def composed(x, w, norm, **rest):
        return linear(rms_norm(x, None, norm, norm, 0, 1e-6)[0], w, w, G=0, residual=None, swiglu=False)

    def check(x, w, norm=given["norm"]):
        assert torch.equal(decode_linear(x, w, **given | {"norm": norm}), composed(x, w, norm))

    check(x, w)  # nine rows
    check(x[:0], w)
    check(x[:2].half(), w.half(), given["norm"].half())
    check(x[:2].double(), w.double(), given["norm"].double())
    check(x[:2, :36], w[:, :36].contiguous(), given["norm"][:36])  # rows of 72 bytes
    shifted = torch.cat([w.flatten()[:1], w.flatten()])[1:].view_as(w)
    check(x[:2], shifted)  # not aligned
    check(x[:2], w, given["norm"].repeat_interleave(2)[::2])  # a norm that would have to be copied
    deep, wide, narrow = arguments(8, 16384, 2, device=extension_device)
    assert decode_linear(deep, wide, **narrow).shape == (8, 2)  # 256 KiB of normalised rows
    want = w.clone().requires_grad_()
    decode_linear(x[:2], want, **given).float().sum().backward()
    assert want.grad is not None
    assert seen == []


def test_runs_without_an_extension(monkeypatch):
    monkeypatch.setattr(extension, "EXTENSION", None)
    x, w, given = arguments(2, 64, 16, dtype=torch.float32)
    assert_right(decode_linear(x, w, **given), x, w, given)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"w": torch.zeros(6, 7)}, r"w must be \(6, 8\) torch.float32.*got \(6, 7\) torch.float32"),
        ({"w": torch.zeros(6, 8).half()}, r"w must be \(6, 8\) torch.float32.*got \(6, 8\) torch.float16"),
        ({"norm": torch.zeros(7)}, r"norm must be \(8,\) torch.float32.*got \(7,\) torch.float32"),
        ({"residual": torch.zeros(2, 5)}, r"residual must be \(2, 6\) torch.float32.*got \(2, 5\) torch.float32"),
        ({"residual": torch.zeros(2, 6), "swiglu": True}, "residual must be None with swiglu"),
        ({"norm": torch.zeros(8, device="meta")}, "norm must be on cpu like x, got meta"),
        ({"w": torch.zeros(5, 8), "swiglu": True}, "w must have an even number of rows with swiglu, got 5"),
    ],
)
def test_rejects_mismatched_argument(changed, message):
    given = {"w": torch.zeros(6, 8), "norm": torch.zeros(8)} | changed
    with pytest.raises(ValueError, match=f"decode_linear: {message}"):
        decode_linear(torch.zeros(2, 8), given.pop("w"), **given)

import pytest
import torch
import torch.nn.functional as F

from bagel_rt.kernels import decode_linear, extension, linear, rms_norm

# Of one rounding of y and two of the normalized row, whose errors mix in the sum.
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
    padding = 64  # elements: 16-byte alignment stays
    padded = torch.full((tensor.numel() + 2 * padding,), torch.nan, dtype=tensor.dtype, device=device)
    inside = padded[padding:-padding].view(tensor.shape)
    return inside.copy_(tensor)


def arguments(B, K, N, epilogue="none", norm=True, dtype=torch.bfloat16, device="cpu"):
    generator = torch.Generator().manual_seed(B * 1000 + K + N)

    def values(*shape, deviation=1.0):
        return guarded((torch.randn(*shape, generator=generator) * deviation).to(dtype), device)

    x, w = values(B, K, deviation=3), values(N, K, deviation=K**-0.5)
    options = {"norm": values(K) if norm else None, "eps": 1e-6}
    options |= {"residual": values(B, N) if epilogue == "residual" else None, "swiglu": epilogue == "swiglu"}
    return x, w, options


def formula(x, w, norm, eps, residual, swiglu):
    """The formula in float64."""
    x, w = x.double(), w.double()
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.double()
    y = x @ w.T
    if residual is not None:
        y = y + residual.double()
    return F.silu(y[:, 0::2]) * y[:, 1::2] if swiglu else y


def assert_correct(actual, x, w, options):
    expected = formula(x, w, **options)
    scale = expected.abs() + expected.square().mean().sqrt()
    error = ((actual.double() - expected) / scale).abs().max()
    assert actual.dtype == x.dtype and actual.shape == expected.shape and actual.is_contiguous()
    assert error <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("B, K, N", SHAPES.values(), ids=SHAPES)
def test_matches_float64(extension_device, launches, B, K, N, epilogue, norm, dtype):
    seen = launches("decode_linear")
    x, w, options = arguments(B, K, N, epilogue, norm, dtype, extension_device)
    assert_correct(decode_linear(x, w, **options), x, w, options)
    assert seen == ["decode_linear"]


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("B", [9, 16, 32])
def test_more_rows_than_the_kernel_supports_fall_back(extension_device, launches, B, epilogue):
    seen = launches("decode_linear")
    x, w, options = arguments(B, 136, 34, epilogue, device=extension_device)
    assert_correct(decode_linear(x, w, **options), x, w, options)
    assert seen == []


@pytest.mark.parametrize("N", [1, 15, 49])
def test_odd_number_of_outputs(extension_device, N):
    for epilogue in ("none", "residual"):
        x, w, options = arguments(2, 72, N, epilogue, device=extension_device)
        assert_correct(decode_linear(x, w, **options), x, w, options)


@pytest.mark.parametrize("B", [1, 2])
def test_full_depth_down_projection(extension_device, B):
    x, w, options = arguments(B, 18944, 6, "residual", norm=False, device=extension_device)
    assert_correct(decode_linear(x, w, **options), x, w, options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
def test_row_is_bitwise_independent_of_the_batch(extension_device, epilogue, norm, dtype):
    x, w, options = arguments(8, 1048, 50, epilogue, norm, dtype, extension_device)
    alone = []
    for b in range(8):
        residual = None if options["residual"] is None else options["residual"][b : b + 1]
        alone.append(decode_linear(x[b : b + 1], w, **options | {"residual": residual}))
    for B in range(1, 9):
        residual = None if options["residual"] is None else options["residual"][:B]
        together = decode_linear(x[:B], w, **options | {"residual": residual})
        assert torch.equal(together, torch.cat(alone[:B])), B


def test_nan_and_infinity_stay_in_their_row(extension_device):
    x, w, options = arguments(3, 136, 20, device=extension_device)
    expected = decode_linear(x[:1], w, **options)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    actual = decode_linear(x, w, **options)
    assert torch.equal(actual[:1], expected) and actual[1:].isnan().all()


def test_result_is_independent_of_the_schedule(emulated_extension):
    x, w, options = arguments(3, 520, 130, "swiglu")
    expected = decode_linear(x, w, **options)
    for seed in (1, 2):
        emulated_extension.set_schedule(seed)
        assert torch.equal(decode_linear(x, w, **options), expected)


def test_large_activation_does_not_overflow_silu(extension_device):
    x, w, options = arguments(1, 64, 8, "swiglu", norm=False, device=extension_device)
    x *= 2000
    assert_correct(decode_linear(x, w, **options), x, w, options)


def test_accepts_slices_of_larger_tensors(extension_device, launches):
    seen = launches("decode_linear")
    x, w, options = arguments(4, 256, 40, "residual", device=extension_device)
    same = decode_linear(x, w, **options)
    wide_x, wide_w = torch.full((4, 264), torch.nan), torch.full((40, 272), torch.nan)
    wide_x, wide_w = (t.to(extension_device, torch.bfloat16) for t in (wide_x, wide_w))
    wide_x[:, :256], wide_w[:, 8:264] = x, w
    residual = options["residual"].mT.contiguous().mT
    actual = decode_linear(wide_x[:, :256], wide_w[:, 8:264], **options | {"residual": residual})
    assert torch.equal(actual, same)
    column_major = x.mT.contiguous().mT
    assert torch.equal(decode_linear(column_major, w, **options), same)
    odd = torch.zeros(4, 257, device=extension_device, dtype=x.dtype)
    odd[:, :256] = x
    assert torch.equal(decode_linear(odd[:, :256], w, **options), same)
    assert len(seen) == 4


def test_unsupported_calls_compose_other_ops(extension_device, launches):
    seen = launches("decode_linear")
    x, w, options = arguments(9, 64, 16, device=extension_device)

    def composed(x, w, norm, **rest):
        return linear(rms_norm(x, None, norm, norm, 0, 1e-6)[0], w, w, G=0, residual=None, swiglu=False)

    def check(x, w, norm=options["norm"]):
        assert torch.equal(decode_linear(x, w, **options | {"norm": norm}), composed(x, w, norm))

    check(x, w)  # nine rows
    check(x[:0], w)
    check(x[:2].half(), w.half(), options["norm"].half())
    check(x[:2].double(), w.double(), options["norm"].double())
    check(x[:2, :36], w[:, :36].contiguous(), options["norm"][:36])  # rows of 72 bytes
    shifted = torch.cat([w.flatten()[:1], w.flatten()])[1:].view_as(w)
    check(x[:2], shifted)  # not aligned
    check(x[:2], w, options["norm"].repeat_interleave(2)[::2])  # a norm that would have to be copied
    deep, wide, narrow = arguments(8, 16384, 2, device=extension_device)
    assert decode_linear(deep, wide, **narrow).shape == (8, 2)  # 256 KiB of normalized rows
    expected = w.clone().requires_grad_()
    decode_linear(x[:2], expected, **options).float().sum().backward()
    assert expected.grad is not None
    assert seen == []


def test_runs_without_an_extension(monkeypatch):
    monkeypatch.setattr(extension, "EXTENSION", None)
    x, w, options = arguments(2, 64, 16, dtype=torch.float32)
    assert_correct(decode_linear(x, w, **options), x, w, options)


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
    options = {"w": torch.zeros(6, 8), "norm": torch.zeros(8)} | changed
    with pytest.raises(ValueError, match=f"decode_linear: {message}"):
        decode_linear(torch.zeros(2, 8), options.pop("w"), **options)

import pytest
import torch

from bagel_rt.kernels import group_norm, group_norm_moments

SHAPES = {  # batch, channels, groups, height, width
    "one-cell": (1, 64, 32, 1, 1),
    "one-channel-a-group": (1, 8, 8, 3, 5),
    "one-group": (2, 12, 1, 4, 3),
    "three-channels-a-group-of-thirty-two": (1, 96, 32, 5, 7),
    "two-images": (2, 128, 32, 9, 6),
    "many-parts": (1, 32, 32, 47, 61),
    "more-channels-than-a-tile": (1, 5000, 2, 3, 2),
}
shapes = pytest.mark.parametrize("batch, channels, groups, height, width", SHAPES.values(), ids=SHAPES)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
EPS = 1e-6


def values(seed, *shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def expected(x, weight, bias, groups, silu, eps=EPS):
    """The formula in float64 on the CPU, one image and group at a time."""
    x, weight, bias = (tensor.cpu().double() for tensor in (x, weight, bias))
    y = torch.empty_like(x)
    size = x.shape[1] // groups
    for image, normed in zip(x, y, strict=True):
        for start in range(0, x.shape[1], size):
            group = image[start : start + size]
            variance = (group - group.mean()).square().mean()
            normed[start : start + size] = (group - group.mean()) / (variance + eps).sqrt()
    y = y * weight[:, None, None] + bias[:, None, None]
    return y / (1 + torch.exp(-y)) if silu else y


def close(actual, expected, dtype):
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize("layout", [channels_last, torch.Tensor.contiguous], ids=["channels-last", "channels-first"])
@shapes
def test_matches_the_formula_in_float64(batch, channels, groups, height, width, layout, silu, dtype, device):
    x = layout(values(1, batch, channels, height, width, dtype=dtype, device=device) * 3 + 1)
    weight, bias = (values(seed, channels, dtype=dtype, device=device) for seed in (2, 3))
    y = group_norm(x, weight, bias, groups, EPS, silu)
    assert y.dtype == dtype and y.stride() == x.stride()
    close(y, expected(x, weight, bias, groups, silu), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@shapes
def test_moments_match_float64(batch, channels, groups, height, width, dtype, device):
    x = channels_last(values(1, batch, channels, height, width, dtype=dtype, device=device) * 3 + 1)
    moments = group_norm_moments(x, groups, EPS)
    assert moments.dtype == torch.promote_types(dtype, torch.float32)
    variance, mean = torch.var_mean(x.cpu().double().reshape(batch, groups, -1), 2, correction=0)
    expected = torch.stack([mean, (variance + EPS).rsqrt()], 2)
    torch.testing.assert_close(moments.cpu().double(), expected, rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
def test_strips_of_rows_equal_the_whole_map(silu, device):
    x = channels_last(values(1, 2, 64, 13, 6, device=device))
    weight, bias = (values(seed, 64, device=device) for seed in (2, 3))
    moments = group_norm_moments(x, 32, EPS)
    strips = [group_norm(x[:, :, rows], weight, bias, 32, EPS, silu, moments)
              for rows in (slice(0, 5), slice(5, 12), slice(12, 13))]  # fmt: skip
    assert all(strip.stride(1) == 1 for strip in strips)
    close(torch.cat(strips, 2), expected(x, weight, bias, 32, silu), torch.float32)


def test_large_mean_does_not_cancel(device):
    x = channels_last(values(1, 1, 32, 40, 30, device=device) + 1000)
    ones, zeros = torch.ones(32, device=device), torch.zeros(32, device=device)
    y = group_norm(x, ones, zeros, 8, EPS)
    reference = expected(x, ones, zeros, 8, False)
    assert (y.cpu() - reference).abs().max() < 1e-3  # E[x^2] - E[x]^2 in float32 is wrong by 0.06 of the variance


def test_image_is_independent_of_the_batch(device):
    x = channels_last(values(1, 3, 64, 17, 19, device=device))
    weight, bias = (values(seed, 64, device=device) for seed in (2, 3))
    together = group_norm(x, weight, bias, 32, EPS, True)
    alone = [group_norm(channels_last(image[None]), weight, bias, 32, EPS, True) for image in x]
    if device.type == "cuda":  # torch's own sums on the CPU may be cut otherwise
        assert torch.equal(together, torch.cat(alone))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-6)


def test_constant_map_becomes_the_bias(device):
    x = channels_last(torch.full((1, 32, 4, 4), 7.0, device=device))
    weight, bias = (values(seed, 32, device=device) for seed in (2, 3))
    expected = bias[:, None, None].expand(1, 32, 4, 4)
    torch.testing.assert_close(group_norm(x, weight, bias, 8, EPS), expected, rtol=0, atol=1e-3)


def test_reference_gradient_in_both_layouts():
    weight, bias = (values(seed, 4, dtype=torch.float64).requires_grad_() for seed in (2, 3))
    for layout in (channels_last, torch.Tensor.contiguous):
        x = layout(values(1, 2, 4, 3, 2, dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(lambda *inputs: group_norm(*inputs, 2, EPS, True), (x, weight, bias))


def test_inputs_are_not_modified(device):
    x = channels_last(values(1, 1, 32, 5, 4, device=device))
    weight, bias = (values(seed, 64, device=device)[::2] for seed in (2, 3))
    before = x.clone()
    y = group_norm(x, weight, bias, 8, EPS, True)
    assert torch.equal(x, before)
    close(y, expected(x, weight, bias, 8, True), torch.float32)


X, W = torch.zeros(1, 8, 2, 2), torch.ones(8)
BAD = {
    "a-matrix": (lambda: group_norm(X[0, 0], W, W, 2, EPS), r"x must be \[B, C, H, W\].*got \(2, 2\)"),
    "an-empty-map": (lambda: group_norm(X[:, :, :0], W, W, 2, EPS), "with C, H, W > 0, got"),
    "groups-that-do-not-divide": (lambda: group_norm(X, W, W, 3, EPS), "groups must be a divisor of the 8 .*got 3"),
    "no-groups": (lambda: group_norm_moments(X, 0, EPS), "group_norm_moments: groups must be .*got 0"),
    "another-weight": (lambda: group_norm(X, W[:7], W, 2, EPS), r"weight must be \(8,\).*got \(7,\) torch.float32"),
    "another-dtype": (lambda: group_norm(X, W, W.half(), 2, EPS), r"bias must be .*got \(8,\) torch.float16"),
    "moments-of-other-groups": (
        lambda: group_norm(X, W, W, 2, EPS, moments=torch.zeros(1, 4, 2)), r"moments must be \(1, 2, 2\) .*\(1, 4, 2\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("action, message", BAD.values(), ids=BAD)
def test_rejects_mismatched_argument(action, message):
    with pytest.raises(ValueError, match=message):
        action()

import importlib
import itertools

import pytest
import torch

from bagel_rt.kernels import configs, guided_step, guided_velocity
from bagel_rt.kernels.backend import runs_kernel

guidance = importlib.import_module("bagel_rt.kernels.guidance")

# Half precision is computed in float32.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}
RENORMS = ["global", "channel", "text_channel"]
SCALES = {
    "no-guidance": (1.0, 1.0),
    "text": (4.0, 1.0),
    "text-and-image": (4.0, 1.5),
    "image-without-text-is-ignored": (1.0, 2.0),
    "below-one-is-off": (0.5, 0.0),
    "barely-on": (1.0001, 1.0001),
}
SHAPES = [pytest.param(N, C, id=f"{N}tokens-{C}channels") for N, C in [(1, 1), (1, 64), (33, 5)]]


def velocities(N, C, dtype=torch.float32, device="cpu"):
    """cond, no_text, no_img [N, C]. At text scale 4 guidance makes the first rows of cond grow and the last shrink."""
    g = torch.Generator().manual_seed(N * 100 + C)
    c, noise, w = (torch.randn(N, C, generator=g, dtype=torch.float64) for _ in range(3))
    u = torch.linspace(-1, 1.3, N, dtype=torch.float64)[:, None] * c + 0.01 * noise
    return c.to(device, dtype), u.to(device, dtype), w.to(device, dtype)


def latents(N, C, dtype, device):
    return torch.randn(N, C, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(device, dtype)


def by_the_book(c, u, w, a, b, renorm, least):
    """Token by token, in float64, on the CPU."""
    c, u, w = c.cpu().double(), u.cpu().double(), w.cpu().double()

    def factor(reference, guided):
        ratio = reference.pow(2).sum().sqrt() / (guided.pow(2).sum().sqrt() + 1e-8)
        return min(max(float(ratio), least), 1.0)

    if a <= 1:
        return c
    text = u + a * (c - u)
    if renorm == "text_channel":
        text = torch.stack([row * factor(reference, row) for reference, row in zip(c, text, strict=True)])
        return w + b * (text - w) if b > 1 else text
    guided = w + b * (text - w) if b > 1 else text
    if renorm == "global":
        return guided * factor(c, guided)
    return torch.stack([row * factor(reference, row) for reference, row in zip(c, guided, strict=True)])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("least", [0.0, 0.6, 1.0], ids=lambda least: f"min{least}")
@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("a, b", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("N, C", SHAPES)
def test_velocity_and_step_match_the_formula_in_float64(N, C, a, b, renorm, least, dtype, device):
    vs = velocities(N, C, dtype, device)
    wide = torch.promote_types(dtype, torch.float32)
    x = latents(N, C, wide, device)
    before = [t.clone() for t in (x, *vs)]
    v = guided_velocity(*vs, a, b, renorm, least)
    moved = guided_step(x, *vs, a, b, renorm, least, 0.125)
    want = by_the_book(*vs, a, b, renorm, least)
    assert v.dtype == moved.dtype == wide
    tolerance = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(1.0, float(want.abs().max())))
    torch.testing.assert_close(v.cpu().double(), want, **tolerance)
    torch.testing.assert_close(moved.cpu().double(), x.cpu().double() - want * 0.125, **tolerance)
    assert all(map(torch.equal, (x, *vs), before))


@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize(
    "N, C, dtype",
    [
        pytest.param(1027, 64, torch.bfloat16, id="image-of-512-pixels-and-three-tokens"),
        pytest.param(149, 100, torch.float32, id="149tokens-100channels"),
        pytest.param(1031, 1, torch.float16, id="1031tokens-1channel"),
        pytest.param(3, 5000, torch.float32, id="3tokens-5000channels"),
    ],
)
def test_an_image_beyond_one_block_matches_the_formula_and_repeats(N, C, dtype, renorm, device, monkeypatch):
    monkeypatch.setitem(configs.tiles("guided_step", "narrow", device), "PARTS", 16)  # several blocks to a part
    vs, x = velocities(N, C, dtype, device), latents(N, C, torch.float32, device)
    moved = guided_step(x, *vs, 4.0, 1.5, renorm, 0.1, 0.125)
    want = x.cpu().double() - 0.125 * by_the_book(*vs, 4.0, 1.5, renorm, 0.1)
    atol = 5e-6 if runs_kernel(x) else 2e-5  # torch's norm adds in longer chains
    torch.testing.assert_close(moved.cpu().double(), want, rtol=2e-6, atol=atol)
    assert torch.equal(moved, guided_step(x, *vs, 4.0, 1.5, renorm, 0.1, 0.125))


@pytest.mark.parametrize("renorm", RENORMS)
def test_a_step_takes_one_launch_or_two_for_the_norm_of_an_image(renorm, device, monkeypatch):
    launches = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append(grid)
            return self.kernel[grid]

    for name in ("_step_kernel", "_squares_kernel"):
        monkeypatch.setattr(guidance, name, Counted(getattr(guidance, name)))
    vs = velocities(40, 64, device=device)
    kernels_run = runs_kernel(vs[0])
    for b in (1.0, 2.0):
        guided_step(vs[0], *vs, 4.0, b, renorm, 0.0, 0.1)
        assert len(launches) == (2 if renorm == "global" else 1) * kernels_run
        launches.clear()
    guided_step(vs[0], vs[0], None, None, 1.0, 2.0, renorm, 0.0, 0.1)
    assert len(launches) == kernels_run


@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("a, b", SCALES.values(), ids=SCALES)
def test_no_tokens_give_no_tokens(a, b, renorm, device):
    nothing = torch.zeros(0, 64, device=device)
    assert guided_step(nothing, nothing, nothing, nothing, a, b, renorm, 0.0, 0.1).shape == (0, 64)


@pytest.mark.parametrize("renorm", ["channel", "text_channel"])
def test_renorm_shrinks_each_token_towards_cond_and_never_amplifies(renorm):
    c, u, _ = velocities(33, 64, torch.float64)
    plain = u + 4 * (c - u)
    factor = guided_velocity(c, u, None, 4.0, 1.0, renorm, 0.2).norm(dim=-1) / plain.norm(dim=-1)
    assert factor[0] == pytest.approx(0.2) and factor[-1] == pytest.approx(1), "these inputs do not reach both clamps"
    between = (factor > 0.201) & (factor < 0.999)
    assert between.any()
    torch.testing.assert_close((factor * plain.norm(dim=-1))[between], c.norm(dim=-1)[between])


def test_global_renorm_takes_one_norm_for_the_image():
    c, u, _ = velocities(33, 64, torch.float64)
    shrunk = guided_velocity(c, u, None, 4.0, 1.0, "global", 0.0)
    assert shrunk.norm() == pytest.approx(float(c.norm()))
    ratio = shrunk / (u + 4 * (c - u))
    assert ratio.max() == pytest.approx(float(ratio.min())) and ratio.max() < 1


@pytest.mark.parametrize("renorm", RENORMS)
def test_zero_velocities_stay_zero(renorm, device):
    zero, x = torch.zeros(4, 8, device=device), latents(4, 8, torch.float32, device)
    assert torch.equal(guided_velocity(zero, zero, zero, 4.0, 2.0, renorm, 0.0), zero)
    assert torch.equal(guided_step(x, zero, zero, zero, 4.0, 2.0, renorm, 0.0, 0.1), x)


@pytest.mark.parametrize("renorm, spoiled", [("global", slice(None)), ("channel", slice(1, 2))])
def test_a_velocity_that_is_not_a_number_is_not_clamped_away(renorm, spoiled, device):
    vs, x = velocities(40, 64, device=device), torch.zeros(40, 64, device=device)
    vs[0][1, 2] = float("nan")
    moved = guided_step(x, *vs, 4.0, 1.0, renorm, 0.5, 0.1)
    want = torch.zeros(40, 64, dtype=torch.bool, device=device)
    want[spoiled] = True
    assert torch.equal(moved.isnan(), want)


def test_branches_that_do_not_run_need_not_be_given(device):
    x, (c, u, w) = latents(4, 8, torch.float32, device), velocities(4, 8, device=device)
    for renorm, (a, b) in itertools.product(RENORMS, SCALES.values()):
        needed = (c, u if a > 1 else None, w if a > 1 and b > 1 else None)
        assert torch.equal(guided_velocity(*needed, a, b, renorm, 0.0), guided_velocity(c, u, w, a, b, renorm, 0.0))
        stepped = guided_step(x, *needed, a, b, renorm, 0.0, 0.1)
        assert torch.equal(stepped, guided_step(x, c, u, w, a, b, renorm, 0.0, 0.1))


def test_scales_and_times_may_be_integers(device):
    vs = velocities(4, 8, device=device)
    assert torch.equal(
        guided_step(vs[2], *vs, 4, 2, "global", 0, 1), guided_step(vs[2], *vs, 4.0, 2.0, "global", 0.0, 1.0)
    )


def test_half_precision_latents_come_back_in_float32(device):
    c, u, w = velocities(4, 8, torch.bfloat16, device)
    moved = guided_step(c, c, u, w, 4.0, 2.0, "global", 0.0, 0.5)
    assert torch.equal(moved, guided_step(c.float(), c, u, w, 4.0, 2.0, "global", 0.0, 0.5))
    assert moved.dtype == torch.float32


def test_float64_velocities_are_combined_in_float64_even_if_latents_are_float32(device):
    x, vs = latents(4, 8, torch.float32, device), velocities(4, 8, torch.float64, device)
    vs = [v * 1e25 for v in vs]  # squares are past float32
    moved = guided_step(x, *vs, 4.0, 2.0, "global", 0.0, 0.5)
    want = x.cpu().double() - 0.5 * by_the_book(*vs, 4.0, 2.0, "global", 0.0)
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved.cpu(), want.float(), rtol=1e-6, atol=1e18)


def test_inputs_need_not_be_contiguous(device):
    plain = latents(24, 64, torch.float32, device), *velocities(24, 64, device=device)
    spread = [t.repeat_interleave(2, -1)[..., ::2] for t in plain]
    columns_first = [t.t().contiguous().t() for t in plain]
    packed = torch.full((4, 26, 80), float("nan"), device=device)
    packed = packed[:, 1:25, 8:72].copy_(torch.stack(plain)).unbind()
    for renorm, args in itertools.product(RENORMS, (spread, columns_first, packed)):
        strided = guided_step(*args, 4.0, 2.0, renorm, 0.0, 0.1)
        torch.testing.assert_close(strided, guided_step(*plain, 4.0, 2.0, renorm, 0.0, 0.1))
        assert strided.is_contiguous()


def test_names_the_argument_that_does_not_fit():
    v = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="renorm='local' is not one of 'global', 'channel', 'text_channel'"):
        guided_step(v, v, None, None, 1.0, 1.0, "local", 0.0, 0.1)
    with pytest.raises(ValueError, match="text_scale=4.0 guides away from v_no_text, which is None"):
        guided_step(v, v, None, None, 4.0, 1.0, "global", 0.0, 0.1)
    with pytest.raises(ValueError, match="image_scale=2.0 guides away from v_no_img, which is None"):
        guided_velocity(v, v, None, 4.0, 2.0, "global", 0.0)
    with pytest.raises(ValueError, match=r"guided_step: v_cond is \(3, 8\) torch.float32, expected \(4, 8\)"):
        guided_step(v, v[:3], None, None, 1.0, 1.0, "global", 0.0, 0.1)
    with pytest.raises(ValueError, match="v_no_img is .* torch.bfloat16, expected .* torch.float32"):
        guided_velocity(v, v, v.bfloat16(), 4.0, 2.0, "global", 0.0)

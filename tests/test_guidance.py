import itertools

import pytest
import torch

from bagel_rt.kernels import guided_step, guided_velocity

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6}  # half precision is computed in float32
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


def velocities(N, C, dtype=torch.float32):
    """cond, no_text, no_img [N, C]. At text scale 4 guidance makes the first rows of cond grow and the last shrink."""
    g = torch.Generator().manual_seed(N * 100 + C)
    c, noise, w = (torch.randn(N, C, generator=g, dtype=torch.float64) for _ in range(3))
    u = torch.linspace(-1, 1.3, N, dtype=torch.float64)[:, None] * c + 0.01 * noise
    return c.to(dtype), u.to(dtype), w.to(dtype)


def by_the_book(c, u, w, a, b, renorm, least):
    """Token by token, in float64."""
    c, u, w = c.double(), u.double(), w.double()

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
def test_velocity_and_step_match_the_formula_in_float64(N, C, a, b, renorm, least, dtype):
    vs = velocities(N, C, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(N, C, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(wide)
    before = [t.clone() for t in (x, *vs)]
    v = guided_velocity(*vs, a, b, renorm, least)
    moved = guided_step(x, *vs, a, b, renorm, least, 0.125)
    want = by_the_book(*vs, a, b, renorm, least)
    assert v.dtype == moved.dtype == wide
    tolerance = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(1.0, float(want.abs().max())))
    torch.testing.assert_close(v.double(), want, **tolerance)
    torch.testing.assert_close(moved.double(), x.double() - want * 0.125, **tolerance)
    assert all(map(torch.equal, (x, *vs), before))


@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("a, b", SCALES.values(), ids=SCALES)
def test_no_tokens_give_no_tokens(a, b, renorm):
    nothing = torch.zeros(0, 64)
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
def test_zero_velocities_stay_zero(renorm):
    zero = torch.zeros(4, 8)
    assert torch.equal(guided_velocity(zero, zero, zero, 4.0, 2.0, renorm, 0.0), zero)


def test_branches_that_do_not_run_need_not_be_given():
    c, u, w = velocities(4, 8)
    for renorm, (a, b) in itertools.product(RENORMS, SCALES.values()):
        needed = (c, u if a > 1 else None, w if a > 1 and b > 1 else None)
        assert torch.equal(guided_velocity(*needed, a, b, renorm, 0.0), guided_velocity(c, u, w, a, b, renorm, 0.0))


def test_half_precision_latents_come_back_in_float32():
    c, u, w = velocities(4, 8, torch.bfloat16)
    moved = guided_step(c, c, u, w, 4.0, 2.0, "global", 0.0, 0.5)
    assert torch.equal(moved, guided_step(c.float(), c, u, w, 4.0, 2.0, "global", 0.0, 0.5))
    assert moved.dtype == torch.float32


def test_inputs_need_not_be_contiguous():
    args = [t.repeat_interleave(2, -1)[..., ::2] for t in (torch.ones(24, 64), *velocities(24, 64))]
    for renorm in RENORMS:
        strided = guided_step(*args, 4.0, 2.0, renorm, 0.0, 0.1)
        plain = guided_step(*(t.contiguous() for t in args), 4.0, 2.0, renorm, 0.0, 0.1)
        torch.testing.assert_close(strided, plain)


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

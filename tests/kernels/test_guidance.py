import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bagel_rt.kernels import cfg_euler_step, configs, guided_velocity
from bagel_rt.kernels.backend import runs_kernel
from bagel_rt.kernels.guidance import RENORMS

guidance = importlib.import_module("bagel_rt.kernels.guidance")

# Half precision is computed in float32.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}
SCALES = {
    "no-guidance": (1.0, 1.0),
    "text": (4.0, 1.0),
    "text-and-image": (4.0, 1.5),
    "image-without-text-is-ignored": (1.0, 2.0),
    "below-one-is-off": (0.5, 0.0),
    "barely-on": (1.0 + 2**-13, 1.0 + 2**-13),
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


def table(rows, dtype, device):
    """An image or CFG table on the device."""
    return torch.tensor(rows, dtype=dtype, device=device).view(-1, 5)


def step(x, vs, a, b, renorm, least, dt=0.125, guided=True):
    """Step a single image whose branches follow one another in v; return the new x."""
    N, moved = len(x), x.clone()
    image_table = table([0, N, 0, N, 2 * N], torch.int32, x.device)
    cfg_table = table([dt, a, b, least, RENORMS.index(renorm)], torch.float32, x.device)
    cfg_euler_step(moved, torch.cat(vs), image_table, cfg_table, N, guided)
    return moved


def expected_velocity(c, u, w, a, b, renorm, least):
    """The formula, token by token, in float64 on the CPU."""
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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("least", [0.0, 0.625, 1.0], ids=lambda least: f"min{least}")
@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("a, b", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("N, C", SHAPES)
def test_velocity_and_step_match_the_formula_in_float64(N, C, a, b, renorm, least, dtype, device):
    vs = velocities(N, C, dtype, device)
    wide = torch.promote_types(dtype, torch.float32)
    x = latents(N, C, wide, device)
    before = [v.clone() for v in vs]
    v = guided_velocity(*vs, a, b, renorm, least)
    moved = step(x, vs, a, b, renorm, least)
    expected = expected_velocity(*vs, a, b, renorm, least)
    assert v.dtype == moved.dtype == wide
    tolerance = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(1.0, float(expected.abs().max())))
    torch.testing.assert_close(v.cpu().double(), expected, **tolerance)
    torch.testing.assert_close(moved.cpu().double(), x.cpu().double() - expected * 0.125, **tolerance)
    assert all(map(torch.equal, vs, before))


@pytest.mark.slow
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
def test_images_of_several_blocks_match_and_are_deterministic(N, C, dtype, renorm, device, monkeypatch):
    monkeypatch.setitem(configs.tiles("cfg_euler_step", "narrow", device), "PARTS", 16)  # several blocks to a part
    vs, x = velocities(N, C, dtype, device), latents(N, C, torch.float32, device)
    moved = step(x, vs, 4.0, 1.5, renorm, 0.125)
    expected = x.cpu().double() - 0.125 * expected_velocity(*vs, 4.0, 1.5, renorm, 0.125)
    atol = 5e-6 if runs_kernel(x) else 2e-5  # torch's norm adds in longer chains
    torch.testing.assert_close(moved.cpu().double(), expected, rtol=2e-6, atol=atol)
    assert torch.equal(moved, step(x, vs, 4.0, 1.5, renorm, 0.125))


@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("a, b", SCALES.values(), ids=SCALES)
def test_empty_image_changes_nothing(a, b, renorm, device):
    cfg_table = table([0.125, a, b, 0.0, RENORMS.index(renorm)], torch.float32, device)
    x, v = latents(4, 64, torch.float32, device), torch.ones(4, 64, device=device)
    before, nothing = x.clone(), table([2, 0, 0, 0, 0], torch.int32, device)
    cfg_euler_step(x, v, nothing, cfg_table, 4)
    cfg_euler_step(x[:0], v[:0], nothing * 0, cfg_table, 0)
    cfg_euler_step(x, v, nothing[:0], cfg_table[:0], 4)
    assert torch.equal(x, before)


@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("b", [1.0, 2.0])
def test_unguided_step_ignores_the_scales(b, renorm, device):
    vs, x = velocities(37, 64, device=device), latents(37, 64, torch.float32, device)
    spoiled = vs[0], torch.full_like(vs[0], torch.nan), torch.full_like(vs[0], torch.nan)
    moved = step(x, spoiled, 4.0, b, renorm, 0.5, guided=False)
    torch.testing.assert_close(moved, x - 0.125 * vs[0], rtol=1e-6, atol=1e-7)
    assert torch.equal(moved, step(x, spoiled, 1.0, b, renorm, 0.5)), "a scale of 1 in a guided step does the same"


@pytest.mark.parametrize("renorm", ["channel", "text_channel"])
def test_renorm_shrinks_each_token_toward_cond_and_never_amplifies(renorm):
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
    assert torch.equal(step(x, (zero, zero, zero), 4.0, 2.0, renorm, 0.0), x)


@pytest.mark.parametrize("renorm, spoiled", [("global", slice(None)), ("channel", slice(1, 2))])
def test_nan_velocity_is_not_clamped_away(renorm, spoiled, device):
    vs, x = velocities(40, 64, device=device), torch.zeros(40, 64, device=device)
    vs[0][1, 2] = float("nan")
    expected = torch.zeros(40, 64, dtype=torch.bool, device=device)
    expected[spoiled] = True
    assert torch.equal(step(x, vs, 4.0, 1.0, renorm, 0.5).isnan(), expected)


@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("a, b", SCALES.values(), ids=SCALES)
def test_unused_branches_are_not_read(a, b, renorm, device):
    x, (c, u, w) = latents(4, 8, torch.float32, device), velocities(4, 8, device=device)
    needed = (c, u if a > 1 else None, w if a > 1 and b > 1 else None)
    assert torch.equal(guided_velocity(*needed, a, b, renorm, 0.0), guided_velocity(c, u, w, a, b, renorm, 0.0))
    branches = tuple(torch.full_like(c, torch.nan) if v is None else v for v in needed)
    assert torch.equal(step(x, branches, a, b, renorm, 0.0), step(x, (c, u, w), a, b, renorm, 0.0))


def test_float64_velocities_with_float32_latents_are_combined_in_float64(device):
    x, vs = latents(4, 8, torch.float32, device), velocities(4, 8, torch.float64, device)
    vs = [v * 1e25 for v in vs]  # squares are past float32
    moved = step(x, vs, 4.0, 2.0, "global", 0.0, 0.5)
    expected = x.cpu().double() - 0.5 * expected_velocity(*vs, 4.0, 2.0, "global", 0.0)
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved.cpu(), expected.float(), rtol=1e-6, atol=1e18)


def test_float64_latents_step_in_float64(device):
    x, vs = latents(4, 8, torch.float64, device), velocities(4, 8, torch.bfloat16, device)
    expected = x.cpu() - 0.125 * expected_velocity(*vs, 4.0, 2.0, "channel", 0.0)
    torch.testing.assert_close(step(x, vs, 4.0, 2.0, "channel", 0.0).cpu(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(step(x, vs, 1.0, 1.0, "channel", 0.0).cpu(), x.cpu() - 0.125 * vs[0].cpu().double())


# A batch of image_table

BATCH = [  # rows, text scale, image scale, renorm, renorm_min, branches that alias the conditional one
    (37, 4.0, 1.5, "global", 0.0, 0),
    (5, 1.0, 2.0, "global", 0.0, 2),
    (64, 4.0, 2.0, "channel", 0.125, 0),
    (1, 3.0, 1.0, "text_channel", 0.0, 1),
    (70, 2.5, 1.25, "text_channel", 0.5, 0),
    (33, 6.0, 1.0, "global", 0.25, 1),
]


def batch(C, dtype, device):
    """(x, v, image_table, cfg_table, max_rows) of ``BATCH``, with gaps between the images of x and the branches of v.

    The branches in v start with those of the last image and have gaps between them. Rows of no image are NaN.
    """
    x = torch.full((sum(2 + rows for rows, *_ in BATCH), C), torch.nan, device=device)
    parts, image_table, first, at = [], [], len(x), 0
    for rows, *_, missing in reversed(BATCH):
        first -= rows + 2
        x[first : first + rows] = latents(rows, C, torch.float32, device)
        own = velocities(rows, C, dtype, device)[: 3 - missing]
        for v in own:
            parts += [v, torch.full_like(v[:1], torch.nan)]
        places = [at + branch * (rows + 1) for branch in range(len(own))]
        image_table.append([first, rows, *places, *[places[0]] * missing])
        at += len(own) * (rows + 1)
    cfg_table = [[i / 8, a, b, m, RENORMS.index(renorm)] for i, (_, a, b, renorm, m, _) in enumerate(BATCH, 1)]
    tables = table(image_table[::-1], torch.int32, device), table(cfg_table, torch.float32, device)
    return x, torch.cat(parts), *tables, max(rows for rows, *_ in BATCH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C", [64, 5])
def test_each_image_of_a_batch_takes_its_own_step(C, dtype, device):
    x, v, image_table, cfg_table, max_rows = batch(C, dtype, device)
    start, velocity = x.clone(), v.clone()
    cfg_euler_step(x, v, image_table, cfg_table, max_rows)
    expected = start.cpu().double()
    for i, (rows, a, b, renorm, least, missing) in enumerate(BATCH):
        first, dt = int(image_table[i, 0]), float(cfg_table[i, 0])
        vs = velocities(rows, C, dtype, device)
        vs = [*vs[: 3 - missing], *[vs[0]] * missing]
        expected[first : first + rows] -= dt * expected_velocity(*vs, a, b, renorm, least)
    torch.testing.assert_close(x.cpu().double(), expected, rtol=2e-6, atol=2e-5, equal_nan=True)
    torch.testing.assert_close(v, velocity, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_image_is_independent_of_the_batch(dtype, guided, device, monkeypatch):
    tiles = configs.tiles("cfg_euler_step", "narrow", device)
    monkeypatch.setitem(tiles, "PARTS", 2)  # fewer than the largest has blocks
    x, v, image_table, cfg_table, max_rows = batch(64, dtype, device)
    start = x.clone()
    cfg_euler_step(x, v, image_table, cfg_table, max_rows, guided)
    assert not torch.equal(x.nan_to_num(), start.nan_to_num())
    for order in ([i] for i in range(len(BATCH))), [[5, 4, 3, 2, 1, 0]], [[0, 2, 4], [1, 3, 5]]:
        apart = start.clone()
        for chosen in order:
            largest = max(BATCH[i][0] for i in chosen)
            cfg_euler_step(apart, v, image_table[chosen], cfg_table[chosen], largest, guided)
        torch.testing.assert_close(apart, x, rtol=0, atol=0, equal_nan=True)
    cfg_euler_step(larger := start.clone(), v, image_table, cfg_table, 5 * max_rows, guided)
    torch.testing.assert_close(larger, x, rtol=0, atol=0, equal_nan=True)


def test_nan_stays_in_its_image(device):
    x, v, image_table, cfg_table, max_rows = batch(64, torch.float32, device)
    cfg_euler_step(clean := x.clone(), v, image_table, cfg_table, max_rows)
    first, rows, cond, *_ = image_table[0].tolist()
    v[cond] = torch.nan
    cfg_euler_step(x, v, image_table, cfg_table, max_rows)
    assert x[first : first + rows].isnan().all()
    torch.testing.assert_close(x[first + rows :], clean[first + rows :], rtol=0, atol=0, equal_nan=True)


def test_accepts_strided_velocities_and_tables(device):
    start, v, image_table, cfg_table, max_rows = batch(64, torch.float32, device)
    cfg_euler_step(plain := start.clone(), v, image_table, cfg_table, max_rows)
    packed = torch.full((len(v) + 2, 80), torch.nan, device=device)[1:-1, 8:72].copy_(v)
    for strided in (v.repeat_interleave(2, -1)[:, ::2], v.t().contiguous().t(), packed):
        x = start.clone()
        cfg_euler_step(x, strided, image_table.t().contiguous().t(), cfg_table.repeat(1, 2)[:, :5], max_rows)
        torch.testing.assert_close(x, plain, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("renorm", RENORMS)
def test_guided_batch_takes_two_launches_and_unguided_one(renorm, device, monkeypatch):
    launches = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append(grid)
            return self.kernel[grid]

    for name in ("_step_kernel", "_squares_kernel"):
        monkeypatch.setattr(guidance, name, Counted(getattr(guidance, name)))
    kernels_run = runs_kernel((arguments := batch(64, torch.float32, device))[0])
    arguments[3][:, 4] = RENORMS.index(renorm)
    for guided, count in ((True, 2), (False, 1)):
        cfg_euler_step(*arguments, guided)
        assert len(launches) == count * kernels_run and all(grid[1] == len(BATCH) for grid in launches)
        launches.clear()


def test_first_launch_skips_images_without_global_norm(kernels):
    _, v, image_table, cfg_table, _ = batch(64, torch.float32, kernels)
    rows, parts = 16, 8
    squares = torch.full((len(BATCH), 2, parts), torch.nan, device=kernels)
    tiles = dict(C=64, ROWS=rows, COLUMNS=64, PARTS=parts)
    guidance._squares_kernel[parts, len(BATCH)](v, image_table, cfg_table, squares, v.stride(0), **tiles)
    needed = [-(-n // rows) if renorm == "global" and a > 1 else 0 for n, a, _, renorm, *_ in BATCH]
    written = torch.arange(parts, device=kernels) < torch.tensor(needed, device=kernels)[:, None, None]
    assert torch.equal(~squares.isnan(), written.expand_as(squares))


def test_number_of_images_does_not_recompile_or_synchronize():
    """Uses a driver that compiles but does not launch, and tensors without values."""
    pytest.importorskip("triton")
    code = """
import torch
from bagel_rt.kernels import cfg_euler_step
from benchmarks.compiling import intercept_launches

variants = {True: set(), False: set()}
for n, rows, guided in ((1, 4096, True), (3, 1000, True), (4, 1, True), (1, 4096, False), (2, 77, False)):
    with intercept_launches("sm_90", lambda entry, run: variants[guided].add(run().hash)), torch.device("meta"):
        x, v = torch.empty(n * rows, 64), torch.empty(3 * n * rows, 64, dtype=torch.bfloat16)
        cfg_euler_step(x, v, torch.empty(n, 5, dtype=torch.int32), torch.empty(n, 5), rows, guided)
print(len(variants[True]), len(variants[False]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    where = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=where, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "1"], done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA graphs")
def test_replay_reads_the_current_tables(kernels):
    x, v, image_table, cfg_table, max_rows = batch(64, torch.bfloat16, kernels)
    start = x.clone()
    cfg_euler_step(x, v, image_table, cfg_table, max_rows)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cfg_euler_step(x, v, image_table, cfg_table, max_rows)
    cfg_table.copy_(cfg_table.roll(1, 0))
    image_table.copy_(image_table.roll(2, 0))
    cfg_euler_step(expected := start.clone(), v, image_table, cfg_table, max_rows)
    x.copy_(start)
    graph.replay()
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)


def test_velocity_rejects_mismatched_argument():
    v = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="renorm must be 'global', 'channel', 'text_channel', got 'local'"):
        guided_velocity(v, None, None, 1.0, 1.0, "local", 0.0)
    with pytest.raises(ValueError, match="v_no_text must be given with text_scale=4.0, got None"):
        guided_velocity(v, None, None, 4.0, 1.0, "global", 0.0)
    with pytest.raises(ValueError, match="v_no_img must be given with image_scale=2.0, got None"):
        guided_velocity(v, v, None, 4.0, 2.0, "global", 0.0)
    with pytest.raises(ValueError, match=r"v_no_text must be \(4, 8\) torch.float32.*got \(3, 8\) torch.float32"):
        guided_velocity(v, v[:3], None, 4.0, 1.0, "global", 0.0)
    with pytest.raises(ValueError, match="v_no_img must be .* torch.float32.*got .* torch.bfloat16"):
        guided_velocity(v, v, v.bfloat16(), 4.0, 2.0, "global", 0.0)


@pytest.mark.parametrize(
    "place, wrong, message",
    [
        pytest.param(
            0, torch.zeros(4, 8).half(), r"x must be a contiguous \[N, C\] .*got \(4, 8\) torch.float16", id="half"
        ),
        pytest.param(
            0, torch.zeros(8, 4).t(), r"x must be .*got \(4, 8\) torch.float32, not contiguous", id="columns first"
        ),
        pytest.param(0, torch.zeros(1, 4, 8), r"x must be .*got \(1, 4, 8\) torch.float32", id="dimensions"),
        pytest.param(1, torch.zeros(4, 7), r"v must be \(R, 8\).*got \(4, 7\) torch.float32", id="width"),
        pytest.param(1, torch.zeros(4, 8).int(), r"v must be \(R, 8\) of a float.*got \(4, 8\) torch.int32", id="int"),
        pytest.param(2, torch.zeros(1, 5).long(), r"image_table must be .*got \(1, 5\) torch.int64", id="int64"),
        pytest.param(2, torch.zeros(1, 4).int(), r"image_table must be .*got \(1, 4\) torch.int32", id="columns"),
        pytest.param(2, torch.tensor(0).int(), r"image_table must be \(0, 5\).*got \(\) torch.int32", id="scalar"),
        pytest.param(3, torch.zeros(2, 5), r"cfg_table must be \(1, 5\).*got \(2, 5\) torch.float32", id="image_table"),
        pytest.param(3, torch.zeros(1, 5).double(), "cfg_table must be .*32.*got .* torch.float64", id="double"),
        pytest.param(3, torch.zeros(1, 5, device="meta"), "cfg_table must be on cpu like x, got meta", id="device"),
        pytest.param(4, -1, "max_rows must be 0 or more, got -1", id="negative"),
    ],
)
def test_step_rejects_mismatched_argument(place, wrong, message):
    arguments = [torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(1, 5).int(), torch.zeros(1, 5), 4]
    cfg_euler_step(*arguments)
    arguments[place] = wrong
    with pytest.raises(ValueError, match=f"^cfg_euler_step: {message}"):
        cfg_euler_step(*arguments)

"""Gradients of the ops and of a whole training step against finite differences, and bfloat16 against float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from bagel_rt.kernels import attention, linear, qk_norm_rope, rms_norm
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.random_checkpoint import randomize_
from bagel_rt.pipeline import Bagel
from bagel_rt.runtime.plan import Segment, build_plan
from bagel_rt.train.attention import attention_batched, training_attention
from bagel_rt.train.objective import training_losses
from bagel_rt.train.packing import Clean, Noised, Sample, SpecialTokens, Text, ViT, pack
from bagel_rt.train.parameters import FROZEN, Parameters

CHECKPOINT = Path(__file__).parents[1] / "conformance" / "bagel" / "checkpoint"
TOKENS = SpecialTokens(353, 354, 361, 362)
EXPERTS = pytest.mark.parametrize("G", [0, 2, 5], ids=["und only", "both experts", "gen only"])


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


# Ops


@EXPERTS
def test_gradient_of_rms_norm(G):
    inputs = (draw(5, 6), draw(6, seed=1), draw(6, seed=2))
    assert gradcheck(lambda x, a, b: rms_norm(x, None, a, b, G, 1e-6)[0], inputs)


@EXPERTS
def test_gradient_of_rms_norm_with_a_residual(G):
    inputs = (draw(5, 6), draw(5, 6, seed=3), draw(6, seed=1), draw(6, seed=2))
    assert gradcheck(lambda x, r, a, b: rms_norm(x, r, a, b, G, 1e-6), inputs)


@EXPERTS
@pytest.mark.parametrize("swiglu", [False, True])
def test_gradient_of_linear_with_a_bias(G, swiglu):
    inputs = (draw(5, 3), draw(4, 3), draw(4, 3, seed=1), draw(4), draw(4, seed=1))
    assert gradcheck(lambda *args: linear(*args, G=G, swiglu=swiglu), inputs)


@EXPERTS
def test_gradient_of_linear_with_a_residual(G):
    inputs = (draw(5, 3), draw(4, 3), draw(4, 3, seed=1), draw(5, 4))
    assert gradcheck(lambda x, a, b, r: linear(x, a, b, G=G, residual=r), inputs)


@EXPERTS
def test_gradient_of_swiglu_without_a_bias(G):
    assert gradcheck(lambda *args: linear(*args, G=G, swiglu=True), (draw(5, 3), draw(4, 3), draw(4, 3, seed=1)))


@EXPERTS
@pytest.mark.parametrize("biased", [False, True])
def test_gradient_of_linear_op_with_swiglu(G, biased):
    inputs = (draw(5, 3), draw(4, 3), draw(4, 3, seed=1), *((draw(4), draw(4, seed=1)) if biased else (None, None)))
    assert gradcheck(lambda *args: torch.ops.bagel_rt.linear(*args, None, G, True), inputs)


@EXPERTS
def test_gradient_of_qk_norm_rope_through_queries_and_caches(G):
    slots, angles = torch.tensor([4, 0, 6, 1, 3]), draw(5, 2, seed=7).detach()

    def run(qkv, norm_first, norm_rest, k, v):
        k, v = k.clone(), v.clone()
        q = qk_norm_rope(qkv, norm_first, norm_rest, angles.cos(), angles.sin(), slots, k, v, G, 1e-6)
        return q, k, v

    inputs = (draw(5, 6 * 4), draw(4, 4), draw(4, 4, seed=1), draw(7, 2, 4), draw(7, 2, 4, seed=1))
    run_fresh = lambda *args: run(*args, *(x.detach() for x in inputs[3:]))  # noqa: E731
    assert gradcheck(run, inputs)
    assert gradcheck(run_fresh, inputs[:3])
    assert gradcheck(lambda qkv: run_fresh(qkv, None, None), inputs[:1])


def segment(mode, n, key_start, visible, write=None, gen=False):
    return Segment(mode, np.full(n, gen), key_start, visible, key_start + visible if write is None else write)


PLANS = {
    "no rows": [],
    "one row": [segment("causal", 1, 0, 0)],
    "two texts": [segment("causal", 4, 0, 0), segment("causal", 5, 4, 0)],
    "a noised image away from its context": [segment("causal", 3, 0, 0), segment("full", 2, 0, 3, 7, True)],
    "images and texts of many lengths": [
        segment("full", 6, 0, 0), segment("causal", 40, 0, 6), segment("full", 3, 0, 46, 60, True),
        segment("full", 33, 70, 0), segment("causal", 2, 70, 33),
    ],
}  # fmt: skip


def attention_inputs(name, D=4):
    plan = build_plan(PLANS[name], block_q=16)
    slots = 110
    q, k, v = draw(len(plan.order), 4, D), draw(slots, 2, D), draw(slots, 2, D, seed=1)
    return q, k, v, torch.from_numpy(plan.limits), torch.from_numpy(plan.blocks)


@pytest.mark.parametrize("name", PLANS)
def test_batched_attention_matches_attention(name):
    q, k, v, limits, blocks = attention_inputs(name)
    got = training_attention(q, k, v, limits, blocks)
    with torch.no_grad():
        expected = attention(q, k, v, limits, blocks)
    torch.testing.assert_close(got.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in PLANS if name != "no rows"])
def test_gradient_of_batched_attention_matches_the_backward_op(name):
    q, k, v, limits, blocks = attention_inputs(name)
    out = training_attention(q, k, v, limits, blocks)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad(out, (q, k, v), grad)
    expected, _ = torch.ops.bagel_rt.attention_lse(q, k, v, limits, blocks, q.shape[-1] ** -0.5)
    for one, other in zip(got, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_rows_without_keys_attend_to_nothing_and_have_no_gradient():
    q, k, v = draw(3, 2, 4), draw(5, 1, 4), draw(5, 1, 4, seed=1)
    blocks = torch.tensor([[0, 2, 0, 0, 2, 0, 0], [2, 3, 0, 0, 0, 0, 0]], dtype=torch.int32)
    out = attention_batched(q, k, v, torch.tensor([0, 2, 0], dtype=torch.int32), blocks, 0.5)
    assert not out[[0, 2]].any() and out[1].all()
    dq, dk, dv = torch.autograd.grad(out.sum() + out.square().sum(), (q, k, v))
    assert not dq[[0, 2]].any() and not dv[2:].any() and dv[:2].any() and dk.isfinite().all()


def test_in_place_change_of_a_plan_invalidates_the_cache():
    q, k, v = draw(2, 1, 4), draw(3, 1, 4), draw(3, 1, 4, seed=1)
    limits, blocks = torch.tensor([1, 1], dtype=torch.int32), torch.tensor([[0, 2, 0, 1, 3, 0, 0]], dtype=torch.int32)
    torch.testing.assert_close(attention_batched(q, k, v, limits, blocks, 0.5)[1], v[0].detach(), check_stride=False)
    limits[1] = 3
    changed = attention_batched(q, k, v, limits, blocks, 0.5)[1]
    assert not torch.allclose(changed, v[0])


# A whole step


@pytest.fixture(scope="module")
def step():
    """(float64 parameters, batch, latents, noise) of a step with every kind of part."""
    config = Bagel.from_pretrained(CHECKPOINT, device="cpu").model.config
    model = BagelModel.allocate(config, TOKENS[2:], "cpu", torch.float64)
    randomize_(model)
    generator = torch.Generator().manual_seed(0)

    def grid(features, rows, columns):
        return torch.randn(rows * columns, features, generator=generator), rows, columns

    edit = [Clean(*grid(64, 2, 3)), ViT(*grid(588, 3, 2)), Text([5, 6, 7]), Noised(*grid(64, 3, 3))]
    ask = [ViT(*grid(588, 2, 2)), Text([5, 9]), Text([8, 10, 11], loss=True)]
    batch, latents = pack([Sample(edit), Sample(ask)], config, TOKENS, torch.tensor([0.3]))
    return Parameters(model), batch, latents, torch.randn(latents.shape, generator=generator)


def total(parameters, step, leaves=None, dtype=None):
    losses = training_losses(parameters.model(leaves, dtype), *step[1:])
    return losses.ce + losses.mse


def test_gradients_of_a_step_match_finite_differences(step):
    parameters = step[0]
    names, leaves = zip(*parameters.trained().items(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(total(parameters, step), leaves), strict=True))
    largest = max(gradient.norm() for gradient in gradients.values())
    generator, width = torch.Generator().manual_seed(1), 1e-5
    for name, gradient in gradients.items():
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        with torch.no_grad():
            ends = [
                total(parameters, step, parameters.leaves | {name: parameters.leaves[name] + sign * width * direction})
                for sign in (1, -1)
            ]
        slope = float(ends[0] - ends[1]) / (2 * width)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=float(largest) * 1e-8), name


def test_position_tables_are_frozen(step):
    assert set(step[0].leaves) - set(step[0].trained()) == set(FROZEN)


def test_bfloat16_gradient_is_close_to_float64(step):
    parameters = step[0]
    leaves = list(parameters.trained().values())
    wide, narrow = (
        torch.cat([g.flatten() for g in torch.autograd.grad(total(parameters, step, dtype=dtype), leaves)])
        for dtype in (None, torch.bfloat16)
    )
    assert torch.cosine_similarity(wide, narrow.double(), dim=0) > 0.995
    assert narrow.norm() == pytest.approx(float(wide.norm()), rel=0.05)


def test_parameters_are_copies_of_the_model(step):
    config = step[0].config
    model = BagelModel.allocate(config, (361, 362), "cpu", torch.float32)
    randomize_(model)
    parameters = Parameters(model)
    rebuilt = parameters.model()
    for name, place in model.weight_slots()["ema"].items():
        assert torch.equal(place.view, rebuilt.weight_slots()["ema"][name].view), name
        assert not place.view.requires_grad
    with torch.no_grad():
        parameters.leaves["layers.0.qk_norm.gen"].fill_(2)
    heads = parameters.model().weights.layers[0].qk_norm.gen
    assert (heads == 2).all() and not (model.weights.layers[0].qk_norm.gen == 2).any()

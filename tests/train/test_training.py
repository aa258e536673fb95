"""Training batches: attention mask, flow matching, latents of padded images, and validation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bagel_rt.conformance.bagel.training import sequence_mask
from bagel_rt.pipeline import Bagel
from bagel_rt.runtime.plan import build_plan
from bagel_rt.train.batch import TrainingBatch, training_segments
from bagel_rt.train.objective import encode_padded, flow_pair, flow_timesteps, latent_tokens, training_losses

CHECKPOINT = Path(__file__).parents[1] / "conformance" / "bagel" / "checkpoint"


@pytest.fixture(scope="module")
def model():
    return Bagel.from_pretrained(CHECKPOINT, device="cpu").model


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


# The mask

one_split = st.tuples(st.integers(1, 9), st.sampled_from(["causal", "full", "noise"]))


@settings(max_examples=300)
@given(st.lists(st.lists(one_split, min_size=1, max_size=6), max_size=4), st.integers(0, 2**32))
def test_plan_mask_matches_the_rule(samples, seed):
    splits = [(n, mode, sample) for sample, own in enumerate(samples) for n, mode in own]
    lengths, modes = [n for n, _, _ in splits], [mode for _, mode, _ in splits]
    gen = np.random.default_rng(seed).random(sum(lengths)) < 0.5
    plan = build_plan(training_segments(lengths, modes, [sum(n for n, _ in own) for own in samples], gen), block_q=16)
    mask = sequence_mask(plan)
    rows = [(number, mode, sample) for number, (n, mode, sample) in enumerate(splits) for _ in range(n)]
    for q, (split_q, mode_q, sample_q) in enumerate(rows):
        for k, (split_k, mode_k, sample_k) in enumerate(rows):
            one_block = split_q == split_k and mode_q in ("full", "noise")
            foreign_noise = mode_k == "noise" and split_k != split_q
            assert mask[q, k] == (sample_q == sample_k and (q >= k or one_block) and not foreign_noise), (q, k)
    assert sorted(plan.slots) == list(range(len(rows)))
    assert plan.order.tolist() == [*np.flatnonzero(gen), *np.flatnonzero(~gen)]


def test_noise_split_at_the_end_of_a_sample_is_contiguous():
    segments = training_segments([3, 4, 2, 4], ["causal", "noise", "full", "noise"], [13], np.zeros(13, bool))
    assert [(s.visible, s.write) for s in segments] == [(0, 0), (3, 9), (3, 3), (5, 5)]


@pytest.mark.parametrize(
    "split_lens, attn_modes, sample_lens, rows, message",
    [
        ([2, 0], ["causal", "full"], [2], 2, r"split_lens\[1\] must be an integer >= 1, got 0"),
        ([2], ["causal"], [3, -1], 2, r"sample_lens\[1\] must be an integer >= 1, got -1"),
        ([2], ["causal", "full"], [2], 2, "attn_modes must have 1 entries, one per split, got 2"),
        ([2], ["sliding"], [2], 2, r"attn_modes\[0\] must be causal, full or noise, got 'sliding'"),
        ([2, 3], ["causal", "full"], [4], 4, "split_lens must add up to 4, the sum of sample_lens, got 5"),
        ([2, 3], ["causal", "full"], [4, 1], 5, "sample 0 must end at the end of a split, got an end 1 rows before it"),
        ([2], ["causal"], [2], 3, "gen must have 2 entries, one per row in sample_lens, got 3"),
    ],
    ids=[
        "an empty split", "a negative sample", "too many modes", "an unknown mode", "different sums of lengths",
        "a split across samples", "gen with too many rows",
    ],
)  # fmt: skip
def test_training_segments_rejects(split_lens, attn_modes, sample_lens, rows, message):
    with pytest.raises(ValueError, match=message):
        training_segments(split_lens, attn_modes, sample_lens, np.zeros(rows, bool))


# Flow matching


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_timesteps_are_the_shifted_sigmoid(shift):
    raw = torch.tensor([-torch.inf, -60.0, -1.5, 0.0, 0.3, 4.0, 60.0])
    u = 1 / (1 + np.exp(-raw.double().numpy()))
    expected = torch.from_numpy(shift * u / (1 + (shift - 1) * u)).float()
    t = flow_timesteps(raw, shift)
    torch.testing.assert_close(t, expected, rtol=1e-6, atol=0)
    assert (t[0], t[-1]) == (0, 1)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan")])
def test_rejects_shift_that_is_not_positive(shift):
    with pytest.raises(ValueError, match="timestep_shift must be a number > 0"):
        flow_timesteps(torch.zeros(1), shift)


def test_flow_interpolates_from_latents_to_noise():
    z, noise = torch.tensor([[1.0, -2.0]]).repeat(3, 1), torch.tensor([[5.0, 2.0]]).repeat(3, 1)
    x, target = flow_pair(z, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert x.tolist() == [[1.0, -2.0], [2.0, -1.0], [5.0, 2.0]]
    assert target.tolist() == [[4.0, 4.0]] * 3


# Latents


def test_encode_padded_uses_one_gray_canvas(model):
    g = torch.Generator().manual_seed(0)
    wide, tall, eps = (torch.randn(shape, generator=g) for shape in [(3, 32, 64), (3, 48, 16), (2, 16, 6, 8)])
    canvas = torch.zeros(2, 3, 48, 64)
    canvas[0, :, :32], canvas[1, :, :, :16] = wide, tall
    padded = encode_padded(model, [wide, tall], eps)
    torch.testing.assert_close(padded, model.vae.encode(canvas, eps))
    alone = model.vae.encode(wide[None], eps[:1, :, :4])
    assert (padded[0, :, :4] - alone[0]).abs().max() > 1e-2, "the padding reaches into the image"


def test_latent_tokens_are_cut_from_the_top_left_corner():
    latents = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = latent_tokens(latents, [(1, 3), (2, 1)], 2)
    cells = [(0, 0, 0), (0, 0, 2), (0, 0, 4), (1, 0, 0), (1, 2, 0)]  # image, top row, left column of each token
    expected = [latents[i, :, r : r + 2, c : c + 2].permute(1, 2, 0).flatten() for i, r, c in cells]
    assert torch.equal(tokens, torch.stack(expected))


def test_rejects_latents_of_the_wrong_shape(model):
    latents = torch.zeros(1, 3, 4, 6)
    with pytest.raises(ValueError, match="grids must have 1 entries, one per image, got 2"):
        latent_tokens(latents, [(1, 1), (1, 1)], 2)
    with pytest.raises(ValueError, match="a grid must be at most 4 rows and 6 columns of latent cells, got 4 and 8"):
        latent_tokens(latents, [(2, 4)], 2)
    with pytest.raises(ValueError, match=r"must be of shape \(1, 16, 2, 4\) for a 32x16 canvas, got \(1, 16, 2, 2\)"):
        encode_padded(model, [torch.zeros(3, 16, 32)], torch.zeros(1, 16, 2, 2))
    with pytest.raises(ValueError, match="images must not be empty"):
        encode_padded(model, [], torch.zeros(0, 16, 2, 2))


# Validation of batches


def changed(tensor, entry, value):
    tensor = tensor.clone()
    tensor[entry] = value
    return tensor


# A text in rows 0 to 2, a ViT image in rows 3 to 6, a noised image in rows 7 to 10; the markers are text.
BATCH = TrainingBatch(
    sample_lens=[11],
    split_lens=[3, 4, 4],
    attn_modes=["causal", "full", "noise"],
    packed_position_ids=torch.tensor([0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4]),
    packed_text_indexes=torch.tensor([0, 1, 2, 3, 6, 7, 10]),
    packed_text_ids=torch.tensor([353, 5, 354, 361, 362, 361, 362]),
    packed_vit_token_indexes=torch.tensor([4, 5]),
    packed_vit_position_ids=torch.tensor([0, 1]),
    packed_vit_tokens=torch.zeros(2, 588),
    vit_token_seqlens=[2],
    packed_vae_token_indexes=torch.tensor([8, 9]),
    packed_latent_position_ids=torch.tensor([0, 1]),
    packed_timesteps=torch.tensor([0.5, 0.5]),
    ce_loss_indexes=torch.tensor([0, 1]),
    packed_label_ids=torch.tensor([5, 354]),
    mse_loss_indexes=torch.tensor([8, 9]),
    ce_loss_weights=torch.tensor([1.0, 0.5]),
)
LATENTS = torch.zeros(2, 64)

INCONSISTENT = {
    "a row out of range": ("packed_text_indexes", lambda x: changed(x, 0, 11), "got 11. There are 11 rows"),
    "a negative row": ("packed_vae_token_indexes", lambda x: changed(x, 0, -1), "got -1. There are 11 rows"),
    "a row in two indexes": (
        "packed_vit_token_indexes",
        lambda x: changed(x, 0, 8),
        "row 4 must be in the token indexes once, got 0 times",
    ),
    "a row twice in one index": (
        "packed_text_indexes",
        lambda x: changed(x, 0, 1),
        r"row 0 must be in the token indexes once, got 0 times\.",
    ),
    "sample_lens too short": (
        "sample_lens",
        lambda x: [10],
        "packed_position_ids must have 10 entries, one per row in sample_lens, got 11",
    ),
    "split_lens too short": (
        "split_lens",
        lambda x: [3, 4, 3],
        "split_lens must add up to 11, the sum of sample_lens, got 10",
    ),
    "an unknown mode": (
        "attn_modes",
        lambda x: ["causal", "full", "noisy"],
        r"attn_modes\[2\] must be causal, full or noise, got 'noisy'",
    ),
    "a missing position": (
        "packed_position_ids",
        lambda x: x[1:],
        "must have 11 entries, one per row in sample_lens, got 10",
    ),
    "a missing text id": (
        "packed_text_ids",
        lambda x: x[1:],
        "must have 7 entries, one per packed_text_indexes, got 6",
    ),
    "a missing patch": (
        "packed_vit_tokens",
        lambda x: x[1:],
        "must have 2 entries, one per packed_vit_token_indexes, got 1",
    ),
    "flattened patches": ("packed_vit_tokens", lambda x: x.flatten(), "must be a 2-D floating-point tensor, got"),
    "wrong sum of image lengths": ("vit_token_seqlens", lambda x: [1], r"and add up to 2, .* got \[1\]"),
    "an image without patches": ("vit_token_seqlens", lambda x: [2, 0], r"must be positive and .* got \[2, 0\]"),
    "too many timesteps": (
        "packed_timesteps",
        lambda x: x.repeat(2),
        "must have 2 entries, one per packed_vae_token_indexes, got 4",
    ),
    "a NaN timestep": (
        "packed_timesteps",
        lambda x: x * torch.nan,
        "must be finite, or -inf for clean tokens, got NaN",
    ),
    "indexes in int32": ("mse_loss_indexes", lambda x: x.int(), r"must be a 1-D int64 tensor, got \(2,\) torch.int32"),
    "ids in floating point": ("packed_text_ids", lambda x: x.float(), "must be a 1-D int64 tensor, got"),
    "a missing label": ("packed_label_ids", lambda x: x[1:], "must have 2 entries, one per ce_loss_indexes, got 1"),
    "a label at a patch": ("ce_loss_indexes", lambda x: changed(x, 1, 4), "must be rows of text tokens, got 4"),
    "two labels of one row": ("ce_loss_indexes", lambda x: x * 0, "must be unique, got the same row twice"),
    "a weight of zero": ("ce_loss_weights", lambda x: torch.tensor([1.0, 0.0]), "must be > 0, got 0.0"),
    "too many weights": (
        "ce_loss_weights",
        lambda x: torch.ones(3),
        "must have 2 entries, one per ce_loss_indexes, got 3",
    ),
    "a noised token without loss": ("mse_loss_indexes", lambda x: x[1:], r"in order \(2 rows\), got 1 rows"),
    "a loss at a clean token": (
        "packed_timesteps",
        lambda x: changed(x, 1, -torch.inf),
        r"in order \(1 rows\), got 2 rows",
    ),
}

UNFIT = {
    "a token out of range": ("packed_text_ids", lambda x: changed(x, 0, 384), ".* got 384. There are 384"),
    "a negative label": ("packed_label_ids", lambda x: -1 - x, ".* got -6. There are 384 tokens of the vocabulary"),
    "a ViT position out of range": (
        "packed_vit_position_ids",
        lambda x: x + 100,
        ".* got 100. There are 100 ViT positions",
    ),
    "a latent position out of range": (
        "packed_latent_position_ids",
        lambda x: x + 256,
        ".* got 256. There are 256 latent positions",
    ),
    "a negative RoPE position": ("packed_position_ids", lambda x: x - 1, ".* got -1. There are 32768 RoPE positions"),
    "patches of another patch size": (
        "packed_vit_tokens",
        lambda x: x[:, 1:],
        r"must be of shape \(2, 588\), got \(2, 587\)",
    ),
}


def test_accepts_consistent_batch(model):
    losses = training_losses(model, BATCH, LATENTS, LATENTS)
    assert (len(BATCH), len(losses.ce_per_token), len(losses.mse_per_token)) == (11, 2, 2)


@pytest.mark.parametrize("wrong", INCONSISTENT)
def test_rejects_inconsistent_batch(wrong):
    name, change, message = INCONSISTENT[wrong]
    with pytest.raises(ValueError, match=message):
        replace(BATCH, **{name: change(getattr(BATCH, name))})


@pytest.mark.parametrize("wrong", UNFIT)
def test_rejects_batch_of_another_model(model, wrong):
    name, change, message = UNFIT[wrong]
    batch = replace(BATCH, **{name: change(getattr(BATCH, name))})
    with pytest.raises(ValueError, match=f"{name} {message}"):
        training_losses(model, batch, LATENTS, LATENTS)


def test_rejects_latents_and_noise_of_another_batch(model):
    with pytest.raises(ValueError, match=r"latents must be of shape \(2, 64\), got \(1, 64\)"):
        training_losses(model, BATCH, LATENTS[1:], LATENTS)
    with pytest.raises(ValueError, match=r"noise must be of shape \(2, 64\), got \(2, 63\)"):
        training_losses(model, BATCH, LATENTS, LATENTS[:, 1:])

"""The training forward against the inference path and against recorded cases."""

import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CHECKPOINT, PACK
from safetensors.torch import load_file, save_file

from bagel_rt.conformance.bagel.training import run_training_case
from bagel_rt.models.bagel.contents import NoisedImage, Text, VAEImage, ViTImage, image_rows
from bagel_rt.models.bagel.embed import position_ids
from bagel_rt.pipeline import Bagel
from bagel_rt.runtime.context import Context, Prefill
from bagel_rt.runtime.denoise import PackedBranches
from bagel_rt.train.batch import TrainingBatch
from bagel_rt.train.objective import flow_pair, flow_timesteps, training_losses

CASES = ["60_train_packed", "61_train_video_shift3"]
TOLERANCE = 2e-5  # float32, of the largest magnitude


@pytest.fixture(scope="module")
def bagel():
    return Bagel.from_pretrained(CHECKPOINT, device="cpu")


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


# Comparison with the inference path


@dataclass(frozen=True, eq=False)
class Noised(VAEImage):
    """An image to denoise: clean latents, noise, and the timestep before the sigmoid."""

    noise: torch.Tensor
    raw: float


class Draw:
    """Random contents of samples."""

    def __init__(self, seed, config):
        self.generator, self.config = torch.Generator().manual_seed(seed), config

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def text(self, n):
        return Text(tuple(torch.randint(0, 366, (n,), generator=self.generator).tolist()))

    def vit(self, rows, columns):
        return ViTImage(self.normal(rows * columns, self.config.patch_features), rows, columns)

    def clean(self, rows, columns):
        return VAEImage(self.normal(rows * columns, self.config.latent_features), rows, columns)

    def noised(self, rows, columns, raw):
        shape = (rows * columns, self.config.latent_features)
        return Noised(self.normal(*shape), rows, columns, self.normal(*shape), raw)


def pack(model, samples):
    """(batch, latents, noise) of samples; every text token but the last predicts the next."""
    rows, ids, positions, kinds, targets, raws = [], [], [], [], [], []
    splits, sample_lens, latents, noise, patches, sides = [], [], [], [], [], []
    for sample in samples:
        position, first = 0, len(kinds)
        for content in sample:
            start = len(kinds)
            if isinstance(content, Text):
                n, mode, advance = len(content.ids), "causal", len(content.ids)
                kinds += ["text"] * n
                ids += content.ids
                positions += range(position, position + n)
                targets += [(start + i, content.ids[i + 1]) for i in range(n - 1)]
            else:
                n, noised = image_rows(content.grid_h, content.grid_w), isinstance(content, Noised)
                mode, advance = ("noise", 0) if noised else ("full", 1)
                kind = "vit" if isinstance(content, ViTImage) else "vae"
                kinds += ["text", *[kind] * (n - 2), "text"]
                ids += model.markers
                positions += [position] * n
                if kind == "vit":
                    patches.append(content.patches)
                    sides.append((content.grid_h, content.grid_w))
                else:
                    latents.append(content)
                    noise.append(content.noise if noised else torch.full_like(content.latents, 7.0))
                    raws += [content.raw if noised else -torch.inf] * (n - 2)
            splits.append((n, mode))
            position += advance
        sample_lens.append(len(kinds) - first)
    kinds = np.array(kinds)
    rows = {kind: torch.from_numpy(np.flatnonzero(kinds == kind)) for kind in ("text", "vit", "vae")}
    config, nothing = model.config, torch.zeros(0, dtype=torch.int64)
    vae_ids = [position_ids(c.grid_h, c.grid_w, config.max_latent_size) for c in latents]
    vit_ids = [position_ids(*side, config.vit.max_patches_per_side) for side in sides]
    raws = torch.tensor(raws)
    batch = TrainingBatch(
        sample_lens=sample_lens,
        split_lens=[n for n, _ in splits],
        attn_modes=[mode for _, mode in splits],
        packed_position_ids=torch.tensor(positions, dtype=torch.int64),
        packed_text_indexes=rows["text"],
        packed_text_ids=torch.tensor(ids, dtype=torch.int64),
        packed_vit_token_indexes=rows["vit"],
        packed_vit_position_ids=torch.cat([nothing, *vit_ids]),
        packed_vit_tokens=torch.cat([torch.zeros(0, config.patch_features), *patches]),
        vit_token_seqlens=[len(p) for p in patches],
        packed_vae_token_indexes=rows["vae"],
        packed_latent_position_ids=torch.cat([nothing, *vae_ids]),
        packed_timesteps=raws,
        ce_loss_indexes=torch.tensor([row for row, _ in targets], dtype=torch.int64),
        packed_label_ids=torch.tensor([label for _, label in targets], dtype=torch.int64),
        mse_loss_indexes=rows["vae"][raws > -torch.inf],
    )
    features = torch.zeros(0, config.latent_features)
    return batch, torch.cat([features, *(c.latents for c in latents)]), torch.cat([features, *noise])


def infer(model, sample, shift):
    """Run one sample through the inference path: hidden states of clean rows, CE and MSE per token, in order."""
    cache = model.make_cache()
    context, hidden, ce, mse = Context(cache), [], [], []
    for content in sample:
        if isinstance(content, Noised):
            t = flow_timesteps(torch.tensor([content.raw]), shift)
            x, target = flow_pair(content.latents, content.noise, t)
            grid = (content.grid_h, content.grid_w)
            borrowed = [(0, context, context.borrow(image_rows(*grid)))]
            branches = PackedBranches(model, cache, [NoisedImage(*grid)], borrowed, [[0]])
            embedded = model.embed_latents(x, model.latent_positions(*grid) + model.time_embedding(t))
            velocity = model.velocity(branches.forward(embedded))
            mse.append((velocity - target).square().mean(1))
            continue
        prefill = Prefill(model, cache)
        prefill.append(context, content)
        packed, plan = prefill.run()
        order = torch.from_numpy(plan.order).argsort()
        hidden.append(model.transformer.final_norm(packed, plan.G)[order])
        if isinstance(content, Text):
            logits = model.logits(packed[order][:-1])
            ce.append(F.cross_entropy(logits, torch.tensor(content.ids[1:], dtype=torch.int64), reduction="none"))
    return hidden, ce, mse


def samples_of(kind, draw):
    edit = [draw.clean(2, 3), draw.vit(3, 2), draw.text(5), draw.noised(3, 3, 0.2), draw.clean(3, 3), draw.text(4)]
    return {
        "no samples": [],
        "one token of text": [[draw.text(1)]],
        "text only": [[draw.text(6), draw.text(2)]],
        "a noised image before anything else": [[draw.noised(2, 2, -1.0), draw.text(3)]],
        "text to image": [[draw.text(7), draw.noised(4, 2, 0.7)]],
        "an image question": [[draw.vit(2, 5), draw.text(9)], [draw.vit(1, 1), draw.text(2)]],
        "a chain of edits": [[*edit, draw.noised(1, 5, -0.4)], [draw.text(3), draw.noised(2, 2, 1.5)]],
        "two noised images in a row": [[draw.text(3), draw.noised(2, 2, 0.0), draw.noised(2, 3, 3.0)]],
    }[kind]


KINDS = [
    "no samples", "one token of text", "text only", "a noised image before anything else",
    "text to image", "an image question", "a chain of edits", "two noised images in a row",
]  # fmt: skip


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_forward_matches_inference(bagel, kind, shift):
    samples = samples_of(kind, Draw(KINDS.index(kind), bagel.model.config))
    batch, latents, noise = pack(bagel.model, samples)
    losses = training_losses(bagel.model, batch, latents, noise, shift)
    inferred = [infer(bagel.model, sample, shift) for sample in samples]
    clean = [row for row, mode in enumerate(np.repeat(batch.attn_modes, batch.split_lens)) if mode != "noise"]
    per_token = (losses.last_hidden[clean], losses.ce_per_token, losses.mse_per_token)
    for got, parts in zip(per_token, zip(*inferred, strict=True), strict=False):
        expected = torch.cat([torch.zeros(0, *got.shape[1:]), *sum(parts, [])])
        assert got.shape == expected.shape
        if len(expected):
            close(got, expected)
    for mean, each in ((losses.ce, losses.ce_per_token), (losses.mse, losses.mse_per_token)):
        assert mean == (each.mean() if len(each) else 0)
    assert losses.ce_reweighted is None


def test_only_its_own_split_depends_on_a_noised_image(bagel):
    samples = samples_of("a chain of edits", Draw(0, bagel.model.config))
    batch, latents, noise = pack(bagel.model, samples)
    before = training_losses(bagel.model, batch, latents, noise)
    first = batch.noised & (batch.packed_timesteps == 0.2)
    after = training_losses(bagel.model, batch, latents, torch.where(first[:, None], noise + 1, noise))
    rows = torch.ones(len(batch), dtype=torch.bool)
    start = int(batch.packed_vae_token_indexes[first][0]) - 1
    rows[start : start + 11] = False
    close(after.last_hidden[rows], before.last_hidden[rows])
    assert ((after.last_hidden - before.last_hidden).abs().amax(1) > 1e-3)[~rows].all()


def test_clean_tokens_ignore_their_noise(bagel):
    batch, latents, noise = pack(bagel.model, samples_of("a chain of edits", Draw(0, bagel.model.config)))
    losses = training_losses(bagel.model, batch, latents, noise)
    other = training_losses(bagel.model, batch, latents, torch.where(batch.noised[:, None], noise, -3.0))
    assert torch.equal(losses.last_hidden, other.last_hidden)


def test_reweighted_cross_entropy_is_the_weighted_mean(bagel):
    batch, latents, noise = pack(bagel.model, samples_of("text only", Draw(0, bagel.model.config)))
    weights = torch.arange(1.0, 1 + len(batch.ce_loss_indexes))
    losses = training_losses(bagel.model, replace(batch, ce_loss_weights=weights), latents, noise)
    expected = np.average(losses.ce_per_token.double().numpy(), weights=weights.numpy())
    assert float(losses.ce_reweighted) == pytest.approx(expected, rel=TOLERANCE)
    assert losses.ce == losses.ce_per_token.mean()


# Recorded cases


@pytest.mark.parametrize("case", CASES)
def test_reproduces_recorded_training_forward(bagel, case):
    results = run_training_case(bagel, PACK, PACK / "cases" / case)
    assert [result for result in results if not result.passed] == []
    golden = load_file(PACK / "cases" / case / "tensors.safetensors")
    inputs = {name for name in golden if name.startswith("batch.")} | {"vae_eps", "flow_noise"}
    assert set(golden) - inputs <= {result.name for result in results}
    assert sum(result.name.startswith("grad_norms.") for result in results) == 137


def perturb(x):
    return x.flatten().index_add(0, torch.tensor([7]), 2e-4 * x.abs().max()[None]).view(x.shape)


@pytest.mark.parametrize(
    "name, change",
    [
        ("mask_packed", lambda x: x ^ (torch.arange(x.numel()).view(x.shape) == 70).byte()),
        ("last_hidden_rows", perturb),
        ("padded_latent", perturb),
        ("ce_per_token", lambda x: x[:-1]),
        ("grad.llm2vae.bias", perturb),
        ("unknown", lambda x: torch.zeros(1)),
    ],
    ids=[
        "one bit of the mask",
        "one hidden value",
        "one latent value",
        "a missing token",
        "one gradient",
        "an unknown tensor",
    ],
)
def test_case_fails_on(bagel, tmp_path, name, change):
    case = tmp_path / CASES[1]
    shutil.copytree(PACK / "cases" / CASES[1], case)
    golden = load_file(case / "tensors.safetensors")
    save_file(golden | {name: change(golden.get(name))}, case / "tensors.safetensors")
    assert [result.name for result in run_training_case(bagel, PACK, case) if not result.passed] == [name]

"""Training of the autoencoder: losses, stopping and resuming, and evaluation of the result."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bagel_rt.errors import CheckpointError
from bagel_rt.kernels import group_norm
from bagel_rt.models.bagel.autoencoder import AutoEncoder
from bagel_rt.models.bagel.config import VAEConfig
from bagel_rt.models.bagel.images import image_to_tensor
from bagel_rt.tiny.render import render
from bagel_rt.tiny.scene import Scene, split_of
from bagel_rt.tiny.train_autoencoder import (
    depicts,
    draw_images,
    draw_split_scene,
    evaluate_reconstructions,
    load_autoencoder,
    measure_latents,
    train_autoencoder,
)
from bagel_rt.train.autoencoder import AutoencoderSettings, AutoencoderTrainer, autoencoder_losses, edge_mask

CONFIG = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=2)
SETTINGS = AutoencoderSettings(steps=6, warmup_steps=2, bfloat16=False)


def plain_images(rng: np.random.Generator, done: float) -> list[Image.Image]:
    """Two 16x16 images, each with two vertical stripes."""
    images = []
    for _ in range(2):
        colors = rng.integers(0, 256, (2, 3), dtype=np.uint8)
        images.append(Image.fromarray(np.repeat(colors[None], 16, axis=0).repeat(8, axis=1)))
    return images


def tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return list(model.state_dict().values())


# Losses


def test_kl_matches_torch_distributions():
    torch.manual_seed(0)
    network = AutoEncoder(CONFIG).double()
    pixels = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1
    _, kl = autoencoder_losses(network, pixels, torch.Generator().manual_seed(0))
    mean, logvar = network.moments(pixels)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl.double(), expected, rtol=1e-6, atol=0)


def test_loss_gradient_matches_finite_differences():
    torch.manual_seed(0)
    network = AutoEncoder(VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=1)).double()
    pixels = torch.rand(1, 3, 8, 8) * 2 - 1

    def loss() -> torch.Tensor:
        reconstruction, kl = autoencoder_losses(network, pixels, torch.Generator().manual_seed(1))
        return reconstruction + kl

    loss().backward()
    slope = sum(weight.grad.square().sum() for weight in network.parameters()).item()
    step, ends = 1e-3 / slope, []
    with torch.no_grad():
        for distance in (step, -2 * step):
            for weight in network.parameters():
                weight += distance * weight.grad
            ends.append(loss().item())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-2)  # the losses are float32


def test_edge_weight_applies_near_edges():
    pixels = torch.full((1, 3, 16, 16), -1.0)
    pixels[:, 0, :, 8:] = 1.0
    near = edge_mask(pixels)
    assert near.shape == (1, 1, 16, 16) and near[0, 0].all(0).nonzero().flatten().tolist() == [6, 7, 8, 9]
    assert near.sum() == 4 * 16
    torch.manual_seed(0)
    network = AutoEncoder(CONFIG)
    plain, weighted = (
        autoencoder_losses(network, pixels, torch.Generator().manual_seed(0), edges)[0] for edges in (0.0, 3.0)
    )
    cut, _ = autoencoder_losses(network, pixels, torch.Generator().manual_seed(0), 1e6)
    torch.testing.assert_close(weighted, plain + 3e-6 * (cut - plain), rtol=1e-4, atol=0)


@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
def test_group_norm_bfloat16_gradient_matches_float64(silu):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 9, 7, generator=generator).contiguous(memory_format=torch.channels_last)
    inputs = [x, *torch.randn(2, 64, generator=generator), torch.randn(x.shape, generator=generator)]
    gradients = []
    for dtype in (torch.bfloat16, torch.float64):
        *leaves, dy = (tensor.bfloat16().to(dtype) for tensor in inputs)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        gradients.append(torch.autograd.grad(group_norm(*leaves, 32, 1e-6, silu), leaves, dy))
    for got, expected in zip(*gradients, strict=True):
        assert got.dtype == torch.bfloat16 and got.stride() == expected.stride()
        assert (got.double() - expected).norm() < 0.01 * expected.norm()


# Runs


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    whole = AutoencoderTrainer(CONFIG, plain_images, SETTINGS, tmp_path / "whole")
    assert whole.run(progress=False)
    for _ in range(2):
        part = AutoencoderTrainer(CONFIG, plain_images, SETTINGS, tmp_path / "parts")
        for _ in range(3):
            part.train_step()
        part.save()
    resumed = AutoencoderTrainer(CONFIG, plain_images, SETTINGS, tmp_path / "parts")
    assert resumed.run(progress=False) and resumed.step == 6
    assert all(map(torch.equal, tensors(whole.averaged()), tensors(resumed.averaged())))
    assert all(map(torch.equal, tensors(whole.network), tensors(part.network)))


def test_log_has_one_line_per_step_after_resuming(tmp_path):
    trainer = AutoencoderTrainer(CONFIG, plain_images, SETTINGS, tmp_path)
    assert not trainer.run(seconds=0, progress=False) and trainer.step == 0
    (tmp_path / "log.jsonl").write_text('{"step": 1, "reconstruction": 9.0}\n')  # left by a killed run
    assert AutoencoderTrainer(CONFIG, plain_images, SETTINGS, tmp_path).run(progress=False)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6] and entries[0]["reconstruction"] < 9


def test_partial_step_is_not_saved(tmp_path, monkeypatch):
    trainer = AutoencoderTrainer(CONFIG, plain_images, SETTINGS, tmp_path)
    trainer.train_step()
    trainer.save()
    before = tensors(trainer.averaged())

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_lerp_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.run(progress=False)
    resumed = AutoencoderTrainer(CONFIG, plain_images, SETTINGS, tmp_path)
    assert resumed.step == 1 and all(map(torch.equal, tensors(resumed.averaged()), before))


def test_non_finite_gradient_stops_the_run(tmp_path):
    trainer = AutoencoderTrainer(CONFIG, plain_images, SETTINGS, tmp_path)
    trainer._weights[0].fill_(float("nan"))
    before = trainer._weights[1].clone()
    with pytest.raises(RuntimeError, match="non-finite"):
        trainer.train_step()
    assert torch.equal(trainer._weights[1], before)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
def test_loss_decreases(tmp_path, bfloat16):
    images = plain_images(np.random.default_rng(0), 0.0)
    settings = AutoencoderSettings(steps=30, warmup_steps=5, bfloat16=bfloat16, ema=0.8)
    trainer = AutoencoderTrainer(CONFIG, lambda rng, done: images, settings, tmp_path)
    assert trainer.run(progress=False)
    logged = [json.loads(line)["reconstruction"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged[-1] < 0.5 * logged[0]
    pixels = torch.stack([image_to_tensor(image) for image in images])
    averaged, _ = autoencoder_losses(trainer.averaged(), pixels, torch.Generator().manual_seed(0))
    assert averaged < 0.6 * logged[0]


def test_rejects_state_of_other_settings(tmp_path):
    AutoencoderTrainer(CONFIG, plain_images, SETTINGS, tmp_path).save()
    with pytest.raises(CheckpointError, match=r"run must be .*steps=6.*to resume .*got .*steps=7"):
        AutoencoderTrainer(CONFIG, plain_images, AutoencoderSettings(steps=7), tmp_path)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"kl_weight": float("nan")}, "kl_weight must be a number >= 0, got nan"),
        ({"learning_rate": 0.0}, "learning_rate must be a number > 0, got 0.0"),
        ({"ema": 1.0}, "ema must be a number >= 0 and < 1, got 1.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_rejects_settings_out_of_range(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AutoencoderSettings(**{"steps": 1, **values})


def test_learning_rate_warms_up_and_decays():
    settings = AutoencoderSettings(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [settings.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and np.argmax(rates) == 9 and rates[-1] < 0.001
    assert rates[50] == pytest.approx(0.5, abs=0.01)


# Images of the world of shapes


def test_training_images_are_from_the_training_split_and_not_blank():
    rng = np.random.default_rng(0)
    flat = 0
    for done, expected in ((0.0, {(8, 32), (4, 64), (1, 128)}), (0.5, {(4, 64), (1, 128)})):
        sizes = set()
        for _ in range(30):
            images = draw_images(rng, done)
            assert len({image.size for image in images}) == 1
            sizes.add((len(images), images[0].width))
            flat += sum(len(image.getcolors(1 << 14)) == 1 for image in images)
        assert sizes == expected
    assert flat < 10
    assert all(split_of(draw_split_scene(split, rng)) == split for split in ("train", "test") for _ in range(5))


def test_image_depicts_only_its_own_scene():
    rng = np.random.default_rng(0)
    one, other = draw_split_scene("test", rng), draw_split_scene("test", rng)
    assert depicts(render(one), one) and not depicts(render(one), other)
    background = "white" if one.background != "white" else "black"
    assert not depicts(render(Scene(background, one.things)), one)


def test_trained_autoencoder_has_normalized_latents(tmp_path):
    config = VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4)
    settings = AutoencoderSettings(steps=1)
    assert not train_autoencoder(tmp_path, config, settings, 8, seconds=0, progress=False)
    assert train_autoencoder(tmp_path, config, settings, 8, progress=False)
    model = load_autoencoder(tmp_path, config)
    stored = load_file(tmp_path / "ae.safetensors")
    assert all(torch.equal(stored[name].float(), weight) for name, weight in model.state_dict().items())
    pixels = torch.stack(
        [image_to_tensor(render(draw_split_scene("train", np.random.default_rng(5)))) for _ in range(4)]
    )
    latents = model.encode(pixels, torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert latents.mean() == pytest.approx(0, abs=0.2) and latents.std() == pytest.approx(1, abs=0.1)
    figures = json.loads((tmp_path / "ae.json").read_text())
    assert figures == measure_latents(model, 8) | evaluate_reconstructions(model, 8)
    assert figures["agreement"] == 0 and figures["psnr"] < 12  # after a single step

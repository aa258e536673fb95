"""The autoencoder against recorded tensors, and, for other shapes, against its formulas in float64."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CHECKPOINT, PACK
from live_bytes import LiveBytes
from PIL import Image
from safetensors.torch import load_file

from bagel_rt.models.bagel import autoencoder_blocks as vae_blocks
from bagel_rt.models.bagel.autoencoder import AutoEncoder, decode_memory, encode_memory
from bagel_rt.models.bagel.config import BAGEL_7B_MOT, BagelConfig, VAEConfig
from bagel_rt.models.bagel.images import ResizeRule, image_to_tensor

CASE = PACK / "cases" / "04_vae"
TOLERANCE = 5e-5  # float32 against float32, of the largest recorded magnitude

SHAPES = {  # (configuration, latent height, latent width, batch)
    "one-level-one-cell": (VAEConfig(ch=64, ch_mult=(1,), num_res_blocks=1, z_channels=1), 1, 1, 1),
    "first-level-wider-than-ch": (VAEConfig(ch=32, ch_mult=(2, 1), num_res_blocks=2, z_channels=5), 3, 1, 2),
    "five-levels": (VAEConfig(ch=32, ch_mult=(1, 2, 1, 3, 2), num_res_blocks=1, z_channels=4), 1, 2, 1),
    "three-blocks-other-scale": (
        VAEConfig(ch=64, ch_mult=(1, 2), num_res_blocks=3, z_channels=3, scale_factor=2.5, shift_factor=-0.7), 2, 3, 1,
    ),
}  # fmt: skip
shapes = pytest.mark.parametrize("config, height, width, batch", SHAPES.values(), ids=SHAPES)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert (got.double() - want.double()).abs().max() <= TOLERANCE * want.abs().max()


# Recorded truth


@pytest.fixture(scope="module")
def vae() -> AutoEncoder:
    with torch.device("meta"):
        model = AutoEncoder(BagelConfig.from_folder(CHECKPOINT).vae)
    model.load_state_dict(load_file(CHECKPOINT / "ae.safetensors"), strict=True, assign=True)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(CASE / "tensors.safetensors")


def test_encodes_and_decodes_the_recorded_picture(vae, golden):
    mean, logvar = vae.moments(golden["pixels"])
    close(mean, golden["mean"])
    close(logvar, golden["logvar"])
    close(vae.encode(golden["pixels"], golden["eps"]), golden["latent"])
    close(vae.decode(golden["latent"]), golden["recon"])
    close(vae.decode(golden["random_latent"]), golden["random_latent_decoded"])


def test_pictures_padded_to_one_canvas_influence_the_recorded_latents(vae, golden):
    inputs = json.loads((CASE / "meta.json").read_text())["inputs"]
    canvas = torch.zeros(len(inputs["padded_images"]), 3, *inputs["padded_canvas_hw"])
    for place, name in zip(canvas, inputs["padded_images"], strict=True):
        pixels = image_to_tensor(ResizeRule(128, 64, 16).resize(Image.open(PACK / name)))
        place[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    close(vae.encode(canvas, golden["padded_eps"]), golden["padded_latent"])


@pytest.mark.parametrize("case", ["10_t2i_nocfg_shift1", "20_edit_text_channel"])
def test_decodes_what_the_recorded_generations_decoded(vae, case):
    recorded = load_file(PACK / "cases" / case / "tensors.safetensors")
    close(vae.decode(recorded["i00.decoder_input"]), recorded["i00.image_float"])


def test_the_published_one_has_the_published_size():
    with torch.device("meta"):
        parameters = dict(AutoEncoder(BAGEL_7B_MOT.vae).named_parameters())
    assert len(parameters) == 244 and sum(p.numel() for p in parameters.values()) == 83_819_683


# Other shapes, from the definition


def norm(p: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    groups = x.reshape(x.shape[0], 32, -1)
    spread = (groups.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    groups = (groups - groups.mean(-1, keepdim=True)) / spread
    return groups.reshape(x.shape) * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]


def conv(p: dict, name: str, x: torch.Tensor, **options) -> torch.Tensor:
    weight = p[f"{name}.weight"]
    options = {"padding": weight.shape[-1] // 2} | options
    return F.conv2d(x, weight, p[f"{name}.bias"], **options)


def swish(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def block(p: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    y = conv(p, f"{name}.conv1", swish(norm(p, f"{name}.norm1", x)))
    y = conv(p, f"{name}.conv2", swish(norm(p, f"{name}.norm2", y)))
    return y + (conv(p, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in p else x)


def middle(p: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    x = block(p, f"{name}.block_1", x)
    y = norm(p, f"{name}.attn_1.norm", x)
    q, k, v = (conv(p, f"{name}.attn_1.{which}", y).flatten(2) for which in "qkv")
    share = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / q.shape[1] ** 0.5, dim=-1)
    y = torch.einsum("bqk,bck->bcq", share, v).reshape(x.shape)
    return block(p, f"{name}.block_2", x + conv(p, f"{name}.attn_1.proj_out", y))


def moments_of(p: dict, config: VAEConfig, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = conv(p, "encoder.conv_in", x)
    for level in range(len(config.ch_mult)):
        for index in range(config.num_res_blocks):
            x = block(p, f"encoder.down.{level}.block.{index}", x)
        if level < len(config.ch_mult) - 1:
            x = conv(p, f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), padding=0, stride=2)
    x = conv(p, "encoder.conv_out", swish(norm(p, "encoder.norm_out", middle(p, "encoder.mid", x))))
    return x[:, : config.z_channels], x[:, config.z_channels :]


def decoded(p: dict, config: VAEConfig, z: torch.Tensor) -> torch.Tensor:
    x = middle(p, "decoder.mid", conv(p, "decoder.conv_in", z / config.scale_factor + config.shift_factor))
    for level in range(len(config.ch_mult) - 1, -1, -1):
        for index in range(config.num_res_blocks + 1):
            x = block(p, f"decoder.up.{level}.block.{index}", x)
        if level:
            x = conv(p, f"decoder.up.{level}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv(p, "decoder.conv_out", swish(norm(p, "decoder.norm_out", x)))


def random_vae(config: VAEConfig) -> tuple[AutoEncoder, dict[str, torch.Tensor]]:
    """A model whose norms and biases matter too, and its parameters in float64."""
    torch.manual_seed(0)
    model = AutoEncoder(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter += torch.randn_like(parameter) / 3
    return model, {name: parameter.double() for name, parameter in model.named_parameters()}


@shapes
def test_matches_the_float64_formulas(config, height, width, batch):
    model, p = random_vae(config)
    pixels = torch.randn(batch, 3, height * config.downsample, width * config.downsample)
    latent, noise = torch.randn(2, batch, config.z_channels, height, width)
    mean, logvar = moments_of(p, config, pixels.double())
    for got, want in zip(model.moments(pixels), (mean, logvar), strict=True):
        close(got, want)
    want = config.scale_factor * (mean + noise.double() * (logvar / 2).exp() - config.shift_factor)
    close(model.encode(pixels, noise), want)
    close(model.decode(latent), decoded(p, config, latent.double()))


@shapes
def test_the_meta_device_knows_every_shape_and_allocates_nothing(config, height, width, batch):
    with torch.device("meta"):
        model = AutoEncoder(config)
        latent = torch.empty(batch, config.z_channels, height, width)
    pixels = model.decode(latent)
    assert pixels.shape == (batch, 3, height * config.downsample, width * config.downsample)
    assert model.encode(pixels, latent).shape == latent.shape
    assert all(tensor.is_meta for tensor in [*model.parameters(), pixels])


def test_a_flat_picture_has_a_finite_latent(vae):
    pixels = torch.ones(1, 3, 16, 16)
    assert vae.encode(pixels, torch.zeros(1, 16, 2, 2)).isfinite().all()


def test_a_latent_comes_from_the_posterior_and_not_its_mean(vae, golden):
    draws = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *golden["eps"].shape))).float()
    first, second = (vae.encode(golden["pixels"], draw) for draw in draws)
    want = (golden["logvar"] / 2).exp() * (draws[0] - draws[1]) * vae.config.scale_factor
    assert (first - second - want).abs().max() <= 1e-5


# Large maps


def strips_of(monkeypatch, elements: int) -> None:
    """Let maps of more than so many elements run in strips of at most as many."""
    monkeypatch.setattr(vae_blocks, "STRIP_ELEMENTS", elements)
    monkeypatch.setattr(sys.modules["bagel_rt.kernels.group_norm"], "REFERENCE_ELEMENTS", elements)


LARGE = {  # (configuration, batch, latent height, latent width, elements of a strip)
    "strips-that-do-not-divide-the-height": (VAEConfig(ch=32, num_res_blocks=1), 1, 5, 3, 3000),
    "strips-of-one-row": (VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1), 1, 7, 5, 1),
    "a-last-strip-of-one-row": (VAEConfig(ch=32, ch_mult=(2, 1), num_res_blocks=1), 1, 8, 4, 64 * 4 * 3),
    "two-pictures": (VAEConfig(ch=32, ch_mult=(2, 1, 2), num_res_blocks=2), 2, 3, 6, 5000),
    "one-level-of-odd-sides": (VAEConfig(ch=64, ch_mult=(1,), num_res_blocks=1), 1, 13, 17, 4096),
    "one-column": (VAEConfig(ch=32, ch_mult=(1, 3), num_res_blocks=1), 1, 9, 1, 300),
}
large = pytest.mark.parametrize("config, batch, height, width, elements", LARGE.values(), ids=LARGE)


def drawn(config: VAEConfig, batch: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A latent and a picture of its size."""
    torch.manual_seed(1)
    side = config.downsample
    return torch.randn(batch, config.z_channels, height, width), torch.randn(batch, 3, height * side, width * side)


@large
def test_strips_give_the_same_picture_and_latent(config, batch, height, width, elements, monkeypatch):
    model, _ = random_vae(config)
    latent, pixels = drawn(config, batch, height, width)
    want = model.decode(latent), model.encode(pixels, latent)
    strips, cut = [], vae_blocks._strips

    def recorded(*given, **options):
        strips.append(list(cut(*given, **options)))
        return strips[-1]

    monkeypatch.setattr(vae_blocks, "_strips", recorded)
    strips_of(monkeypatch, elements)
    for got, plain in zip((model.decode(latent), model.encode(pixels, latent)), want, strict=True):
        assert got.shape == plain.shape
        assert (got - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert any(len(rows) > 1 for rows in strips)


def test_large_maps_are_left_whole_where_gradients_are_wanted(monkeypatch):
    config = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)
    model, _ = random_vae(config)
    latent, _ = drawn(config, 1, 3, 2)

    def gradient():
        wanted = latent.clone().requires_grad_()
        return torch.autograd.grad(model.decode(wanted).square().sum(), wanted)[0]

    want = gradient()
    monkeypatch.setattr(vae_blocks, "STRIP_ELEMENTS", 1)
    assert torch.equal(gradient(), want)


def test_strips_of_a_picture_in_half_precision(monkeypatch):
    config = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)
    model = random_vae(config)[0].bfloat16()
    latent, _ = drawn(config, 1, 5, 4)
    want = model.decode(latent.bfloat16())
    strips_of(monkeypatch, 1000)
    got = model.decode(latent.bfloat16())
    assert got.dtype == torch.bfloat16 and (got - want).abs().max() <= 0.05 * want.abs().max()


def test_attention_over_many_cells_takes_some_queries_at_a_time(monkeypatch):
    config = VAEConfig(ch=32, ch_mult=(1,), num_res_blocks=1)
    model, _ = random_vae(config)
    latent, _ = drawn(config, 2, 5, 9)
    want, asked, attend = model.decode(latent), [], F.scaled_dot_product_attention
    monkeypatch.setattr(vae_blocks, "QUERIES", 16)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: asked.append(q.shape[2]) or attend(q, k, v))
    torch.testing.assert_close(model.decode(latent), want, rtol=1e-5, atol=1e-5)
    assert asked == [16, 16, 13]


# Memory


@large
@pytest.mark.parametrize("in_strips", [False, True], ids=["whole", "strips"])
def test_the_expected_memory_bounds_what_is_alive(config, batch, height, width, elements, in_strips, monkeypatch):
    model, _ = random_vae(config)
    latent, pixels = drawn(config, batch, height, width)
    if in_strips:
        strips_of(monkeypatch, elements)
    for work, inputs, expected in (
        (lambda: model.decode(latent), [latent], decode_memory),
        (lambda: model.encode(pixels, latent), [pixels, latent], encode_memory),
    ):
        with torch.inference_mode(), LiveBytes(torch.device("cpu"), *inputs) as live:
            work()
        bound = expected(config, *pixels.shape[2:], batch=batch)
        assert live.peak <= bound <= 1.35 * live.peak


def test_the_published_decoder_stays_within_ten_gigabytes_at_2048():
    expected = decode_memory(BAGEL_7B_MOT.vae, 2048, 2048)
    assert 4 * 2048**2 * (256 + 128) < expected < 8e9  # two maps are there at once, and not much more
    assert decode_memory(BAGEL_7B_MOT.vae, 1024, 1024) < 2e9
    assert decode_memory(BAGEL_7B_MOT.vae, 2048, 2048, itemsize=2) * 2 == expected


# Refused

BAD = {
    "a-height-between-two-cells": (lambda v: v.moments(torch.zeros(1, 3, 20, 16)), r"20, 16\]; .*multiples of 8"),
    "a-width-between-two-cells": (lambda v: v.encode(torch.zeros(1, 3, 16, 4), None), "multiples of 8. Resize"),
    "grey-pixels": (lambda v: v.moments(torch.zeros(1, 1, 16, 16)), r"\[1, 1, 16, 16\]; allowed: \[B, 3, H, W\]"),
    "pixels-without-a-batch": (lambda v: v.moments(torch.zeros(3, 16, 16)), r"\[3, 16, 16\]; allowed: \[B, 3, H, W\]"),
    "no-pixels": (lambda v: v.moments(torch.zeros(1, 3, 0, 16)), "none of them 0"),
    "noise-of-the-pixels-shape": (
        lambda v: v.encode(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)),
        r"noise is \[1, 3, 16, 16\]; allowed: \[1, 16, 2, 2\]",
    ),
    "noise-that-would-broadcast": (
        lambda v: v.encode(torch.zeros(2, 3, 16, 16), torch.zeros(1, 16, 2, 2)), r"allowed: \[2, 16, 2, 2\]",
    ),
    "a-latent-of-other-channels": (lambda v: v.decode(torch.zeros(1, 4, 2, 2)), r"\[1, 4, 2, 2\]; allowed: \[B, 16"),
    "an-empty-latent": (lambda v: v.decode(torch.zeros(1, 16, 0, 2)), "none of them 0"),
    "a-latent-without-a-batch": (lambda v: v.decode(torch.zeros(16, 2, 2)), r"\[16, 2, 2\]; allowed"),
}  # fmt: skip


@pytest.mark.parametrize("action, message", BAD.values(), ids=BAD)
def test_refuses(vae, action, message):
    with pytest.raises(ValueError, match=message):
        action(vae)


def test_the_channels_of_pixels_are_the_configurations():
    config = replace(VAEConfig(), ch=32, ch_mult=(1,), num_res_blocks=1)
    assert AutoEncoder(config).moments(torch.zeros(1, config.in_channels, 3, 5))[0].shape == (1, 16, 3, 5)

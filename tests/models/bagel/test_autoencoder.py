"""The autoencoder against recorded tensors of the official code and, for other shapes, against float64 formulas."""

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
    "one-level-1x1": (VAEConfig(ch=64, ch_mult=(1,), num_res_blocks=1, z_channels=1), 1, 1, 1),
    "first-level-wider-than-ch": (VAEConfig(ch=32, ch_mult=(2, 1), num_res_blocks=2, z_channels=5), 3, 1, 2),
    "five-levels": (VAEConfig(ch=32, ch_mult=(1, 2, 1, 3, 2), num_res_blocks=1, z_channels=4), 1, 2, 1),
    "three-blocks-other-scale": (
        VAEConfig(ch=64, ch_mult=(1, 2), num_res_blocks=3, z_channels=3, scale_factor=2.5, shift_factor=-0.7), 2, 3, 1,
    ),
}  # fmt: skip
shapes = pytest.mark.parametrize("config, height, width, batch", SHAPES.values(), ids=SHAPES)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).abs().max() <= TOLERANCE * expected.abs().max()


# Recorded tensors


@pytest.fixture(scope="module")
def vae() -> AutoEncoder:
    with torch.device("meta"):
        model = AutoEncoder(BagelConfig.from_folder(CHECKPOINT).vae)
    model.load_state_dict(load_file(CHECKPOINT / "ae.safetensors"), strict=True, assign=True)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_file(CASE / "tensors.safetensors")


def test_encode_and_decode_match_the_recorded_tensors(vae, recorded):
    mean, logvar = vae.moments(recorded["pixels"])
    close(mean, recorded["mean"])
    close(logvar, recorded["logvar"])
    close(vae.encode(recorded["pixels"], recorded["eps"]), recorded["latent"])
    close(vae.decode(recorded["latent"]), recorded["recon"])
    close(vae.decode(recorded["random_latent"]), recorded["random_latent_decoded"])


def test_encode_of_images_padded_to_one_size_matches_the_recorded_latents(vae, recorded):
    inputs = json.loads((CASE / "meta.json").read_text())["inputs"]
    canvas = torch.zeros(len(inputs["padded_images"]), 3, *inputs["padded_canvas_hw"])
    for padded, name in zip(canvas, inputs["padded_images"], strict=True):
        pixels = image_to_tensor(ResizeRule(128, 64, 16).resize(Image.open(PACK / name)))
        padded[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    close(vae.encode(canvas, recorded["padded_eps"]), recorded["padded_latent"])


@pytest.mark.parametrize("case", ["10_t2i_nocfg_shift1", "20_edit_text_channel"])
def test_decode_matches_the_recorded_generations(vae, case):
    recorded = load_file(PACK / "cases" / case / "tensors.safetensors")
    close(vae.decode(recorded["i00.decoder_input"]), recorded["i00.image_float"])


def test_published_configuration_has_the_published_parameter_count():
    with torch.device("meta"):
        parameters = dict(AutoEncoder(BAGEL_7B_MOT.vae).named_parameters())
    assert len(parameters) == 244 and sum(p.numel() for p in parameters.values()) == 83_819_683


# Other shapes: a second implementation of the formulas


def norm(p: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    groups = x.reshape(x.shape[0], 32, -1)
    std = (groups.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    groups = (groups - groups.mean(-1, keepdim=True)) / std
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


def mid_block(p: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    x = block(p, f"{name}.block_1", x)
    y = norm(p, f"{name}.attn_1.norm", x)
    q, k, v = (conv(p, f"{name}.attn_1.{part}", y).flatten(2) for part in "qkv")
    weights = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / q.shape[1] ** 0.5, dim=-1)
    y = torch.einsum("bqk,bck->bcq", weights, v).reshape(x.shape)
    return block(p, f"{name}.block_2", x + conv(p, f"{name}.attn_1.proj_out", y))


def encode_reference(p: dict, config: VAEConfig, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = conv(p, "encoder.conv_in", x)
    for level in range(len(config.ch_mult)):
        for index in range(config.num_res_blocks):
            x = block(p, f"encoder.down.{level}.block.{index}", x)
        if level < len(config.ch_mult) - 1:
            x = conv(p, f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), padding=0, stride=2)
    x = conv(p, "encoder.conv_out", swish(norm(p, "encoder.norm_out", mid_block(p, "encoder.mid", x))))
    return x[:, : config.z_channels], x[:, config.z_channels :]


def decode_reference(p: dict, config: VAEConfig, z: torch.Tensor) -> torch.Tensor:
    x = mid_block(p, "decoder.mid", conv(p, "decoder.conv_in", z / config.scale_factor + config.shift_factor))
    for level in range(len(config.ch_mult) - 1, -1, -1):
        for index in range(config.num_res_blocks + 1):
            x = block(p, f"decoder.up.{level}.block.{index}", x)
        if level:
            x = conv(p, f"decoder.up.{level}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv(p, "decoder.conv_out", swish(norm(p, "decoder.norm_out", x)))


def random_vae(config: VAEConfig) -> tuple[AutoEncoder, dict[str, torch.Tensor]]:
    """A model with random norm weights and biases too, and its parameters in float64."""
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
    mean, logvar = encode_reference(p, config, pixels.double())
    for actual, expected in zip(model.moments(pixels), (mean, logvar), strict=True):
        close(actual, expected)
    expected = config.scale_factor * (mean + noise.double() * (logvar / 2).exp() - config.shift_factor)
    close(model.encode(pixels, noise), expected)
    close(model.decode(latent), decode_reference(p, config, latent.double()))


@shapes
def test_shapes_on_the_meta_device(config, height, width, batch):
    with torch.device("meta"):
        model = AutoEncoder(config)
        latent = torch.empty(batch, config.z_channels, height, width)
    pixels = model.decode(latent)
    assert pixels.shape == (batch, 3, height * config.downsample, width * config.downsample)
    assert model.encode(pixels, latent).shape == latent.shape
    assert all(tensor.is_meta for tensor in [*model.parameters(), pixels])


def test_constant_image_has_a_finite_latent(vae):
    pixels = torch.ones(1, 3, 16, 16)
    assert vae.encode(pixels, torch.zeros(1, 16, 2, 2)).isfinite().all()


def test_encode_samples_the_posterior(vae, recorded):
    draws = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *recorded["eps"].shape))).float()
    first, second = (vae.encode(recorded["pixels"], draw) for draw in draws)
    expected = (recorded["logvar"] / 2).exp() * (draws[0] - draws[1]) * vae.config.scale_factor
    assert (first - second - expected).abs().max() <= 1e-5


# Strips


def set_strip_elements(monkeypatch, elements: int) -> None:
    """Process larger feature maps in strips of this many elements."""
    monkeypatch.setattr(vae_blocks, "STRIP_ELEMENTS", elements)
    monkeypatch.setattr(sys.modules["bagel_rt.kernels.group_norm"], "REFERENCE_ELEMENTS", elements)


LARGE = {  # (configuration, batch, latent height, latent width, elements of a strip)
    "height-not-divisible-by-strips": (VAEConfig(ch=32, num_res_blocks=1), 1, 5, 3, 3000),
    "strips-of-one-row": (VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1), 1, 7, 5, 1),
    "last-strip-of-one-row": (VAEConfig(ch=32, ch_mult=(2, 1), num_res_blocks=1), 1, 8, 4, 64 * 4 * 3),
    "two-images": (VAEConfig(ch=32, ch_mult=(2, 1, 2), num_res_blocks=2), 2, 3, 6, 5000),
    "one-level-odd-sides": (VAEConfig(ch=64, ch_mult=(1,), num_res_blocks=1), 1, 13, 17, 4096),
    "one-column": (VAEConfig(ch=32, ch_mult=(1, 3), num_res_blocks=1), 1, 9, 1, 300),
}
large = pytest.mark.parametrize("config, batch, height, width, elements", LARGE.values(), ids=LARGE)


def random_inputs(config: VAEConfig, batch: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A latent, and pixels of the matching size."""
    torch.manual_seed(1)
    side = config.downsample
    return torch.randn(batch, config.z_channels, height, width), torch.randn(batch, 3, height * side, width * side)


@large
def test_strips_match_whole_feature_maps(config, batch, height, width, elements, monkeypatch):
    model, _ = random_vae(config)
    latent, pixels = random_inputs(config, batch, height, width)
    expected = model.decode(latent), model.encode(pixels, latent)
    strips, strip_ranges = [], vae_blocks._strip_ranges

    def spy(*args, **options):
        strips.append(list(strip_ranges(*args, **options)))
        return strips[-1]

    monkeypatch.setattr(vae_blocks, "_strip_ranges", spy)
    set_strip_elements(monkeypatch, elements)
    for actual, plain in zip((model.decode(latent), model.encode(pixels, latent)), expected, strict=True):
        assert actual.shape == plain.shape
        assert (actual - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert any(len(ranges) > 1 for ranges in strips)


def test_strips_are_not_used_with_gradients(monkeypatch):
    config = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)
    model, _ = random_vae(config)
    latent, _ = random_inputs(config, 1, 3, 2)

    def gradient():
        leaf = latent.clone().requires_grad_()
        return torch.autograd.grad(model.decode(leaf).square().sum(), leaf)[0]

    expected = gradient()
    monkeypatch.setattr(vae_blocks, "STRIP_ELEMENTS", 1)
    assert torch.equal(gradient(), expected)


def test_strips_match_whole_feature_maps_in_bfloat16(monkeypatch):
    config = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)
    model = random_vae(config)[0].bfloat16()
    latent, _ = random_inputs(config, 1, 5, 4)
    expected = model.decode(latent.bfloat16())
    set_strip_elements(monkeypatch, 1000)
    actual = model.decode(latent.bfloat16())
    assert actual.dtype == torch.bfloat16 and (actual - expected).abs().max() <= 0.05 * expected.abs().max()


def test_attention_is_computed_in_chunks_of_queries(monkeypatch):
    config = VAEConfig(ch=32, ch_mult=(1,), num_res_blocks=1)
    model, _ = random_vae(config)
    latent, _ = random_inputs(config, 2, 5, 9)
    expected, chunks, attention = model.decode(latent), [], F.scaled_dot_product_attention
    monkeypatch.setattr(vae_blocks, "QUERY_CHUNK", 16)
    spy = lambda q, k, v: chunks.append(q.shape[2]) or attention(q, k, v)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    torch.testing.assert_close(model.decode(latent), expected, rtol=1e-5, atol=1e-5)
    assert chunks == [16, 16, 13]


# Memory


@large
@pytest.mark.parametrize("in_strips", [False, True], ids=["whole", "strips"])
def test_memory_estimate_bounds_the_measured_peak(config, batch, height, width, elements, in_strips, monkeypatch):
    model, _ = random_vae(config)
    latent, pixels = random_inputs(config, batch, height, width)
    if in_strips:
        set_strip_elements(monkeypatch, elements)
    for call, inputs, estimate in (
        (lambda: model.decode(latent), [latent], decode_memory),
        (lambda: model.encode(pixels, latent), [pixels, latent], encode_memory),
    ):
        with torch.inference_mode(), LiveBytes(torch.device("cpu"), *inputs) as live:
            call()
        bound = estimate(config, *pixels.shape[2:], batch=batch)
        assert live.peak <= bound <= 1.35 * live.peak


def test_published_decoder_needs_less_than_8_gb_at_2048():
    estimate = decode_memory(BAGEL_7B_MOT.vae, 2048, 2048)
    assert 4 * 2048**2 * (256 + 128) < estimate < 8e9  # two feature maps and little more
    assert decode_memory(BAGEL_7B_MOT.vae, 1024, 1024) < 2e9
    assert decode_memory(BAGEL_7B_MOT.vae, 2048, 2048, itemsize=2) * 2 == estimate


# Errors

PIXELS = r"pixels must be a non-empty tensor \[B, 3, H, W\] .* multiples of 8, got"
LATENT = r"latent must be a non-empty tensor \[B, 16, h, w\], got"
INVALID = {
    "height-off-the-stride": (lambda v: v.moments(torch.zeros(1, 3, 20, 16)), rf"{PIXELS} \[1, 3, 20, 16\]"),
    "width-off-the-stride": (lambda v: v.encode(torch.zeros(1, 3, 16, 4), None), rf"{PIXELS} .* Resize the image"),
    "gray-pixels": (lambda v: v.moments(torch.zeros(1, 1, 16, 16)), rf"{PIXELS} \[1, 1, 16, 16\]"),
    "pixels-without-batch": (lambda v: v.moments(torch.zeros(3, 16, 16)), rf"{PIXELS} \[3, 16, 16\]"),
    "empty-pixels": (lambda v: v.moments(torch.zeros(1, 3, 0, 16)), PIXELS),
    "noise-of-the-pixels-shape": (
        lambda v: v.encode(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)),
        r"noise must have the shape of the latent, \[1, 16, 2, 2\], got \[1, 3, 16, 16\]",
    ),
    "noise-that-would-broadcast": (
        lambda v: v.encode(torch.zeros(2, 3, 16, 16), torch.zeros(1, 16, 2, 2)), r"\[2, 16, 2, 2\], got \[1, 16",
    ),
    "latent-of-other-channels": (lambda v: v.decode(torch.zeros(1, 4, 2, 2)), rf"{LATENT} \[1, 4, 2, 2\]"),
    "empty-latent": (lambda v: v.decode(torch.zeros(1, 16, 0, 2)), LATENT),
    "latent-without-batch": (lambda v: v.decode(torch.zeros(16, 2, 2)), rf"{LATENT} \[16, 2, 2\]"),
}  # fmt: skip


@pytest.mark.parametrize("call, message", INVALID.values(), ids=INVALID)
def test_rejects_invalid_shapes(vae, call, message):
    with pytest.raises(ValueError, match=message):
        call(vae)


def test_number_of_pixel_channels_comes_from_the_configuration():
    config = replace(VAEConfig(), ch=32, ch_mult=(1,), num_res_blocks=1)
    assert AutoEncoder(config).moments(torch.zeros(1, config.in_channels, 3, 5))[0].shape == (1, 16, 3, 5)

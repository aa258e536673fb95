"""Adoption leaves official modules and torch's generators as they are; ``restore()`` gives all weights back."""

import weakref

import pytest
import torch
from conftest import CHECKPOINT
from official_modules import OfficialScript, RecordedRequest, load_official, make_inferencer, run_script
from PIL import Image
from safetensors.torch import load_file, save_file

from bagel_rt.compat import accelerate
from bagel_rt.compat.noise import draw_posterior_noise, noise_dtype


@pytest.fixture
def official():
    return load_official(CHECKPOINT)


def memory(module) -> dict:
    """Address, strides, offset and size of the memory of every parameter."""
    return {
        name: (p.data_ptr(), p.stride(), p.storage_offset(), p.untyped_storage().nbytes())
        for name, p in module.named_parameters()
    }


def layout(module) -> dict:
    """As :func:`memory`, without addresses."""
    return {name: place[1:] for name, place in memory(module).items()}


def values(module) -> dict:
    return {name: parameter.clone() for name, parameter in module.named_parameters()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("adopt", [make_inferencer, lambda official: accelerate(official.model, official.vae_model)])
def test_adoption_does_not_touch_the_autoencoder_or_the_generator(adopt, official):
    before, state = memory(official.vae_model), torch.get_rng_state()
    adopted = adopt(official)
    assert memory(official.vae_model) == before and torch.equal(torch.get_rng_state(), state)
    del adopted


def test_restore_gives_back_every_weight_with_its_strides(official):
    model, vae, request = official.model, official.vae_model, RecordedRequest("20_edit_text_channel")
    down = "language_model.model.layers.1.mlp.down_proj.weight"
    transposed = model.get_parameter(down).T.contiguous().T
    model.get_parameter(down).data = transposed  # a layout that is not the default
    before = [(layout(module), values(module)) for module in (model, vae)]
    acceleration = accelerate(model, vae)
    assert model.get_parameter(down).is_contiguous()
    run_script(request, official, vae)
    acceleration.restore()
    assert model.get_parameter(down).stride() == transposed.stride()
    for module, (layouts, weights) in zip((model, vae), before, strict=True):
        assert layout(module) == layouts and equal(values(module), weights)
    acceleration.restore()  # does nothing


def test_restored_state_dict_can_be_saved(official, tmp_path):
    accelerate(official.model).restore()
    save_file(official.model.state_dict(), tmp_path / "model.safetensors")
    assert equal(load_file(tmp_path / "model.safetensors"), values(official.model))


def test_restore_keeps_weights_that_were_changed_in_place(official):
    acceleration = accelerate(official.model)
    with torch.no_grad():
        for parameter in official.model.parameters():
            parameter.mul_(1.5)
    changed = values(official.model)
    acceleration.restore()
    assert equal(values(official.model), changed)


def test_restore_after_moving_the_module(official):
    before = layout(official.model)
    acceleration = accelerate(official.model)
    official.model.double()
    acceleration.restore()
    for name, (stride, offset, size) in layout(official.model).items():
        assert (stride, offset, size) == (before[name][0], 0, 2 * before[name][2]), name


def test_restore_frees_the_fused_weights(official):
    acceleration = accelerate(official.model, official.vae_model)
    fused = weakref.ref(acceleration.entry_points.model.weights.layers[0].qkv.und.untyped_storage())
    model = weakref.ref(acceleration.entry_points.model)
    acceleration.restore()
    assert model() is None and fused() is None


def test_weights_that_are_not_fused_stay_where_they_are(official):
    before = memory(official.model)
    acceleration = accelerate(official.model)
    moved = {name for name, place in memory(official.model).items() if place != before[name]}
    fused = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "q_norm", "k_norm")
    assert moved == {name for name in before if name.split(".")[-2].removesuffix("_moe_gen") in fused}
    assert acceleration.entry_points.model.weights.lm_head.data_ptr() == before["language_model.lm_head.weight"][0]


def test_inferencer_still_works_after_restore(official, monkeypatch):
    request, inferencer = RecordedRequest("20_edit_text_channel"), make_inferencer(official)
    accelerate(official.model, official.vae_model).restore()
    request.patch_randn(monkeypatch)
    request.check_outputs(inferencer.interleave_inference(request.inputs, **request.hyper))


# Noise: what the official randn_like draws for the mean


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_that_of_the_official_autoencoder(memory_format, dtype, official):
    vae = official.vae_model.to(dtype)
    for parameter in vae.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
    mean = torch.empty(2, 32, 5, 3, dtype=dtype, memory_format=memory_format).chunk(2, dim=1)[0]
    torch.manual_seed(4)
    expected, state = torch.randn_like(mean), torch.get_rng_state()
    torch.manual_seed(4)
    assert torch.equal(draw_posterior_noise(vae, tuple(mean.shape), noise_dtype(vae)), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_has_the_dtype_of_autocast(official):
    with torch.autocast("cpu", torch.bfloat16):
        assert noise_dtype(official.vae_model) == torch.bfloat16
    assert noise_dtype(official.vae_model) == torch.float32


def test_accelerated_encoder_and_inferencer_draw_the_same_noise(official):
    image, script = Image.new("RGB", (64, 64), "teal"), OfficialScript(official)
    inferencer = make_inferencer(official)
    torch.manual_seed(2)
    expected = inferencer.update_context_image(image, inferencer.init_gen_context(), vit=False)
    state = torch.get_rng_state()
    accelerate(official.model, official.vae_model)
    context = script.context()
    torch.manual_seed(2)
    script.add_vae(context, image, official.vae_model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(context["past_key_values"].key_cache[2], expected["past_key_values"].key_cache[2])


def test_official_autoencoder_runs_under_the_autocast_of_its_caller(official):
    dtypes = []

    def encode(pixels):
        dtypes.append(torch.nn.functional.conv2d(pixels, torch.zeros(1, 3, 1, 1)).dtype)
        return torch.zeros(1, 16, pixels.shape[2] // 8, pixels.shape[3] // 8)

    accelerate(official.model)
    type(official.vae_model).encode, original = lambda _, pixels: encode(pixels), type(official.vae_model).encode
    try:
        script = OfficialScript(official)
        with torch.autocast("cpu", torch.bfloat16):
            script.add_vae(script.context(), Image.new("RGB", (64, 64)), official.vae_model)
    finally:
        type(official.vae_model).encode = original
    assert dtypes == [torch.bfloat16]

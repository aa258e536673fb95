"""Weights that are shared between official modules and this inferencer."""

import warnings

import pytest
import torch
from conftest import CHECKPOINT
from official_modules import (
    OfficialScript,
    RecordedRequest,
    load_official,
    make_inferencer,
    max_difference,
    run_script,
)
from PIL import Image

from bagel_rt.compat import accelerate
from bagel_rt.compat.convert import convert_config
from bagel_rt.compat.weight_sharing import build_shared_autoencoder, build_shared_model, warn_about_float32


@pytest.fixture
def official():
    return load_official(CHECKPOINT)


def generate(inferencer) -> Image.Image:
    torch.manual_seed(3)
    return inferencer(text="a cat", image_shapes=(32, 32), num_timesteps=3)["image"]


def test_parameters_become_views_with_the_same_values(official):
    model, before = official.model, {name: p.clone() for name, p in official.model.named_parameters()}
    gate = model.get_parameter("language_model.model.layers.0.mlp.gate_proj.weight")
    x = torch.randn(3, official.ours.llm.hidden_size)
    expected = torch.nn.functional.linear(x, gate)
    acceleration = accelerate(model, official.vae_model)
    shared = acceleration.entry_points.model
    for name, slot in shared.weights.weight_slots(official.ours).items():
        parameter = model.get_parameter(name)
        assert parameter.untyped_storage().data_ptr() == slot.view.untyped_storage().data_ptr(), name
    autoencoder = dict(shared.vae.named_parameters())
    for name, parameter in official.vae_model.named_parameters():
        assert parameter.data_ptr() == autoencoder[name].data_ptr()
    assert torch.equal(torch.nn.functional.linear(x, gate), expected)
    acceleration.restore()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_models_of_one_module_share_weights_and_lock(official):
    def pointers(model):
        weights = [slot.view.data_ptr() for slot in model.weights.weight_slots(official.ours).values()]
        return weights + [parameter.data_ptr() for parameter in model.vae.parameters()]

    first = make_inferencer(official)
    expected = pointers(first.bagel.model)
    second = make_inferencer(official)
    assert pointers(second.bagel.model) == expected
    acceleration = accelerate(official.model, official.vae_model)
    assert pointers(acceleration.entry_points.model) == expected
    assert first.bagel.model.lock is second.bagel.model.lock is acceleration.entry_points.model.lock
    assert max_difference(generate(first), generate(second)) == 0
    del first, acceleration
    assert pointers(make_inferencer(official).bagel.model) == expected  # still those of the second
    official.model.double()
    moved = make_inferencer(official).bagel.model
    assert moved.dtype == torch.float64 and moved.weights.embed_tokens.data_ptr() not in expected
    assert moved.lock is not second.bagel.model.lock


def test_autoencoder_on_another_device_or_dtype_is_copied_once(official):
    vae, config = official.vae_model, official.ours.vae
    meta, cpu = torch.device("meta"), torch.device("cpu")
    pointers = [parameter.data_ptr() for parameter in vae.parameters()]
    on_meta = build_shared_autoencoder(vae, config, meta)
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    assert [parameter.data_ptr() for parameter in vae.parameters()] == pointers
    vae.bfloat16()
    copied = build_shared_autoencoder(vae, config, cpu)
    assert all(parameter.dtype == torch.float32 for parameter in copied.parameters())
    assert all(parameter.dtype == torch.bfloat16 for parameter in vae.parameters())
    vae.decoder.conv_in.bias.data += 1
    assert build_shared_autoencoder(vae, config, cpu) is copied
    assert torch.equal(copied.decoder.conv_in.bias, vae.decoder.conv_in.bias.float())


def test_bfloat16_autoencoder_generates_the_same_image(official, monkeypatch):
    request = RecordedRequest("20_edit_text_channel")
    official.vae_model.bfloat16()
    request.patch_randn(monkeypatch)
    [copied] = make_inferencer(official).interleave_inference(request.inputs, **request.hyper)
    accelerate(official.model, official.vae_model)
    request.patch_randn(monkeypatch)
    _, latent = run_script(request, official, official.vae_model)
    official.vae_model.float()
    request.patch_randn(monkeypatch)
    [shared] = make_inferencer(official).interleave_inference(request.inputs, **request.hyper)
    assert max_difference(copied, shared) == 0
    assert max_difference(make_inferencer(official).decode_image(latent, shared.size[::-1]), shared) <= 1  # rounding


def test_weights_changed_in_place_take_effect():
    norms = ("q_norm.weight", "k_norm_moe_gen.weight")
    changed = (*norms, "vae2llm.bias", "embed_tokens.weight", "latent_pos_embed.pos_embed")

    def change(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(changed):
                    parameter.mul_(torch.linspace(0.2, 3.0, parameter.shape[-1]))

    before, after = load_official(CHECKPOINT), load_official(CHECKPOINT)
    inferencer = make_inferencer(before)
    accelerate(before.model)
    script = OfficialScript(before)
    first = generate(inferencer)
    change(before.model)
    change(after.model)
    fresh = make_inferencer(after)
    assert max_difference(generate(inferencer), generate(fresh)) == 0 and max_difference(generate(fresh), first) > 0
    context = script.context()
    script.add_text(context, "why?")
    options = {"understanding_output": True, "max_think_token_n": 12}
    assert (
        script.generate_text(context, 12)
        == inferencer(text="why?", **options)["text"]
        == fresh(text="why?", **options)["text"]
    )


def test_a_rejected_module_is_unchanged(official):
    model = official.model
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    layer = model.language_model.model.layers._modules["1"]
    weight, layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data, layer.mlp.up_proj.weight.data.half()
    with pytest.raises(
        ValueError, match="up_proj.weight must be torch.float32 .*, got torch.float16 .* Load the module unquantized"
    ):
        accelerate(model)
    layer.mlp.up_proj.weight = torch.nn.Parameter(weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match="up_proj.weight must be on the device of embed_tokens, cpu, got meta"):
        accelerate(model)
    layer.mlp.up_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    del layer.mlp._modules["down_proj"]
    with pytest.raises(
        ValueError, match="must have all parameters .*, got none named language_model.model.layers.1.mlp.down_proj"
    ):
        accelerate(model)
    assert all(parameter.data_ptr() == pointers[name] for name, parameter in model.named_parameters())


def test_warns_about_float32_on_a_gpu(official):
    with pytest.warns(UserWarning, match=r"autocast has no effect here. Call model.to\(torch.bfloat16\) first"):
        warn_about_float32(torch.device("cuda", 0), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_float32(torch.device("cuda", 0), torch.bfloat16)
        build_shared_model(official.model, None, convert_config(official.model))

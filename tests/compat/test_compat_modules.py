"""What becomes of official modules: whose weights are where, what is refused, and who may call from where."""

import threading
import warnings

import pytest
import torch
from conftest import CHECKPOINT
from official_modules import (
    Case,
    OfficialScript,
    levels_apart,
    load_inferencer,
    load_official,
    run_script,
)
from PIL import Image
from torch import nn

from bagel_rt.compat import accelerate
from bagel_rt.compat.adopt import adopt_autoencoder, adopt_config, adopt_model, warn_of_float32
from bagel_rt.compat.exclusive import lock_of
from bagel_rt.models.bagel.images import ResizeRule

SHORT = {"image_shapes": (32, 32), "num_timesteps": 3}


@pytest.fixture
def official():
    return load_official(CHECKPOINT)


def drawn(runtime, **options) -> Image.Image:
    torch.manual_seed(3)
    return runtime(text="a cat", **SHORT, **options)["image"]


# Weights


def test_weights_are_shared_and_the_module_is_restored(official):
    model, before = official.model, {name: p.clone() for name, p in official.model.named_parameters()}
    x = torch.randn(3, official.ours.llm.hidden_size)
    mlp = model.language_model.model.layers._modules["0"].mlp
    wanted = torch.nn.functional.linear(x, mlp.gate_proj.weight)
    acceleration = accelerate(model, official.vae_model)
    weights = acceleration.entry_points.model.weights
    for name, place in weights.weight_slots(official.ours).items():
        parameter = model.get_parameter(name)
        assert parameter.untyped_storage().data_ptr() == place.view.untyped_storage().data_ptr(), name
        assert torch.equal(parameter, before[name])
    autoencoder = dict(acceleration.entry_points.model.vae.named_parameters())
    for name, parameter in official.vae_model.named_parameters():
        assert parameter.data_ptr() == autoencoder[name].data_ptr()
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(model)
    with torch.no_grad():
        assert torch.equal(torch.nn.functional.linear(x, mlp.gate_proj.weight), wanted)
    latent = official.vae_model.encode(torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    assert official.vae_model.decode(latent.double()).shape == (1, 3, 16, 16) and not latent.is_inference()
    acceleration.restore()
    assert acceleration.entry_points is None
    assert not [name for name in vars(model) if name.startswith(("forward_cache", "generate", "chat", "_bagel_rt"))]
    with pytest.raises(AssertionError, match="the official forward ran"):
        model.generate_image()
    for call in (official.vae_model.encode, official.vae_model.decode):
        with pytest.raises(AssertionError, match="the official autoencoder ran"):
            call(torch.zeros(1))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    accelerate(model).restore()


def test_whoever_comes_second_has_the_same_weights(official):
    def pointers(model):
        weights = [place.view.data_ptr() for place in model.weights.weight_slots(official.ours).values()]
        return weights + [parameter.data_ptr() for parameter in model.vae.parameters()]

    first = load_inferencer(official)
    wanted = pointers(first.bagel.model)
    second = load_inferencer(official)
    assert pointers(second.bagel.model) == wanted
    acceleration = accelerate(official.model, official.vae_model)
    assert pointers(acceleration.entry_points.model) == wanted
    assert lock_of(first.bagel.model) is lock_of(second.bagel.model) is lock_of(acceleration.entry_points.model)
    assert levels_apart(drawn(first), drawn(second)) == 0
    del first, acceleration
    assert pointers(load_inferencer(official).bagel.model) == wanted  # of the second, which is in use still
    official.model.double()
    moved = load_inferencer(official).bagel.model
    assert moved.dtype == torch.float64 and moved.weights.embed_tokens.data_ptr() not in wanted
    assert lock_of(moved) is not lock_of(second.bagel.model)


def test_an_autoencoder_elsewhere_is_copied_once(official):
    vae, config = official.vae_model, official.ours.vae
    meta, cpu = torch.device("meta"), torch.device("cpu")
    pointers = [parameter.data_ptr() for parameter in vae.parameters()]
    elsewhere = adopt_autoencoder(vae, config, meta)
    assert all(parameter.is_meta for parameter in elsewhere.parameters())
    assert [parameter.data_ptr() for parameter in vae.parameters()] == pointers
    vae.bfloat16()
    copied = adopt_autoencoder(vae, config, cpu)
    assert all(parameter.dtype == torch.float32 for parameter in copied.parameters())
    assert all(parameter.dtype == torch.bfloat16 for parameter in vae.parameters())
    vae.decoder.conv_in.bias.data += 1
    assert adopt_autoencoder(vae, config, cpu) is copied
    assert torch.equal(copied.decoder.conv_in.bias, vae.decoder.conv_in.bias.float())


def test_an_autoencoder_of_another_dtype_draws_the_same(official, monkeypatch):
    case = Case("20_edit_text_channel")
    official.vae_model.bfloat16()
    case.feed(monkeypatch)
    [copied] = load_inferencer(official).interleave_inference(case.parts, **case.hyper)
    accelerate(official.model, official.vae_model)
    case.feed(monkeypatch)
    _, latent = run_script(case, official, official.vae_model)
    official.vae_model.float()
    case.feed(monkeypatch)
    [shared] = load_inferencer(official).interleave_inference(case.parts, **case.hyper)
    assert levels_apart(copied, shared) == 0
    assert levels_apart(load_inferencer(official).decode_image(latent, shared.size[::-1]), shared) <= 1  # rounding


def test_posteriors_are_drawn_where_the_official_autoencoder_is(official, monkeypatch):
    runtime, devices, randn = load_inferencer(official), [], torch.randn

    def noted(*shape, device="cpu", **options):
        devices.append(torch.device(device).type)
        return randn(*shape, **options)

    monkeypatch.setattr(torch, "randn", noted)
    official.vae_model.to("meta")  # a stand-in for another device
    picture = Image.new("RGB", (64, 64), "red")
    runtime(image=picture, text="a cat", num_timesteps=3)
    runtime.update_context_image(picture, runtime.init_gen_context())
    assert devices == ["meta", "cpu", "meta"]


def test_an_official_autoencoder_gets_pictures_where_it_is(official):
    class Elsewhere(nn.Module):
        """On another device, in another dtype."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1, device="meta", dtype=torch.bfloat16))
            self.seen = []

        def encode(self, pixels):
            self.seen.append((pixels.device.type, pixels.dtype))
            return torch.zeros(1, 16, pixels.shape[2] // 8, pixels.shape[3] // 8)

    accelerate(official.model)
    script, vae = OfficialScript(official), Elsewhere()
    context = script.context()
    script.add_vae(context, Image.new("RGB", (64, 96)), vae)
    assert context["kv_lens"] == [26] and vae.seen == [("meta", torch.bfloat16)]


def test_weights_that_are_changed_in_place_are_followed():
    norms = ("q_norm.weight", "k_norm_moe_gen.weight")
    changed = (*norms, "vae2llm.bias", "embed_tokens.weight", "latent_pos_embed.pos_embed")

    def change(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(changed):
                    parameter.mul_(torch.linspace(0.2, 3.0, parameter.shape[-1]))

    before, after = load_official(CHECKPOINT), load_official(CHECKPOINT)
    runtime = load_inferencer(before)
    accelerate(before.model)
    script = OfficialScript(before)
    first = drawn(runtime)
    change(before.model)
    change(after.model)
    fresh = load_inferencer(after)
    assert levels_apart(drawn(runtime), drawn(fresh)) == 0 and levels_apart(drawn(fresh), first) > 0
    context = script.context()
    script.add_text(context, "why?")
    asked = {"understanding_output": True, "max_think_token_n": 12}
    assert script.write(context, 12) == runtime(text="why?", **asked)["text"] == fresh(text="why?", **asked)["text"]


# Threads


@pytest.mark.parametrize("accelerated", [False, True])
def test_threads_wait_for_each_other(accelerated, official):
    prompts = ("a cat", "two dogs in a park")
    if accelerated:
        model = accelerate(official.model).entry_points.model

        def answer(prompt):
            return official.model.chat(
                official.tokenizer, official.new_token_ids, official.vit_transform, [], prompt, 12
            )
    else:
        runtime = load_inferencer(official)
        model = runtime.bagel.model

        def answer(prompt):
            return runtime(text=prompt, understanding_output=True, max_think_token_n=12)["text"]

    wanted, found = [answer(prompt) for prompt in prompts], {}

    def work(index):
        found[index] = [answer(prompts[index]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    with lock_of(model):
        for thread in threads:
            thread.start()
        threads[0].join(0.3)
        assert not found
    for thread in threads:
        thread.join(60)
    assert found == {index: [wanted[index]] * 3 for index in range(2)}


# What is refused


def test_a_module_of_another_kind_is_refused_and_left_alone(official):
    with pytest.raises(TypeError, match="is no official Bagel module: it lacks config, language_model"):
        accelerate(torch.nn.Linear(2, 2))
    model = official.model
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    layer = model.language_model.model.layers._modules["1"]
    kept, layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data, layer.mlp.up_proj.weight.data.half()
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight is torch.float16 .* load the module unquantised"):
        accelerate(model)
    layer.mlp.up_proj.weight = torch.nn.Parameter(kept.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match="up_proj.weight is on meta, embed_tokens on cpu: load the whole module"):
        accelerate(model)
    layer.mlp.up_proj.weight = torch.nn.Parameter(kept, requires_grad=False)
    del layer.mlp._modules["down_proj"]
    with pytest.raises(ValueError, match="the module lacks language_model.model.layers.1.mlp.down_proj.weight"):
        accelerate(model)
    assert all(parameter.data_ptr() == pointers[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("llm_config", "layer_module", "Qwen2MoEDecoderLayer"),
        ("llm_config", "qk_norm", False),
        ("llm_config", "hidden_act", "gelu"),
        ("llm_config", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("vit_config", "hidden_act", "quick_gelu"),
        ("vit_config", "rope", True),
        (None, "connector_act", "relu"),
    ],
)
def test_another_computation_is_refused(part, key, value, official):
    config = official.model.config
    setattr(config if part is None else getattr(config, part), key, value)
    with pytest.raises(ValueError, match=f"{part or 'config'}.{key} is "):
        accelerate(official.model)


def test_a_module_that_cannot_see_is_refused(official):
    official.model.config.visual_und = False
    with pytest.raises(ValueError, match="visual_und=False"):
        accelerate(official.model)


def test_plain_rope_may_be_spelled_out(official):
    official.model.config.llm_config.rope_scaling = {"rope_type": "default"}
    assert adopt_config(official.model).llm == official.ours.llm


def test_a_module_without_the_parts_that_draw_only_answers():
    official, case = load_official(CHECKPOINT, visual_gen=False), Case("30_und_basic")
    accelerate(official.model)
    script = OfficialScript(official)
    context, picture = script.context(), Image.new("RGB", (64, 64))
    with pytest.raises(ValueError, match="loaded with visual_gen=False"):
        script.draw((32, 32), torch.zeros(4, official.ours.latent_features), context, context, context)
    with pytest.raises(ValueError, match="loaded with visual_gen=False"):
        script.add_vae(context, picture, None)
    runtime = load_inferencer(official)
    case.check(runtime.interleave_inference(case.parts, **case.hyper))
    context = runtime.update_context_image(picture, runtime.init_gen_context(), vae=False)
    for call in (
        lambda: runtime(text="a cat", image_shapes=(32, 32)),
        lambda: runtime.update_context_image(picture, context),
        lambda: runtime.gen_image((32, 32), context),
    ):
        with pytest.raises(ValueError, match="loaded with visual_gen=False"):
            call()


def test_parts_that_draw_may_not_be_missing_otherwise(official):
    del official.model._modules["vae2llm"]
    with pytest.raises(TypeError, match="it lacks vae2llm"):
        accelerate(official.model)


def test_resize_rules_follow_the_patches(official):
    published = adopt_config(official.model)
    assert (published.vae_transform, published.vit_transform) == (ResizeRule(1024, 512, 16), ResizeRule(980, 224, 14))
    official.model.config.vit_config.patch_size = 16
    official.model.config.latent_patch_size = 3
    config = adopt_config(official.model)
    assert (config.vae_transform, config.vit_transform) == (ResizeRule(1008, 504, 24), ResizeRule(976, 224, 16))


def test_float32_on_a_gpu_is_worth_a_warning(official):
    with pytest.warns(UserWarning, match=r"autocast is not followed. Call model.to\(torch.bfloat16\) first"):
        warn_of_float32(torch.device("cuda", 0), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_float32(torch.device("cuda", 0), torch.bfloat16)
        adopt_model(official.model, None, adopt_config(official.model))

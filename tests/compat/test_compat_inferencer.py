"""``InterleaveInferencer`` against recorded requests of the official one."""

import inspect
import io
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT
from official_modules import PACK, RecordedRequest, load_official, make_inferencer, max_difference
from PIL import Image

from bagel_rt.compat import InterleaveInferencer

REQUESTS = sorted(
    case.name
    for case in (PACK / "cases").iterdir()
    if case.name[0] in "1234" and "batch2" not in case.name and "thinkmorph" not in case.name
)


@pytest.fixture
def official():
    return load_official(CHECKPOINT)


@pytest.mark.parametrize("name", REQUESTS)
def test_matches_the_official_inferencer(name, official, monkeypatch):
    request = RecordedRequest(name)
    request.patch_randn(monkeypatch)
    request.check_outputs(make_inferencer(official).interleave_inference(request.inputs, **request.hyper))


def test_call_returns_a_dict_of_image_and_text(official, monkeypatch):
    request = RecordedRequest("40_think_t2i")
    request.patch_randn(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        output = make_inferencer(official)(text=request.inputs[0], **request.hyper)
    request.check_outputs([output["text"], output["image"]])
    assert make_inferencer(load_official(CHECKPOINT))() == {"image": None, "text": None}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["13_t2i_channel", "20_edit_text_channel", "41_think_edit"])
def test_context_methods_match_the_official_ones(name, autocast, official, monkeypatch):
    request, inferencer = RecordedRequest(name), make_inferencer(official)
    request.patch_randn(monkeypatch)
    hyper, outputs = request.hyper, []
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        gen, no_img = inferencer.init_gen_context(), inferencer.init_gen_context()
        no_text, size = deepcopy(gen), tuple(hyper["image_shapes"])
        if request.system:
            gen = inferencer.update_context_text(request.system, gen)
            no_img = inferencer.update_context_text(request.system, no_img)
        for part in request.inputs:
            if isinstance(part, str):
                no_text = deepcopy(gen)
                gen, no_img = inferencer.update_context_text(part, gen), inferencer.update_context_text(part, no_img)
            else:
                resized = official.ours.vae_transform.resize(part.convert("RGB"))
                gen = inferencer.update_context_image(resized, gen)
                no_text, size = deepcopy(gen), resized.size[::-1]
        if request.system:
            outputs.append(inferencer.gen_text(gen, max_length=hyper["max_think_token_n"], do_sample=False))
            gen = inferencer.update_context_text(outputs[0], gen)
        branches = {"cfg_text_precontext": no_text, "cfg_img_precontext": no_img}
        outputs.append(inferencer.gen_image(size, gen, **branches, **request.settings))
    request.check_outputs(outputs)


def test_decode_image_accepts_bfloat16_latents(official):
    inferencer = make_inferencer(official)
    latents = torch.randn(6, official.ours.latent_features).bfloat16()
    image = inferencer.decode_image(latents, (32, 48))  # first, because this call allocates the static buffers
    assert max_difference(image, inferencer.decode_image(latents.float(), (32, 48))) == 0


def test_torch_seed_determines_the_image(official):
    inferencer = make_inferencer(official)

    def generate(seed):
        torch.manual_seed(seed)
        return inferencer(text="a cat", image_shapes=(48, 32), num_timesteps=4)["image"]

    first = generate(3)
    assert first.size == (32, 48)
    assert max_difference(first, generate(3)) == 0 and max_difference(first, generate(4)) > 8


def test_torch_seed_determines_sampled_text(official):
    inferencer = make_inferencer(official)

    def generate(seed, **options):
        torch.manual_seed(seed)
        options |= {"understanding_output": True, "max_think_token_n": 12, "text_temperature": 1.0}
        return inferencer(text="why?", **options)["text"]

    assert generate(1, do_sample=True) == generate(1, do_sample=True)
    assert len({generate(seed, do_sample=True) for seed in range(4)}) == 4
    assert len({generate(seed) for seed in range(4)}) == 1
    context = inferencer.update_context_text("why?", inferencer.init_gen_context())
    torch.manual_seed(1)
    assert inferencer.gen_text(context, 12) == generate(1, do_sample=True)  # gen_text samples by default


def test_sampling_text_does_not_change_the_noise(official, monkeypatch):
    noise, inferencer, randn = [], make_inferencer(official), torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: noise.append(randn(*shape, **options)) or noise[-1])
    for do_sample in (False, True):
        torch.manual_seed(5)
        options = {"think": True, "max_think_token_n": 4, "num_timesteps": 3, "do_sample": do_sample}
        inferencer(image=Image.new("RGB", (64, 64), "red"), text="a cat", **options)
    assert len(noise) == 4 and all(torch.equal(*pair) for pair in zip(noise[:2], noise[2:], strict=True))


def test_posterior_noise_is_drawn_on_the_device_of_the_official_autoencoder(official, monkeypatch):
    inferencer, devices, randn = make_inferencer(official), [], torch.randn

    def record_device(*shape, device="cpu", **options):
        devices.append(torch.device(device).type)
        return randn(*shape, **options)

    monkeypatch.setattr(torch, "randn", record_device)
    official.vae_model.to("meta")  # a stand-in for another device
    image = Image.new("RGB", (64, 64), "red")
    inferencer(image=image, text="a cat", num_timesteps=3)
    inferencer.update_context_image(image, inferencer.init_gen_context())
    assert devices == ["meta", "cpu", "meta"]


def test_accepts_a_bagel_instance(bagel):
    torch.manual_seed(7)
    image = InterleaveInferencer(bagel)(text="a cat", image_shapes=(32, 32), num_timesteps=4)["image"]
    expected = bagel.generate("a cat", size=(32, 32), num_timesteps=4, seed=7, cfg_text_scale=3.0)
    assert max_difference(image, expected.image) == 0


def test_rejects_missing_constructor_arguments(official):
    with pytest.raises(TypeError, match="tokenizer, vae_transform, vit_transform, new_token_ids must be given"):
        InterleaveInferencer(official.model, official.vae_model)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"enable_taylorseer": True}, "enable_taylorseer must be False"),
        ({"cfg_renorm_type": "local"}, "'local'"),
        ({"image_shapes": (15, 32)}, "size must be"),
        ({"image_shapes": 512}, "image_shapes must be .height, width., got 512"),
        ({"image_shapes": (32, 32, 3)}, "image_shapes must be .height, width., got"),
        ({"num_timesteps": 1}, "num_timesteps must be"),
    ],
)
def test_rejects_unsupported_options(options, message, official):
    with pytest.raises(ValueError, match=message):
        make_inferencer(official)(text="a cat", **{"image_shapes": (32, 32), **options})


def test_rejects_inputs_other_than_text_and_images(official):
    with pytest.raises(ValueError, match="input_lists must hold str and PIL images only, got"):
        make_inferencer(official).interleave_inference(["a cat", Path("cat.png")])


def test_rejects_an_image_update_without_vae_and_vit(official):
    inferencer = make_inferencer(official)
    with pytest.raises(ValueError, match="vae or vit must be True"):
        inferencer.update_context_image(Image.new("RGB", (64, 64)), inferencer.init_gen_context(), vae=False, vit=False)


# What official callers pass


def test_sizes_are_rounded_down_to_the_stride(official):
    inferencer, options = make_inferencer(official), {"num_timesteps": 3}
    torch.manual_seed(1)
    rounded = inferencer(text="a cat", image_shapes=[47, 63], **options)["image"]
    torch.manual_seed(1)
    exact = inferencer(text="a cat", image_shapes=np.array([32, 48]), **options)["image"]
    assert rounded.size == (48, 32) and max_difference(rounded, exact) == 0
    context = inferencer.update_context_text("a cat", inferencer.init_gen_context())
    assert inferencer.gen_image((47, 63), context, **options).size == (48, 32)
    assert inferencer.decode_image(torch.zeros(6, official.ours.latent_features), (47, 63)).size == (48, 32)


def test_image_shapes_have_no_effect_with_an_input_image(official):
    image = Image.new("RGB", (64, 64), "teal")
    output = make_inferencer(official)(image=image, text="a cat", num_timesteps=3, image_shapes=None)
    assert output["image"].size == (64, 64)


def test_temperature_has_no_effect_without_sampling(official):
    options = {"understanding_output": True, "max_think_token_n": 6}
    inferencer = make_inferencer(official)
    assert inferencer(text="why?", text_temperature=0, **options) == inferencer(text="why?", **options)


@pytest.mark.parametrize("understanding", [False, True])
def test_empty_prompt_runs_as_in_the_official_code(understanding, official):
    inferencer, options = make_inferencer(official), {"image_shapes": (32, 32), "num_timesteps": 3}
    if understanding:
        options = {"understanding_output": True, "max_think_token_n": 6}
    torch.manual_seed(1)
    output = inferencer(text="", **options)
    context = inferencer.update_context_text("", inferencer.init_gen_context())
    assert context["kv_lens"] == [2]  # the start and the end token
    if understanding:
        assert output["text"] == inferencer.gen_text(context, 6, do_sample=False)
    else:
        torch.manual_seed(1)
        branches = {"cfg_text_precontext": inferencer.init_gen_context(), "cfg_img_precontext": context}
        expected = inferencer.gen_image((32, 32), context, cfg_text_scale=3.0, num_timesteps=3, **branches)
        assert max_difference(output["image"], expected) == 0


def encoded(inferencer, image) -> torch.Tensor:
    """What the model keeps of an image."""
    context = inferencer.update_context_image(image, inferencer.init_gen_context(), vae=False)
    return context["past_key_values"].key_cache[2]


def test_exif_orientation_is_not_applied(official):
    inferencer, stored = make_inferencer(official), Image.linear_gradient("L").resize((64, 96))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    stored.convert("RGB").save(file, "PNG", exif=exif)
    oriented = Image.open(file)
    assert oriented.getexif()[0x0112] == 6
    assert torch.equal(encoded(inferencer, oriented), encoded(inferencer, stored.convert("RGB")))
    options = {"text": "a cat", "num_timesteps": 3}
    assert inferencer(image=oriented, **options)["image"].size == (64, 96)


@pytest.mark.parametrize(
    "mode, stored, expected",
    [
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
        ("LA", (200, 0), (200, 200, 200)),  # its alpha channel is dropped, unlike in bagel_rt.Bagel
        ("L", 200, (200, 200, 200)),
    ],
)
def test_modes_are_converted_as_in_the_official_code(mode, stored, expected, official):
    inferencer = make_inferencer(official)
    images = (Image.new(mode, (64, 64), stored), Image.new("RGB", (64, 64), expected))
    assert torch.equal(*(encoded(inferencer, image) for image in images))


# Subclasses


class Traced(InterleaveInferencer):
    """Overrides every step, and counts their calls."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.calls = Counter()

    def init_gen_context(self):
        self.calls["init_gen_context"] += 1
        return super().init_gen_context()

    def update_context_text(self, text, gen_context):
        self.calls["update_context_text"] += 1
        return super().update_context_text(text, gen_context)

    def update_context_image(self, image, gen_context, vae=True, vit=True):
        self.calls["update_context_image"] += 1
        return super().update_context_image(image, gen_context, vae, vit)

    def gen_text(self, *arguments, **options):
        self.calls["gen_text"] += 1
        return super().gen_text(*arguments, **options)

    def gen_image(self, *arguments, **options):
        self.calls["gen_image"] += 1
        return super().gen_image(*arguments, **options)

    def decode_image(self, latent, image_shape):
        self.calls["decode_image"] += 1
        return super().decode_image(latent, image_shape)


def traced(official) -> Traced:
    return Traced(*(vars(official)[name] for name in inspect.signature(InterleaveInferencer).parameters))


@pytest.mark.parametrize("name", ["12_t2i_app_default", "22_edit_channel_rgba", "23_multi_image", "25_image_last",
                                  "33_und_think", "40_think_t2i", "41_think_edit"])  # fmt: skip
def test_overridden_steps_give_the_official_outputs(name, official, monkeypatch):
    request, inferencer = RecordedRequest(name), traced(official)
    request.patch_randn(monkeypatch)
    request.check_outputs(inferencer.interleave_inference(request.inputs, **request.hyper))
    generates, thinks = not request.hyper["understanding_output"], request.system is not None
    texts, images = ([isinstance(part, kind) for part in request.inputs].count(True) for kind in (str, Image.Image))
    assert inferencer.calls == {
        "init_gen_context": 1,
        "update_context_text": 2 * (texts + thinks) + (thinks and generates),
        **({"update_context_image": images} if images else {}),
        **({"gen_text": 1} if thinks or not generates else {}),
        **({"gen_image": 1, "decode_image": 1} if generates else {}),
    }


@pytest.mark.parametrize("step", ["init_gen_context", "update_context_text", "gen_image", "decode_image"])
def test_a_step_replaced_on_the_instance_is_used(step, official):
    inferencer, calls = make_inferencer(official), []
    original = getattr(inferencer, step)
    setattr(inferencer, step, lambda *arguments, **options: calls.append(step) or original(*arguments, **options))
    inferencer(text="a cat", image_shapes=(32, 32), num_timesteps=3)
    assert calls


def test_a_step_patched_on_the_class_is_used(official, monkeypatch):
    monkeypatch.setattr(InterleaveInferencer, "gen_image", lambda *_, **__: Image.new("RGB", (16, 16)))
    assert make_inferencer(official)(text="a cat")["image"].size == (16, 16)


def test_overridden_decode_image_gets_latents_on_the_cpu_and_the_requested_shape(official):
    class Latents(InterleaveInferencer):
        def decode_image(self, latent, image_shape):
            assert latent.device.type == "cpu" and not latent.is_inference()
            return Image.new("RGB", image_shape[::-1], "teal")

    inferencer = Latents(*(vars(official)[name] for name in inspect.signature(InterleaveInferencer).parameters))
    output = inferencer(text="a cat", image_shapes=(32, 48), num_timesteps=3)
    assert output["image"].size == (48, 32) and output["image"].getpixel((0, 0)) == (0, 128, 128)


def test_overridden_gen_text_writes_the_thought(official, monkeypatch):
    inferencer, thoughts = make_inferencer(official), []
    monkeypatch.setattr(inferencer, "gen_text", lambda context, **options: thoughts.append(options) or "a blue cat")
    options = {"image_shapes": (32, 32), "num_timesteps": 3, "max_think_token_n": 9, "text_temperature": 0.7}
    assert inferencer(text="a cat", think=True, **options)["text"] == "a blue cat"
    assert thoughts == [{"max_length": 9, "do_sample": False, "temperature": 0.7}]


def test_overridden_gen_image_may_use_taylorseer(official):
    inferencer = make_inferencer(official)
    inferencer.gen_image = lambda *_, enable_taylorseer, **__: Image.new("RGB", (16, 16)) if enable_taylorseer else None
    assert inferencer(text="a cat", enable_taylorseer=True)["image"].size == (16, 16)

"""``InterleaveInferencer`` against recorded requests of the official one."""

from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

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
        ({"image_shapes": (50, 50)}, "size must be"),
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

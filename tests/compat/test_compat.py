"""The official interface over this runtime, against what the official code was recorded to compute through it."""

from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT
from official_modules import (
    PACK,
    Case,
    OfficialScript,
    SlowTokenizer,
    levels_apart,
    load_inferencer,
    load_official,
    run_script,
)
from PIL import Image

from bagel_rt.compat import InterleaveInferencer, accelerate
from bagel_rt.compat.adopt import adopt_tokenizer
from bagel_rt.models.bagel.tokenizer import Tokenizer

REQUESTS = sorted(
    case.name
    for case in (PACK / "cases").iterdir()
    if case.name[0] in "1234" and "batch2" not in case.name and "thinkmorph" not in case.name
)
AUTOCAST = {"as it is": nullcontext, "autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
autocast = pytest.mark.parametrize("within", AUTOCAST.values(), ids=AUTOCAST.keys())


@pytest.fixture
def official():
    return load_official(CHECKPOINT)


# The inferencer


@pytest.mark.parametrize("name", REQUESTS)
def test_the_inferencer_gives_what_the_official_one_gave(name, official, monkeypatch):
    case = Case(name)
    case.feed(monkeypatch)
    case.check(load_inferencer(official).interleave_inference(case.parts, **case.hyper))


def test_a_call_returns_picture_and_text_by_name(official, monkeypatch):
    case = Case("40_think_t2i")
    case.feed(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        output = load_inferencer(official)(text=case.parts[0], **case.hyper)
    case.check([output["text"], output["image"]])
    assert load_inferencer(load_official(CHECKPOINT))() == {"image": None, "text": None}


@autocast
@pytest.mark.parametrize("name", ["13_t2i_channel", "20_edit_text_channel", "41_think_edit"])
def test_contexts_that_a_script_arranges_itself(name, within, official, monkeypatch):
    case, runtime = Case(name), load_inferencer(official)
    case.feed(monkeypatch)
    hyper, outputs = case.hyper, []
    with within():
        gen, no_img = runtime.init_gen_context(), runtime.init_gen_context()
        no_text, size = deepcopy(gen), tuple(hyper["image_shapes"])
        if case.system:
            gen = runtime.update_context_text(case.system, gen)
            no_img = runtime.update_context_text(case.system, no_img)
        for part in case.parts:
            if isinstance(part, str):
                no_text = deepcopy(gen)
                gen, no_img = runtime.update_context_text(part, gen), runtime.update_context_text(part, no_img)
            else:
                resized = official.ours.vae_transform.resize(part.convert("RGB"))
                gen = runtime.update_context_image(resized, gen)
                no_text, size = deepcopy(gen), resized.size[::-1]
        if case.system:
            outputs.append(runtime.gen_text(gen, max_length=hyper["max_think_token_n"], do_sample=False))
            gen = runtime.update_context_text(outputs[0], gen)
        branches = {"cfg_text_precontext": no_text, "cfg_img_precontext": no_img}
        outputs.append(runtime.gen_image(size, gen, **branches, **case.settings))
    case.check(outputs)


def test_latents_are_decoded_of_whatever_dtype(official):
    runtime = load_inferencer(official)
    rounded = torch.randn(6, official.ours.latent_features).bfloat16()
    given = runtime.decode_image(rounded, (32, 48))  # first, as buffers are made by the first one
    assert levels_apart(given, runtime.decode_image(rounded.float(), (32, 48))) == 0


def test_the_seed_of_torch_decides_the_picture(official):
    runtime = load_inferencer(official)

    def drawn(seed):
        torch.manual_seed(seed)
        return runtime(text="a cat", image_shapes=(48, 32), num_timesteps=4)["image"]

    first = drawn(3)
    assert first.size == (32, 48)
    assert levels_apart(first, drawn(3)) == 0 and levels_apart(first, drawn(4)) > 8


def test_the_seed_of_torch_decides_sampled_texts(official):
    runtime, asked = load_inferencer(official), {"max_think_token_n": 12, "text_temperature": 1.0}

    def answered(seed, **options):
        torch.manual_seed(seed)
        return runtime(text="why?", understanding_output=True, **asked, **options)["text"]

    assert answered(1, do_sample=True) == answered(1, do_sample=True)
    assert len({answered(seed, do_sample=True) for seed in range(4)}) == 4
    assert len({answered(seed) for seed in range(4)}) == 1
    context = runtime.update_context_text("why?", runtime.init_gen_context())
    torch.manual_seed(1)
    assert runtime.gen_text(context, 12) == answered(1, do_sample=True)  # it samples by default


def test_noise_is_drawn_before_the_seed_of_sampled_texts(official, monkeypatch):
    drawn, runtime = [], load_inferencer(official)
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: drawn.append(randn(*shape, **options)) or drawn[-1])
    for do_sample in (False, True):
        torch.manual_seed(5)
        options = {"think": True, "max_think_token_n": 4, "num_timesteps": 3, "do_sample": do_sample}
        runtime(image=Image.new("RGB", (64, 64), "red"), text="a cat", **options)
    assert len(drawn) == 4 and all(torch.equal(*pair) for pair in zip(drawn[:2], drawn[2:], strict=True))


def test_a_loaded_bagel_can_stand_behind_it(bagel):
    torch.manual_seed(7)
    drawn = InterleaveInferencer(bagel)(text="a cat", image_shapes=(32, 32), num_timesteps=4)["image"]
    wanted = bagel.generate("a cat", size=(32, 32), num_timesteps=4, seed=7, cfg_text_scale=3.0)
    assert levels_apart(drawn, wanted.image) == 0


# The accelerated module


@pytest.mark.parametrize(
    "name",
    [
        "12_t2i_app_default",
        "17_t2i_interval_boundary",
        "20_edit_text_channel",
        "22_edit_channel_rgba",
        "23_multi_image",
        "40_think_t2i",
        "41_think_edit",
    ],
)
@autocast
def test_the_accelerated_module_draws_what_the_official_one_drew(name, within, official, monkeypatch):
    case = Case(name)
    accelerate(official.model, official.vae_model)
    case.feed(monkeypatch)
    with within():
        texts, latent = run_script(case, official, official.vae_model)
    assert texts == [output["text"] for output in case.meta["outputs"] if "text" in output]
    [wanted] = [tensor for name, tensor in case.golden.items() if name.endswith(".final_latent")]
    assert (latent - wanted).abs().max() <= 5e-5 * wanted.abs().max()
    assert not latent.is_inference()


@pytest.mark.parametrize("visual_gen", [True, False])
@pytest.mark.parametrize("name", ["30_und_basic", "31_und_two_images", "33_und_think", "34_und_eos"])
def test_the_accelerated_module_answers_what_the_official_one_answered(name, visual_gen):
    case, official = Case(name), load_official(CHECKPOINT, visual_gen=visual_gen)
    accelerate(official.model)
    texts, _ = run_script(case, official, None)
    case.check(texts)
    if not case.system:
        images = [official.ours.vae_transform.resize(part.convert("RGB")) for part in case.parts[:-1]]
        marks = {name: torch.tensor(token) for name, token in official.new_token_ids.items()}
        length, transform = case.hyper["max_think_token_n"], official.vit_transform
        case.check([official.model.chat(official.tokenizer, marks, transform, images, case.parts[-1], length)])


def test_the_accelerated_module_samples(official):
    accelerate(official.model)
    script = OfficialScript(official)
    context = script.context()
    script.add_text(context, "why?")

    def written(seed):
        torch.manual_seed(seed)
        chat = official.model.chat(
            official.tokenizer, official.new_token_ids, official.vit_transform, [], "why?", 12, True, 1.0
        )
        torch.manual_seed(seed)
        assert script.write(context, 12, do_sample=True, temperature=1.0) == chat
        return chat

    assert written(1) == written(1)
    assert len({written(seed) for seed in range(4)}) == 4


def test_a_batch_of_samples_is_as_each_alone(official):
    accelerate(official.model)
    script = OfficialScript(official)
    one, two = script.context(), script.context()
    script.add_text(one, "a cat")
    script.add_text(two, "two dogs in a park")
    lengths = [*one["kv_lens"], *two["kv_lens"]]
    none, lens = torch.tensor([], dtype=torch.int64), torch.tensor(lengths)
    ids = [id for context in (one, two) for id in context["past_key_values"].contexts[0].history[0].ids]
    positions = torch.cat([torch.arange(length) for length in lengths])
    # By place, in the official order.
    both = official.model.forward_cache_update_text(
        type(one["past_key_values"])([]), torch.tensor(ids), positions, lens, torch.arange(len(ids)), none,
        torch.tensor([0, 0]),
    )  # fmt: skip
    indexes, bos = torch.arange(sum(lengths)), official.new_token_ids["bos_token_id"]
    ids = official.model.generate_text(both, indexes, lens, torch.tensor([bos] * 2), lens, 8)
    assert ids.shape == (8, 2) and not ids.is_inference()
    assert [script.write(c, 8) for c in (one, two)] == [
        official.tokenizer.decode(ids[:, column]).split("<|im_end|>")[0].split("<|im_start|>")[1] for column in (0, 1)
    ]
    for starts, message in (([bos, bos + 1], "begin with the same token"), ([bos] * 9, "1 to 8 samples")):
        with pytest.raises(ValueError, match=message):
            official.model.generate_text(both, indexes, lens, torch.tensor(starts), lens, 8)


# What is refused


def test_a_cache_that_does_not_fit_the_arguments_is_refused(official):
    accelerate(official.model)
    script = OfficialScript(official)
    context = script.context()
    script.add_text(context, "a cat")
    with pytest.raises(ValueError, match=r"key_values_lens is \[3\], but the contexts hold"):
        script.add_text({**context, "kv_lens": [3]}, "a dog")
    filled = script.context()
    filled["past_key_values"].seq_lens = 5
    with pytest.raises(TypeError, match="a NaiveCache with keys in it: begin with an empty cache"):
        script.add_text(filled, "a dog")
    settings = {"num_timesteps": 4, "cfg_text_scale": 4.0}
    noise = torch.zeros(4, official.ours.latent_features)
    with pytest.raises(ValueError, match="enable_taylorseer is True"):
        script.draw((32, 32), noise, context, context, context, enable_taylorseer=True, **settings)
    with pytest.raises(ValueError, match="the cache of its branch is None"):
        script.draw((32, 32), noise, context, {**context, "past_key_values": None}, context, **settings)
    with pytest.raises(TypeError, match="unexpected keyword argument 'cfg_img_scales'"):
        script.draw((32, 32), noise, context, context, context, cfg_img_scales=1.0, **settings)


def test_arguments_of_the_inferencer_are_checked(official):
    with pytest.raises(TypeError, match="give all six arguments"):
        InterleaveInferencer(official.model, official.vae_model)
    ids = official.new_token_ids | {"eos_token_id": 3}
    with pytest.raises(ValueError, match="new_token_ids has {'eos_token_id': 3}"):
        adopt_tokenizer(official.tokenizer, ids)
    with pytest.raises(TypeError, match="a str is no Qwen2 tokenizer"):
        adopt_tokenizer("gpt2", ids)
    runtime = load_inferencer(official)
    for options, message in (
        ({"enable_taylorseer": True}, "enable_taylorseer is True"),
        ({"cfg_renorm_type": "local"}, "'local'"),
        ({"image_shapes": (50, 50)}, "size must be"),
        ({"num_timesteps": 1}, "num_timesteps must be"),
    ):
        with pytest.raises(ValueError, match=message):
            runtime(text="a cat", **{"image_shapes": (32, 32), **options})
    with pytest.raises(ValueError, match="Unsupported input type"):
        runtime.interleave_inference(["a cat", Path("cat.png")])


def test_the_slow_tokenizer_is_read_as_well(official):
    slow, ours = adopt_tokenizer(SlowTokenizer(CHECKPOINT), official.new_token_ids), Tokenizer.from_folder(CHECKPOINT)
    for text in ("a red circle", "naïve  Käfig 🦊\n<|im_end|> x", ""):
        assert slow.encode(text) == ours.encode(text)
    assert len(slow) == len(ours)

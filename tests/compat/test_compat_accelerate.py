"""``accelerate``: the entry points of an official module against recorded requests."""

import json
import threading
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from conftest import CHECKPOINT, PACK
from official_modules import (
    GUIDANCE,
    NaiveCache,
    OfficialScript,
    RecordedRequest,
    load_official,
    make_inferencer,
    run_script,
)
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from bagel_rt.compat import accelerate
from bagel_rt.compat.arguments import extract_answer
from bagel_rt.models.bagel.embed import position_ids


@pytest.fixture
def official():
    return load_official(CHECKPOINT)


@pytest.mark.parametrize("autocast", [False, True])
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
def test_generates_the_official_latents(name, autocast, official, monkeypatch):
    request = RecordedRequest(name)
    accelerate(official.model, official.vae_model)
    request.patch_randn(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        texts, latent = run_script(request, official, official.vae_model)
    assert texts == [output["text"] for output in request.meta["outputs"] if "text" in output]
    [recorded] = [tensor for name, tensor in request.golden.items() if name.endswith(".final_latent")]
    assert (latent - recorded).abs().max() <= 5e-5 * recorded.abs().max()
    assert not latent.is_inference()


@pytest.mark.parametrize("visual_gen", [True, False])
@pytest.mark.parametrize("name", ["30_und_basic", "31_und_two_images", "33_und_think", "34_und_eos"])
def test_generates_the_official_text(name, visual_gen):
    request, official = RecordedRequest(name), load_official(CHECKPOINT, visual_gen=visual_gen)
    accelerate(official.model)
    texts, _ = run_script(request, official, None)
    request.check_outputs(texts)
    if not request.system:
        *images, prompt = request.inputs
        images = [official.ours.vae_transform.resize(image.convert("RGB")) for image in images]
        token_ids = {name: torch.tensor(token) for name, token in official.new_token_ids.items()}
        length, transform = request.hyper["max_think_token_n"], official.vit_transform
        answer = official.model.chat(official.tokenizer, token_ids, transform, images, prompt, length)
        request.check_outputs([answer])


def test_torch_seed_determines_sampled_text(official):
    accelerate(official.model)
    script = OfficialScript(official)
    context = script.context()
    script.add_text(context, "why?")

    def generate(seed):
        torch.manual_seed(seed)
        chat = official.model.chat(
            official.tokenizer, official.new_token_ids, official.vit_transform, [], "why?", 12, True, 1.0
        )
        torch.manual_seed(seed)
        assert script.generate_text(context, 12, do_sample=True, temperature=1.0) == chat
        return chat

    assert generate(1) == generate(1)
    assert len({generate(seed) for seed in range(4)}) == 4


@pytest.fixture
def batch(official):
    """Two accelerated contexts, each alone and as one batch: (contexts, batch, their lengths, packed indexes)."""
    accelerate(official.model)
    script = OfficialScript(official)
    contexts = [script.context(), script.context()]
    script.add_text(contexts[0], "a cat")
    script.add_text(contexts[1], "two dogs in a park")
    lengths = torch.tensor([context["kv_lens"][0] for context in contexts])
    ids = [id for context in contexts for id in context["past_key_values"].key_cache.batch.contexts[0].history[0].ids]
    positions = torch.cat([torch.arange(length) for length in lengths])
    indexes = torch.arange(len(ids))
    # Positional arguments, to check their order too.
    batch = official.model.forward_cache_update_text(
        NaiveCache(), torch.tensor(ids), positions, lengths, indexes,
        torch.tensor([], dtype=torch.int64), torch.tensor([0, 0]),
    )  # fmt: skip
    return contexts, batch, lengths, indexes


def test_batched_text_equals_single_text(batch, official):
    contexts, batch, lengths, indexes = batch
    bos, script = official.new_token_ids["bos_token_id"], OfficialScript(official)
    ids = official.model.generate_text(batch, indexes, lengths, torch.tensor([bos] * 2), lengths, 8)
    assert ids.shape == (8, 2) and not ids.is_inference()
    for sample, context in enumerate(contexts):
        assert extract_answer(official.tokenizer.decode(ids[:, sample])) == script.generate_text(context, 8)


def test_batch_of_texts_ends_with_the_first_one(batch, official):
    _, batch, lengths, indexes = batch
    starts = torch.tensor([official.new_token_ids["bos_token_id"]] * 2)
    ids = official.model.generate_text(deepcopy(batch), indexes, lengths, starts, lengths, 8)
    for end in ids[3, 0], ids[3, 1]:  # drawn by the first sample; drawn by the second, which continues
        ended = official.model.generate_text(
            deepcopy(batch), indexes, lengths, starts, lengths, 8, end_token_id=int(end)
        )
        length = next((step for step in range(1, 8) if ids[step, 0] == end), 8)
        assert torch.equal(ended, ids[:length])


@pytest.mark.parametrize("renorm", ["global", "channel"])
def test_batch_of_images_has_the_official_latents(renorm, official):
    """As the official GenEval script runs it: renormalization "global" takes one norm over the batch."""
    folder = PACK / "cases" / "19_t2i_batch2"
    golden, meta = load_file(folder / "tensors.safetensors"), json.loads((folder / "meta.json").read_text())
    [update], [image] = meta["updates"], meta["image_generations"]
    accelerate(official.model)
    lengths, none = torch.tensor(update["kv_len_after"]), torch.tensor([], dtype=torch.int64)
    rows = torch.cat([torch.arange(length) for length in lengths])
    cache = official.model.forward_cache_update_text(
        NaiveCache(), torch.tensor(update["token_ids"]), rows, lengths, rows, none, torch.zeros(2, dtype=torch.int64)
    )
    ids = official.new_token_ids
    grids = [(height // 16, width // 16) for height, width in image["image_sizes_hw"]]
    tokens = torch.tensor([grid_h * grid_w + 2 for grid_h, grid_w in grids])
    settings = {name: image[name] for name in (*GUIDANCE, "num_timesteps", "timestep_shift")}

    def generate(first, last):
        pick = slice(first, last)
        noise = golden["i00.init_noise"].split((tokens - 2).tolist())
        side = official.ours.max_latent_size
        return official.model.generate_image(
            packed_text_ids=torch.tensor([ids["start_of_image"], ids["end_of_image"]] * (last - first)),
            packed_text_indexes=none,
            packed_init_noises=torch.cat(noise[pick]),
            packed_vae_position_ids=torch.cat([position_ids(*grid, side) for grid in grids[pick]]),
            packed_vae_token_indexes=none,
            packed_seqlens=tokens[pick],
            packed_position_ids=lengths[pick].repeat_interleave(tokens[pick]),
            packed_indexes=none,
            past_key_values=cache if last - first == 2 else one_sample(cache, lengths, first),
            key_values_lens=lengths[pick],
            packed_key_value_indexes=none,
            cfg_text_key_values_lens=torch.zeros(last - first, dtype=torch.int64),
            cfg_text_packed_position_ids=torch.zeros(int(tokens[pick].sum()), dtype=torch.int64),
            **settings | {"cfg_renorm_type": renorm},
        )

    latents = torch.cat(generate(0, 2))
    if renorm == "global":
        recorded = golden["i00.final_latent"]
        assert (latents - recorded).abs().max() <= 5e-5 * recorded.abs().max()
    else:  # images do not depend on each other
        torch.testing.assert_close(latents, torch.cat([*generate(0, 1), *generate(1, 2)]), rtol=1e-4, atol=1e-4)


def one_sample(cache, lengths, index) -> NaiveCache:
    """One sample of a batch, as a cache of its own."""
    own = NaiveCache()
    for name in ("key_cache", "value_cache"):
        setattr(own, name, {n: layer.split(lengths.tolist())[index] for n, layer in getattr(cache, name).items()})
    return own


def test_encodes_images_on_the_device_of_the_official_autoencoder(official):
    class MetaAutoEncoder(nn.Module):
        """On another device and in another dtype than the model."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1, device="meta", dtype=torch.bfloat16))
            self.inputs = []

        def encode(self, pixels):
            self.inputs.append((pixels.device.type, pixels.dtype))
            return torch.zeros(1, 16, pixels.shape[2] // 8, pixels.shape[3] // 8)

    accelerate(official.model)
    script, vae = OfficialScript(official), MetaAutoEncoder()
    context = script.context()
    script.add_vae(context, Image.new("RGB", (64, 96)), vae)
    assert context["kv_lens"] == [26] and vae.inputs == [("meta", torch.bfloat16)]


def test_restore_brings_back_the_official_methods(official):
    model, vae = official.model, official.vae_model
    acceleration = accelerate(model, vae)
    with pytest.raises(ValueError, match="must not be accelerated already"):
        accelerate(model)
    latent = vae.encode(torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    assert vae.decode(latent.double()).shape == (1, 3, 16, 16) and not latent.is_inference()
    acceleration.restore()
    assert acceleration.entry_points is None
    assert not [name for name in vars(model) if name.startswith(("forward_cache", "generate", "chat", "_bagel_rt"))]
    with pytest.raises(AssertionError, match="the official entry point was called"):
        model.generate_image()
    for method in (vae.encode, vae.decode):
        with pytest.raises(AssertionError, match="the official autoencoder was called"):
            method(torch.zeros(1))
    accelerate(model).restore()


@pytest.mark.parametrize("accelerated", [False, True])
def test_threads_run_one_at_a_time(accelerated, official):
    prompts = ("a cat", "two dogs in a park")
    if accelerated:
        model = accelerate(official.model).entry_points.model

        def answer(prompt):
            return official.model.chat(
                official.tokenizer, official.new_token_ids, official.vit_transform, [], prompt, 12
            )
    else:
        inferencer = make_inferencer(official)
        model = inferencer.bagel.model

        def answer(prompt):
            return inferencer(text=prompt, understanding_output=True, max_think_token_n=12)["text"]

    expected, answers = [answer(prompt) for prompt in prompts], {}

    def work(index):
        answers[index] = [answer(prompts[index]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    with model.lock:
        for thread in threads:
            thread.start()
        threads[0].join(0.3)
        assert not answers
    for thread in threads:
        thread.join(60)
    assert answers == {index: [expected[index]] * 3 for index in range(2)}


def test_visual_gen_false_generates_text_only():
    official, request = load_official(CHECKPOINT, visual_gen=False), RecordedRequest("30_und_basic")
    accelerate(official.model)
    script, inferencer = OfficialScript(official), make_inferencer(official)
    request.check_outputs(inferencer.interleave_inference(request.inputs, **request.hyper))
    image, noise = Image.new("RGB", (64, 64)), torch.zeros(4, official.ours.latent_features)
    empty, context = script.context(), inferencer.update_context_image(image, inferencer.init_gen_context(), vae=False)
    for call in (
        lambda: script.generate_image((32, 32), noise, empty, empty, empty),
        lambda: script.add_vae(empty, image, None),
        lambda: inferencer(text="a cat", image_shapes=(32, 32)),
        lambda: inferencer.update_context_image(image, context),
        lambda: inferencer.gen_image((32, 32), context),
    ):
        with pytest.raises(ValueError, match="visual_gen must be True to generate images"):
            call()


# Rejected arguments


@pytest.fixture
def text_context(official):
    """(script, a context with one text) of an accelerated module."""
    accelerate(official.model)
    script = OfficialScript(official)
    context = script.context()
    script.add_text(context, "a cat")
    return script, context


def test_rejects_wrong_cache_lengths(text_context):
    script, context = text_context
    with pytest.raises(ValueError, match=r"key_values_lens must be .*, got \[3\]"):
        script.add_text({**context, "kv_lens": [3]}, "a dog")


def test_rejects_a_cache_of_another_model(text_context):
    _, context = text_context
    other = load_official(CHECKPOINT)
    accelerate(other.model)
    with pytest.raises(ValueError, match="past_key_values must belong to this model"):
        OfficialScript(other).add_text(context, "a dog")


@pytest.mark.parametrize("position_shift", [[0, 1], [5, 0]], ids=["gap", "descending"])
def test_rejects_text_positions_that_are_not_consecutive(position_shift, text_context, official):
    script, context = text_context
    update = official.model.forward_cache_update_text

    def shifted(**arguments):
        arguments["packed_text_position_ids"][:2] += torch.tensor(position_shift)
        return update(**arguments)

    vars(official.model)["forward_cache_update_text"] = shifted
    with pytest.raises(ValueError, match="RoPE positions must be consecutive in a text"):
        script.add_text(context, "a dog")


@pytest.mark.parametrize(
    "method, add, message",
    [
        (
            "forward_cache_update_vae",
            lambda script, context, vae: script.add_vae(context, Image.new("RGB", (64, 64)), vae),
            "packed_vae_position_ids must be the ids of a grid of 4 rows and 4 columns in a 16x16 position table",
        ),
        (
            "forward_cache_update_vit",
            lambda script, context, vae: script.add_vit(context, Image.new("RGB", (64, 64))),
            "packed_vit_position_ids must be the ids of a grid in a 10x10 position table",
        ),
    ],
    ids=["vae", "vit"],
)
def test_rejects_shifted_image_position_ids(method, add, message, official):
    accelerate(official.model, official.vae_model)
    script = OfficialScript(official)
    update, name = getattr(official.model, method), message.split()[0]
    vars(official.model)[method] = lambda **arguments: update(**arguments | {name: arguments[name] + 1})
    with pytest.raises(ValueError, match=message):
        add(script, script.context(), official.vae_model)


def test_rejects_unsupported_generation_arguments(text_context, official):
    script, context = text_context
    noise, settings = torch.zeros(4, official.ours.latent_features), {"num_timesteps": 4, "cfg_text_scale": 4.0}
    with pytest.raises(ValueError, match="enable_taylorseer must be False"):
        script.generate_image((32, 32), noise, context, context, context, enable_taylorseer=True, **settings)
    with pytest.raises(TypeError, match="unexpected keyword argument 'cfg_img_scales'"):
        script.generate_image((32, 32), noise, context, context, context, cfg_img_scales=1.0, **settings)

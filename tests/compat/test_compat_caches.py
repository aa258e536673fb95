"""KV caches of official callers: filled in place, read from, copied, and empty at any position."""

import pickle
from copy import deepcopy

import pytest
import torch
from conftest import CHECKPOINT
from official_modules import NaiveCache, OfficialScript, RecordedRequest, load_official, make_inferencer
from PIL import Image

from bagel_rt.compat import accelerate
from bagel_rt.compat.caches import ContextCache


@pytest.fixture(scope="module")
def official():
    official = load_official(CHECKPOINT)
    accelerate(official.model, official.vae_model)
    return official


@pytest.fixture
def script(official):
    return OfficialScript(official)


def filled(script, *texts) -> dict:
    context = script.context()
    for text in texts:
        script.add_text(context, text)
    return context


def generate_text(script, context, max_length, start=None, **options) -> list[int]:
    """On the cache itself, which is filled."""
    marker_ids, length = script.official.new_token_ids, context["kv_lens"][0]
    start = marker_ids["bos_token_id"] if start is None else start
    ids = script.model.generate_text(
        context["past_key_values"], torch.arange(length), torch.tensor([length]), torch.tensor([start]),
        torch.tensor(context["ropes"]), max_length, **options,
    )[:, 0].tolist()  # fmt: skip
    context["kv_lens"], context["ropes"] = [length + len(ids)], [context["ropes"][0] + len(ids)]
    return ids


def test_text_update_fills_the_cache_with_the_official_keys_and_values(script):
    request = RecordedRequest("10_t2i_nocfg_shift1")
    context = filled(script, request.inputs[0])
    cache = context["past_key_values"]
    assert (cache.seq_lens, cache.num_layers) == (context["kv_lens"][0], 3)
    for name, layers in (("k", cache.key_cache), ("v", cache.value_cache)):
        recorded = request.golden[f"u00_text.{name}"]
        assert list(layers) == [0, 1, 2]
        for layer, tensor in layers.items():
            torch.testing.assert_close(tensor, recorded[layer], rtol=0, atol=5e-5 * float(recorded.abs().max()))
            assert not tensor.is_inference()


def test_every_update_returns_the_cache_that_it_was_given(script, official):
    cache, image = NaiveCache(), Image.new("RGB", (64, 64), "teal")
    context = {"kv_lens": [0], "ropes": [0], "past_key_values": cache}
    for add in (
        lambda: script.add_text(context, "a cat"),
        lambda: script.add_vae(context, image, official.vae_model),
        lambda: script.add_vit(context, image),
    ):
        before = cache.seq_lens
        add()
        assert context["past_key_values"] is cache and before < cache.seq_lens == context["kv_lens"][0]


def test_text_fills_the_cache_with_the_tokens_that_were_fed(script):
    whole, parts = filled(script, "why?"), filled(script, "why?")
    ids = generate_text(script, whole, 8)
    first = generate_text(script, parts, 4)
    assert first == ids[:4] and parts["past_key_values"].seq_lens == parts["kv_lens"][0]
    assert generate_text(script, parts, 4, start=ids[4]) == ids[4:]
    for layer in range(3):
        for name in ("key_cache", "value_cache"):
            one, other = (getattr(context["past_key_values"], name)[layer] for context in (whole, parts))
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_text_that_ends_leaves_its_end_token_out_of_the_cache(script):
    context = filled(script, "why?")
    ids = generate_text(script, filled(script, "why?"), 8)
    end = next(token for token in ids[2:] if token not in ids[: ids.index(token)])
    before = context["kv_lens"][0]
    assert generate_text(script, context, 8, end_token_id=end) == ids[: ids.index(end)]
    assert context["past_key_values"].seq_lens == before + ids.index(end)


def test_every_sample_of_a_batch_gets_the_same_number_of_tokens(script, official):
    prompts, bos = ["a cat", "two dogs in a park", "why?"], official.new_token_ids["bos_token_id"]
    eos, texts = official.new_token_ids["eos_token_id"], [official.tokenizer.encode(prompt) for prompt in prompts]
    texts = [[bos, *ids, eos] for ids in texts]
    lengths, cache = torch.tensor([len(ids) for ids in texts]), NaiveCache()
    positions = torch.cat([torch.arange(length) for length in lengths])
    official.model.forward_cache_update_text(
        cache, torch.tensor(sum(texts, [])), positions, lengths, torch.arange(len(positions)),
        torch.tensor([], dtype=torch.int64), torch.zeros(3, dtype=torch.int64),
    )  # fmt: skip
    starts = torch.tensor([bos, eos, bos])  # start tokens may differ
    ids = official.model.generate_text(cache, torch.arange(cache.seq_lens), lengths, starts, lengths, 5)
    assert ids.shape == (5, 3) and ids[0].tolist() == starts.tolist()
    assert cache.seq_lens == int(lengths.sum()) + 15
    again = official.model.generate_text(cache, torch.arange(cache.seq_lens), lengths + 5, starts, lengths + 5, 2)
    assert again.shape == (2, 3) and cache.seq_lens == int(lengths.sum()) + 21


def test_a_copy_and_its_original_are_filled_independently(script):
    context = filled(script, "a cat")
    twin = deepcopy(context)
    script.add_text(twin, "on a mat")
    assert context["past_key_values"].seq_lens < twin["past_key_values"].seq_lens == twin["kv_lens"][0]
    script.add_text(context, "in a hat")
    for one, texts in ((context, ("a cat", "in a hat")), (twin, ("a cat", "on a mat"))):
        expected = filled(script, *texts)["past_key_values"].value_cache[2]
        torch.testing.assert_close(one["past_key_values"].value_cache[2], expected, rtol=1e-5, atol=1e-5)


def as_official(context: dict) -> dict:
    """A context whose cache official code filled: plain dictionaries of tensors."""
    cache = NaiveCache()
    cache.key_cache, cache.value_cache = (
        {layer: tensor.clone() for layer, tensor in layers.items()}
        for layers in (context["past_key_values"].key_cache, context["past_key_values"].value_cache)
    )
    return {**context, "past_key_values": cache}


def test_a_cache_that_official_code_filled_is_continued(script):
    context = filled(script, "a cat")
    imported = as_official(context)
    assert script.generate_text(imported, 6) == script.generate_text(context, 6)
    for one in (context, imported):
        script.add_text(one, "on a mat")
    assert imported["past_key_values"].seq_lens == imported["kv_lens"][0] == context["kv_lens"][0]
    torch.testing.assert_close(imported["past_key_values"].key_cache[2], context["past_key_values"].key_cache[2])


def test_official_code_can_read_and_store_layers(script):
    context = filled(script, "a cat")
    cache = context["past_key_values"]
    for layers in (cache.key_cache, cache.value_cache):
        for layer in range(cache.num_layers):
            layers[layer] = torch.cat([layers[layer], layers[layer][-1:]])
    assert cache.seq_lens == context["kv_lens"][0] + 1
    context["kv_lens"], context["ropes"] = [cache.seq_lens], [context["ropes"][0] + 1]
    twin = deepcopy(context)
    script.add_text(context, "on a mat")
    assert cache.seq_lens == context["kv_lens"][0] and twin["past_key_values"].seq_lens == twin["kv_lens"][0]


def test_rejects_an_official_cache_of_another_size(script):
    context = as_official(filled(script, "a cat"))
    del context["past_key_values"].key_cache[2]
    with pytest.raises(ValueError, match="past_key_values must be a cache of 3 layers, as the model has, got 2"):
        script.add_text(context, "a dog")
    with pytest.raises(ValueError, match=r"key_values_lens must be lengths that add up to 5, .*, got \[4\]"):
        script.add_text({**as_official(filled(script, "a cat")), "kv_lens": [4]}, "a dog")


def test_rejects_what_is_not_a_cache(script):
    for cache, message in ((None, "must be a NaiveCache, got None"), ([], "must be a NaiveCache, got list")):
        with pytest.raises(TypeError, match=message):
            script.add_text({**script.context(), "past_key_values": cache}, "a dog")


@pytest.mark.parametrize("inferencer", [False, True])
def test_pickling_a_context_fails_with_the_reason(inferencer, script, official):
    context = filled(script, "a cat")
    if inferencer:
        ours = make_inferencer(official)
        context = ours.update_context_text("a cat", ours.init_gen_context())
    with pytest.raises(TypeError, match="a context cannot be pickled, because its keys and values are in the model's"):
        pickle.dumps(context)
    pickle.dumps(ContextCache(3))  # an empty one has nothing to lose


# Guidance branches without a cache


@pytest.mark.parametrize("cache", [None, NaiveCache()], ids=["none", "empty"])
def test_branch_without_a_cache_is_empty_at_its_position(cache, script, official):
    context = filled(script, "a cat")
    noise = torch.randn(4, official.ours.latent_features, generator=torch.Generator().manual_seed(0))
    settings = {
        "num_timesteps": 4,
        "cfg_text_scale": 4.0,
        "cfg_img_scale": 1.0,
        "cfg_interval": (0, 1),
        "timestep_shift": 3.0,
    }

    def generate(no_text):
        return script.generate_image((32, 32), noise, context, no_text, context, **settings)

    n = context["kv_lens"][0]
    latent = generate({"kv_lens": [n], "ropes": [n], "past_key_values": cache})
    assert torch.equal(latent, generate({"kv_lens": [0], "ropes": [n], "past_key_values": NaiveCache()}))
    assert not torch.equal(latent, generate({"kv_lens": [0], "ropes": [0], "past_key_values": NaiveCache()}))
    inferencer = make_inferencer(official)
    ours = inferencer.update_context_text("a cat", inferencer.init_gen_context())
    branch = {"kv_lens": [n], "ropes": [n], "past_key_values": cache}
    torch.manual_seed(0)  # the noise is that of a generator with this seed
    image = inferencer.gen_image((32, 32), ours, cfg_text_precontext=branch, cfg_img_precontext=ours, **settings)
    assert image.tobytes() == inferencer.decode_image(latent, (32, 32)).tobytes()


def test_rejects_a_branch_without_positions(script, official, monkeypatch):
    context, noise = filled(script, "a cat"), torch.zeros(4, official.ours.latent_features)
    generate_image = official.model.generate_image
    without = {"cfg_text_packed_position_ids": None}
    monkeypatch.setitem(vars(official.model), "generate_image", lambda **options: generate_image(**options | without))
    with pytest.raises(
        TypeError, match="a guidance branch must have key_values_lens and packed_position_ids, got None"
    ):
        script.generate_image((32, 32), noise, context, context, context, cfg_text_scale=2.0)

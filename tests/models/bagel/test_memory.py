"""The estimate of a request's memory against what the runtime allocates: slots exactly, tensors within a factor."""

import math
from dataclasses import replace

import denoising
import numpy as np
import pytest
import torch
from conftest import CHECKPOINT
from live_bytes import LiveBytes
from PIL import Image
from recording import dispatch_ops
from safetensors import safe_open

from bagel_rt import Bagel
from bagel_rt.models.bagel.config import BAGEL_7B_MOT
from bagel_rt.models.bagel.contexts import count_tokens
from bagel_rt.models.bagel.memory import cache_slots, expected_memory
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.prompts import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE
from bagel_rt.models.bagel.settings import TASKS
from bagel_rt.models.bagel.workload import Workload
from bagel_rt.runtime.context import Context, Prefill
from bagel_rt.runtime.decode import DecodeLoop, Sampling
from bagel_rt.runtime.graphs import GraphCache
from bagel_rt.runtime.slots import GROWTH, KVCache

LOOSE = 1.2  # an estimate is at most so many times what is measured


@pytest.fixture
def as_ops(monkeypatch):
    """Ops go through the dispatcher, so that each is one operator."""
    dispatch_ops(monkeypatch)


@pytest.fixture
def fresh(bagel):
    """The embedded model with an empty cache."""
    return Bagel(bagel.model, bagel.tokenizer)


@pytest.fixture
def published(bagel):
    """BAGEL-7B-MoT's shapes without memory, the embedded model's tokenizer."""
    with torch.inference_mode():
        return Bagel(BagelModel.allocate(BAGEL_7B_MOT, (0, 1), "meta", torch.bfloat16), bagel.tokenizer)


def bounds(measured: int, estimate: int) -> None:
    assert measured <= estimate <= LOOSE * measured, f"measured {measured:,}, estimated {estimate:,}"


def texts(bagel, *parts: str) -> int:
    return count_tokens(bagel.model.config, bagel.tokenizer, parts, False)[0]


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# Slots of the KV cache

IMAGE = {"num_timesteps": 3, "seed": 1}
PHOTO, WIDE = (70, 90), (48, 120)  # height, width
REQUESTS = {
    "a picture": (lambda b: b.generate("a b", size=(64, 96), **IMAGE), {"size": (64, 96)}, ["a b"]),
    "a batch": (lambda b: b.generate(["a", "a", "a"], size=(32, 48), **IMAGE), {"size": (32, 48), "batch": 3}, ["a"]),
    "a picture without guidance": (
        lambda b: b.generate("a", size=(32, 32), cfg_text_scale=1.0, **IMAGE),
        {"size": (32, 32), "settings": replace(TASKS["generate"].image, cfg_text_scale=1.0)},
        ["a"],
    ),
    "a picture with an interval of guidance that no step meets": (
        lambda b: b.generate("a", size=(32, 32), cfg_interval=(0.1, 0.2), **IMAGE),
        {"size": (32, 32), "settings": replace(TASKS["generate"].image, cfg_interval=(0.1, 0.2), num_timesteps=3)},
        ["a"],
    ),
    "a thought first": (
        lambda b: b.generate("a", size=(64, 64), think=True, max_think_token_n=9, **IMAGE),
        {"size": (64, 64), "max_think_token_n": 9},
        ["a", THINK_BEFORE_IMAGE],
    ),
    "a thought first, guided by the text alone": (
        lambda b: b.generate("a", size=(64, 64), think=True, max_think_token_n=9, cfg_img_scale=1.0, **IMAGE),
        {"size": (64, 64), "max_think_token_n": 9, "settings": replace(TASKS["generate"].image, cfg_img_scale=1.0)},
        ["a", THINK_BEFORE_IMAGE],
    ),
    "an edit": (lambda b: b.edit(picture(*PHOTO), "night", **IMAGE), {"task": "edit", "images": [PHOTO]}, ["night"]),
    "an edit of two pictures": (
        lambda b: b.edit([picture(*WIDE), picture(*PHOTO)], "night", **IMAGE),
        {"task": "edit", "images": [WIDE, PHOTO]},
        ["night"],
    ),
    "an edit without picture guidance": (
        lambda b: b.edit(picture(*PHOTO), "night", cfg_img_scale=1.0, **IMAGE),
        {"task": "edit", "images": [PHOTO], "settings": replace(TASKS["edit"].image, cfg_img_scale=1.0)},
        ["night"],
    ),
    "an edit with a thought": (
        lambda b: b.edit(picture(*PHOTO), "night", think=True, max_think_token_n=5, **IMAGE),
        {"task": "edit", "images": [PHOTO], "max_think_token_n": 5},
        ["night", THINK_BEFORE_IMAGE],
    ),
    "a question": (lambda b: b.chat("why?", max_think_token_n=7), {"task": "chat", "max_think_token_n": 7}, ["why?"]),
    "a question about two pictures": (
        lambda b: b.chat("why?", [picture(*PHOTO), picture(*WIDE)], think=True, max_think_token_n=7),
        {"task": "chat", "max_think_token_n": 7, "images": [PHOTO, WIDE]},
        ["why?", THINK_BEFORE_ANSWER],
    ),
}


@pytest.mark.parametrize("call, workload, said", REQUESTS.values(), ids=REQUESTS)
def test_slots_are_those_that_the_engine_takes(fresh, call, workload, said):
    sizes = [0]
    fresh.cache.moved.append(lambda: sizes.append(fresh.cache.slots))
    call(fresh)
    work = Workload(fresh.model.config, text_tokens=texts(fresh, *said), **workload)
    assert cache_slots(work, growth=0) == (sizes[-1], sizes[-2])


def test_a_batch_is_denoised_in_groups_whose_slots_are_used_again(fresh, monkeypatch):
    monkeypatch.setattr("bagel_rt.engine.MAX_ROWS", 3 * 2 * 18)
    monkeypatch.setattr("bagel_rt.models.bagel.workload.MAX_ROWS", 3 * 2 * 18)
    fresh.generate(["a"] * 5, size=(64, 64), **IMAGE)
    work = Workload(fresh.model.config, size=(64, 64), batch=5, text_tokens=texts(fresh, "a"))
    assert work.group == 2 and cache_slots(work, growth=0)[0] == fresh.cache.slots


def test_slots_grow_as_the_cache_on_a_gpu_does(monkeypatch):
    work = Workload(BAGEL_7B_MOT, size=(256, 256), batch=2, text_tokens=10)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    cache, before = KVCache(1, 1, 1, torch.uint8, "cpu"), 0
    for length in [10 + 258] * 2 + [258] * 2:
        slots = cache.slots
        cache.allocate(length)
        before = slots if cache.slots > slots else before
    assert cache_slots(work) == (cache.slots, before) == (GROWTH, 0)


# Tensors


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("grids", [[(64, 96)], [(16, 16)], [(96, 48)] * 4], ids=["one", "the smallest", "four"])
def test_a_step_takes_what_is_expected(fresh, as_ops, grids, branches):
    config, settings = fresh.model.config, replace(TASKS["edit"].image, num_timesteps=9)
    settings = replace(settings, cfg_text_scale=4.0 if branches > 1 else 1.0, cfg_img_scale=branches - 1)
    workload = {"task": "edit", "images": grids[:1], "batch": len(grids), "settings": settings, "graphs": False}
    grid = config.latent_grid(expected_memory(config, **workload).workload.drawn)
    expected = expected_memory(config, dtype=torch.float32, **workload)
    with torch.inference_mode():
        cache = fresh.model.make_cache(1 << 15)
        noise = torch.zeros(math.prod(grid), config.latent_features)
        opened = []
        for _ in grids:
            contexts = [Context(cache) for _ in range(3)]
            for number, context in enumerate(contexts):  # of unequal histories
                context.history = (number,)
            opened.append(contexts)
        opened = opened if len(grids) > 1 else opened[0]
        with LiveBytes(fresh.model.device) as made:
            denoiser = denoising.start(fresh.model, cache, opened, noise, settings, grid, images=len(grids))
            kept = made.live
            made.peak = 0
            denoiser.step(0)
    pictures = 4 * (math.prod(grid) * config.latent_features + 3 * math.prod(expected.workload.drawn))
    bounds(kept, expected.buffers - pictures)  # a picture's buffers are made where it is decoded
    bounds(made.peak - kept, expected.phases["denoising"])
    assert len(denoiser._buffers.guided.sizes) == branches * len(grids)


PICTURES = {"no picture": [], "one picture": [PHOTO], "three pictures": [WIDE, PHOTO, PHOTO]}


@pytest.mark.parametrize("model", ["fresh", "published"])
@pytest.mark.parametrize("task", ["edit", "chat"])
@pytest.mark.parametrize("images", PICTURES.values(), ids=PICTURES)
def test_a_prefill_takes_what_is_expected(request, as_ops, task, images, model):
    bagel, draws = request.getfixturevalue(model), task == "edit"
    inputs = [*(picture(*size) for size in images), "a question " * 50]
    work = {"task": task if images else "generate" if draws else "chat", "images": images or None}
    said = bagel._request(inputs, (64, 64), 1, TASKS["edit"], None, None)
    with torch.inference_mode():
        prefill = Prefill(bagel.model, bagel.cache)
        kept = bagel.engine._open(said, prefill, draws, 0)
        with LiveBytes(bagel.model.device) as made:
            prefill.run()
    expected = expected_memory(
        bagel.model.config, dtype=bagel.model.dtype, text_tokens=texts(bagel, inputs[-1]), **work
    )
    assert kept.cond.length == expected.workload.text_tokens + expected.workload.image_tokens
    bounds(made.peak, expected.phases["prefill"])


REAL = {
    "1024 x 1024": ({"size": (1024, 1024)}, lambda b, **o: b.generate("a", size=(1024, 1024), **o)),
    "four of 512 x 512": ({"size": (512, 512), "batch": 4}, lambda b, **o: b.generate(["a"] * 4, size=(512, 512), **o)),
    "an edit": (
        {"task": "edit", "images": [(768, 1024)]},
        lambda b, **o: b.edit(picture(768, 1024), "a", **o),
    ),
}


@pytest.mark.parametrize("workload, call", REAL.values(), ids=REAL)
def test_the_published_model_takes_what_is_expected(published, as_ops, monkeypatch, workload, call):
    """The whole request, operator by operator, on tensors without memory."""
    monkeypatch.setattr("bagel_rt.models.bagel.model.tensor_to_image", lambda pixels: None)
    said = {"text_tokens": texts(published, "a"), "graphs": False}
    expected = expected_memory(BAGEL_7B_MOT, **said, **workload)
    slots, before = cache_slots(expected.workload, growth=0)
    slot = expected.kv_cache // cache_slots(expected.workload)[0]
    phases = expected.phases | {"growing the KV cache": before * slot}
    with LiveBytes(published.model.device) as made:
        call(published, num_timesteps=4, seed=1)
    bounds(made.live, slots * slot + expected.buffers)
    bounds(made.peak, slots * slot + expected.buffers + max(phases.values()))


@pytest.mark.parametrize("count", [1, 8])
def test_a_token_takes_what_is_expected(published, as_ops, count):
    model = published.model
    with torch.inference_mode():
        contexts = [Context(model.make_cache(1 << 12)) for _ in range(count)]
        with LiveBytes(model.device) as made:
            sampling = [Sampling()] * count
            loop = DecodeLoop(
                model, model.text, contexts, [1] * count, 512, sampling, GraphCache(None), noise=None, keep=False
            )
            kept = made.live
            made.peak = 0
            loop.step()
    expected = expected_memory(BAGEL_7B_MOT, task="chat", batch=count)
    bounds(kept, expected.buffers)
    assert 2 * count * BAGEL_7B_MOT.llm.vocab_size <= made.peak - kept <= expected.phases["decoding text"]


def test_weights_are_counted_to_the_byte(bagel):
    stored = 0
    for name in ("ema.safetensors", "ae.safetensors"):
        with safe_open(CHECKPOINT / name, "pt") as tensors:
            stored += sum(4 * math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    for layer in bagel.model.weights.layers:  # QK-norm vectors are stored once for each head
        stored += sum(4 * (norm.numel() - 2 * norm.shape[1]) for norm in layer.qk_norm)
    assert expected_memory(bagel.model.config, dtype=torch.float32).weights == stored

"""The memory estimate of a request against measured allocations: slots exactly, tensors within a factor."""

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
from bagel_rt.models.bagel.settings import EDIT, TASKS
from bagel_rt.models.bagel.workload import Workload
from bagel_rt.request import ImageRequest, Request
from bagel_rt.runtime.context import Context, Prefill
from bagel_rt.runtime.decode import DecodeLoop, Sampling
from bagel_rt.runtime.graphs import GraphCache
from bagel_rt.runtime.slots import GROWTH, KVCache

TOLERANCE = 1.2  # maximum ratio of estimated to measured memory


@pytest.fixture
def as_ops(monkeypatch):
    """Call every op through the dispatcher, where it is one operator."""
    dispatch_ops(monkeypatch)


@pytest.fixture
def fresh(bagel):
    """The embedded model with an empty cache."""
    return Bagel(bagel.model, bagel.tokenizer)


@pytest.fixture
def published(bagel):
    """BAGEL-7B-MoT on the meta device, with the tokenizer of the embedded model."""
    with torch.inference_mode():
        return Bagel(BagelModel.allocate(BAGEL_7B_MOT, (0, 1), "meta", torch.bfloat16), bagel.tokenizer)


def assert_bounds(estimate: int, measured: int) -> None:
    assert measured <= estimate <= TOLERANCE * measured, f"measured {measured:,}, estimated {estimate:,}"


def text_tokens(bagel, *parts: str) -> int:
    return count_tokens(bagel.model.config, bagel.tokenizer, parts, False)[0]


def random_image(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# Slots of the KV cache

FAST = {"num_timesteps": 3, "seed": 1}
PHOTO, WIDE = (70, 90), (48, 120)  # height, width
REQUESTS = {
    "image": (lambda b: b.generate("a b", size=(64, 96), **FAST), {"size": (64, 96)}, ["a b"]),
    "batch": (lambda b: b.generate(["a", "a", "a"], size=(32, 48), **FAST), {"size": (32, 48), "batch": 3}, ["a"]),
    "image without guidance": (
        lambda b: b.generate("a", size=(32, 32), cfg_text_scale=1.0, **FAST),
        {"size": (32, 32), "settings": replace(TASKS["generate"].image, cfg_text_scale=1.0)},
        ["a"],
    ),
    "image with no step in the guidance interval": (
        lambda b: b.generate("a", size=(32, 32), cfg_interval=(0.1, 0.2), **FAST),
        {"size": (32, 32), "settings": replace(TASKS["generate"].image, cfg_interval=(0.1, 0.2), num_timesteps=3)},
        ["a"],
    ),
    "thinking": (
        lambda b: b.generate("a", size=(64, 64), think=True, max_think_token_n=9, **FAST),
        {"size": (64, 64), "max_think_token_n": 9},
        ["a", THINK_BEFORE_IMAGE],
    ),
    "thinking with text guidance only": (
        lambda b: b.generate("a", size=(64, 64), think=True, max_think_token_n=9, cfg_img_scale=1.0, **FAST),
        {"size": (64, 64), "max_think_token_n": 9, "settings": replace(TASKS["generate"].image, cfg_img_scale=1.0)},
        ["a", THINK_BEFORE_IMAGE],
    ),
    "edit": (lambda b: b.edit(random_image(*PHOTO), "night", **FAST), {"task": "edit", "images": [PHOTO]}, ["night"]),
    "edit of two images": (
        lambda b: b.edit([random_image(*WIDE), random_image(*PHOTO)], "night", **FAST),
        {"task": "edit", "images": [WIDE, PHOTO]},
        ["night"],
    ),
    "edit without image guidance": (
        lambda b: b.edit(random_image(*PHOTO), "night", cfg_img_scale=1.0, **FAST),
        {"task": "edit", "images": [PHOTO], "settings": replace(TASKS["edit"].image, cfg_img_scale=1.0)},
        ["night"],
    ),
    "thinking edit": (
        lambda b: b.edit(random_image(*PHOTO), "night", think=True, max_think_token_n=5, **FAST),
        {"task": "edit", "images": [PHOTO], "max_think_token_n": 5},
        ["night", THINK_BEFORE_IMAGE],
    ),
    "question": (lambda b: b.chat("why?", max_think_token_n=7), {"task": "chat", "max_think_token_n": 7}, ["why?"]),
    "question about two images": (
        lambda b: b.chat("why?", [random_image(*PHOTO), random_image(*WIDE)], think=True, max_think_token_n=7),
        {"task": "chat", "max_think_token_n": 7, "images": [PHOTO, WIDE]},
        ["why?", THINK_BEFORE_ANSWER],
    ),
}


@pytest.mark.parametrize("call, workload, texts", REQUESTS.values(), ids=REQUESTS)
def test_slot_estimate_matches_the_engine(fresh, call, workload, texts):
    sizes = [0]
    fresh.cache.moved.append(lambda: sizes.append(fresh.cache.slots))
    call(fresh)
    work = Workload.with_defaults(fresh.model.config, text_tokens=text_tokens(fresh, *texts), **workload)
    assert cache_slots(work, growth=0) == (sizes[-1], sizes[-2])


def test_groups_of_a_batch_reuse_their_slots(fresh, monkeypatch):
    monkeypatch.setattr("bagel_rt.engine.MAX_ROWS", 3 * 2 * 18)
    monkeypatch.setattr("bagel_rt.models.bagel.workload.MAX_ROWS", 3 * 2 * 18)
    fresh.generate(["a"] * 5, size=(64, 64), **FAST)
    work = Workload.with_defaults(fresh.model.config, size=(64, 64), batch=5, text_tokens=text_tokens(fresh, "a"))
    assert work.group == 2 and cache_slots(work, growth=0)[0] == fresh.cache.slots


def test_slot_estimate_includes_cache_growth_on_a_gpu(monkeypatch):
    work = Workload.with_defaults(BAGEL_7B_MOT, size=(256, 256), batch=2, text_tokens=10)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    cache, before = KVCache(1, 1, 1, torch.uint8, "cpu"), 0
    for length in [10 + 258] * 2 + [258] * 2:
        slots = cache.slots
        cache.allocate(length)
        before = slots if cache.slots > slots else before
    assert cache_slots(work) == (cache.slots, before) == (GROWTH, 0)


# Tensors


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("grids", [[(64, 96)], [(16, 16)], [(96, 48)] * 4], ids=["one", "smallest", "four"])
def test_estimate_matches_a_denoising_step(fresh, as_ops, grids, branches):
    config, settings = fresh.model.config, replace(TASKS["edit"].image, num_timesteps=9)
    settings = replace(settings, cfg_text_scale=4.0 if branches > 1 else 1.0, cfg_img_scale=branches - 1)
    workload = {"task": "edit", "images": grids[:1], "batch": len(grids), "settings": settings, "graphs": False}
    grid = config.latent_grid(expected_memory(config, **workload).workload.drawn)
    expected = expected_memory(config, dtype=torch.float32, **workload)
    with torch.inference_mode():
        cache = fresh.model.make_cache(1 << 15)
        noise = torch.zeros(math.prod(grid), config.latent_features)
        contexts = []
        for _ in grids:
            own = [Context(cache) for _ in range(3)]
            for number, context in enumerate(own):  # different histories, so that no branch is deduplicated
                context.history = (number,)
            contexts.append(own)
        contexts = contexts if len(grids) > 1 else contexts[0]
        with LiveBytes(fresh.model.device) as memory:
            denoiser = denoising.start(fresh.model, cache, contexts, noise, settings, grid, images=len(grids))
            kept = memory.live
            memory.peak = 0
            denoiser.step(0)
    # The estimate of the buffers includes those of the decoded image, which are not allocated here.
    decoding = 4 * (math.prod(grid) * config.latent_features + 3 * math.prod(expected.workload.drawn))
    assert_bounds(expected.buffers - decoding, kept)
    assert_bounds(expected.phases["denoising"], memory.peak - kept)
    assert len(denoiser._buffers.guided.sizes) == branches * len(grids)


IMAGES = {"no image": [], "one image": [PHOTO], "three images": [WIDE, PHOTO, PHOTO]}


@pytest.mark.parametrize("model", ["fresh", "published"])
@pytest.mark.parametrize("task", ["edit", "chat"])
@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
def test_estimate_matches_a_prefill(request, as_ops, task, images, model):
    bagel, draws = request.getfixturevalue(model), task == "edit"
    inputs = [*(random_image(*size) for size in images), "a question " * 50]
    work = {"task": task if images else "generate" if draws else "chat", "images": images or None}
    request = Request(inputs=inputs, seed=1, text=EDIT.text)
    if draws:
        request = ImageRequest(inputs=inputs, seed=1, text=EDIT.text, size=(64, 64), image=EDIT.image)
    with torch.inference_mode():
        prefill = Prefill(bagel.model, bagel.cache)
        contexts = bagel.engine._open(request, prefill, written=0)
        with LiveBytes(bagel.model.device) as memory:
            prefill.run()
    expected = expected_memory(
        bagel.model.config, dtype=bagel.model.dtype, text_tokens=text_tokens(bagel, inputs[-1]), **work
    )
    assert contexts.cond.length == expected.workload.text_tokens + expected.workload.image_tokens
    assert_bounds(expected.phases["prefill"], memory.peak)


PUBLISHED_REQUESTS = {
    "1024x1024": ({"size": (1024, 1024)}, lambda b, **o: b.generate("a", size=(1024, 1024), **o)),
    "four of 512x512": ({"size": (512, 512), "batch": 4}, lambda b, **o: b.generate(["a"] * 4, size=(512, 512), **o)),
    "edit": (
        {"task": "edit", "images": [(768, 1024)]},
        lambda b, **o: b.edit(random_image(768, 1024), "a", **o),
    ),
}


@pytest.mark.parametrize("workload, call", PUBLISHED_REQUESTS.values(), ids=PUBLISHED_REQUESTS)
def test_estimate_matches_a_request_of_the_published_model(published, as_ops, monkeypatch, workload, call):
    """Run the whole request on meta tensors."""
    monkeypatch.setattr("bagel_rt.models.bagel.model.tensor_to_image", lambda pixels: None)
    expected = expected_memory(BAGEL_7B_MOT, text_tokens=text_tokens(published, "a"), graphs=False, **workload)
    slots, before = cache_slots(expected.workload, growth=0)
    slot_bytes = expected.kv_cache // cache_slots(expected.workload)[0]
    phases = expected.phases | {"growing the KV cache": before * slot_bytes}
    with LiveBytes(published.model.device) as memory:
        call(published, num_timesteps=4, seed=1)
    assert_bounds(slots * slot_bytes + expected.buffers, memory.live)
    assert_bounds(slots * slot_bytes + expected.buffers + max(phases.values()), memory.peak)


@pytest.mark.parametrize("count", [1, 8])
def test_estimate_matches_a_decode_step(published, as_ops, count):
    model = published.model
    with torch.inference_mode():
        contexts = [Context(model.make_cache(1 << 12)) for _ in range(count)]
        with LiveBytes(model.device) as memory:
            sampling = [Sampling()] * count
            loop = DecodeLoop(
                model, model.text, contexts, [1] * count, 512, sampling, GraphCache(None), noise=None, keep=False
            )
            kept = memory.live
            memory.peak = 0
            loop.step()
    expected = expected_memory(BAGEL_7B_MOT, task="chat", batch=count)
    assert_bounds(expected.buffers, kept)
    assert 2 * count * BAGEL_7B_MOT.llm.vocab_size <= memory.peak - kept <= expected.phases["decoding text"]


def test_estimate_of_weights_is_exact(bagel):
    stored = 0
    for name in ("ema.safetensors", "ae.safetensors"):
        with safe_open(CHECKPOINT / name, "pt") as tensors:
            stored += sum(4 * math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    for layer in bagel.model.weights.layers:  # QK-norm vectors are stored once for each head
        stored += sum(4 * (norm.numel() - 2 * norm.shape[1]) for norm in layer.qk_norm)
    assert expected_memory(bagel.model.config, dtype=torch.float32).weights == stored

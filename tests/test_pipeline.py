"""End-to-end behavior of ``Bagel``: packing, contexts, determinism, cancellation and cleanup."""

import gc
from dataclasses import replace

import denoising
import pytest
import torch
from conftest import CHECKPOINT
from safetensors.torch import load_file, save_file

from bagel_rt import Bagel, Cancelled, ImageResult
from bagel_rt.engine import Engine
from bagel_rt.models.bagel.contents import Text
from bagel_rt.models.bagel.settings import ImageSettings
from bagel_rt.runtime.context import Context, Prefill

FAST = {"num_timesteps": 5}


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


def cached(cache, context):
    """Copies of the keys and values of a context."""
    slots = slice(context.key_start, context.key_start + context.length)
    return cache.k[:, slots].clone(), cache.v[:, slots].clone()


# Packing


def test_packed_prefill_matches_separate_prefills(bagel, photo):
    def branches(run_each):
        prefill = Prefill(bagel.model, bagel.cache)
        contexts = bagel.model.open_contexts(prefill, bagel.tokenizer, [], seed=3)
        for add in (
            lambda: contexts.add_system("think"),
            lambda: contexts.add_image(photo),
            lambda: contexts.add_text("make it night"),
            lambda: contexts.add_negative("day"),
        ):
            add()
            if run_each:
                prefill.run()
        prefill.run()
        return contexts.branches

    with torch.inference_mode():
        for packed, single in zip(branches(False), branches(True), strict=True):
            assert (packed.length, packed.position) == (single.length, single.position)
            for a, b in zip(cached(bagel.cache, packed), cached(bagel.cache, single), strict=True):
                close(a, b)


@pytest.mark.parametrize(
    "call, forwards",
    [
        (lambda b, p: b.generate(["a", "b c"], size=(32, 32), seed=1, num_timesteps=2), 1),
        (lambda b, p: b.edit([p, p], "make it night", seed=1, num_timesteps=2), 1),
        (lambda b, p: b.chat("what?", [p, p], max_think_token_n=1), 1),
        (lambda b, p: b.generate("a", size=(32, 32), seed=1, num_timesteps=2, think=True, max_think_token_n=1), 2),
        (lambda b, p: b.edit(p, "night", seed=1, num_timesteps=2, think=True, max_think_token_n=1), 2),
    ],
    ids=["batch", "edit of two images", "question about two images", "thinking", "thinking edit"],
)
def test_prefill_takes_one_forward_and_copies_no_context(bagel, photo, monkeypatch, call, forwards):
    runs, copies = [], []
    run, copy = Prefill.run, type(bagel.cache).copy
    monkeypatch.setattr(Prefill, "run", lambda self: runs.append(bool(self._segments)) or run(self))
    monkeypatch.setattr(type(bagel.cache), "copy", lambda self, *a: copies.append(a) or copy(self, *a))
    call(bagel, photo)
    assert sum(runs) == forwards and not copies


@pytest.mark.parametrize("image_scale", [1.0, 1.5])
def test_branch_deduplication_does_not_change_the_result(bagel, image_scale):
    settings = ImageSettings(num_timesteps=5, cfg_img_scale=image_scale)
    with torch.inference_mode():
        results = []
        for deduplicate in (True, False):
            prefill = Prefill(bagel.model, bagel.cache)
            contexts = bagel.model.open_contexts(prefill, bagel.tokenizer, [], seed=1)
            contexts.add_text("a small red boat")
            prefill.run()
            noise = contexts.noise.draw(24, bagel.model.config.latent_features)
            denoiser = denoising.start(
                bagel.model, bagel.cache, contexts.branches, noise, settings, (4, 6), deduplicate=deduplicate
            )
            for step in range(len(denoiser)):
                denoiser.step(step)
            results.append((denoiser.state, max(b for branches in denoiser._branch_of for b in branches if b) + 1))
    assert [branches for _, branches in results] == [2, 3 if image_scale > 1 else 2]
    close(results[0][0], results[1][0])


def test_concurrent_denoisers_do_not_share_slots(bagel, photo):
    def start(seed):
        prefill = Prefill(bagel.model, bagel.cache)
        contexts = bagel.model.open_contexts(prefill, bagel.tokenizer, [], seed=seed)
        contexts.add_image(photo)
        contexts.add_text("make it night")
        prefill.run()
        noise = contexts.noise.draw(24, bagel.model.config.latent_features)
        settings = ImageSettings(num_timesteps=5, cfg_img_scale=2.0, cfg_interval=(0.5, 1.0))
        return denoising.start(
            bagel.model, bagel.cache, contexts.branches, noise, settings, (4, 6), bagel.engine.graphs
        )

    def slots_of(denoiser):
        packed = {denoiser._buffers.guided, denoiser._buffers.plain}
        return {slot for branches in packed for slot in branches._batch.slots.tolist()}

    with torch.inference_mode():
        first, second = start(1), start(2)
        assert not slots_of(first) & slots_of(second)
        for step in range(len(first)):
            first.step(step), second.step(step)
        for seed, result in ((1, first), (2, second)):
            alone = start(seed)
            for step in range(len(alone)):
                alone.step(step)
            assert torch.equal(alone.state, result.state)


# Contexts


def test_extending_a_clone_does_not_change_its_source(bagel):
    with torch.inference_mode():
        source = Context(bagel.cache, capacity=64)
        prefill = Prefill(bagel.model, bagel.cache)
        prefill.append(source, Text((1, 2, 3, 4, 5)))
        prefill.run()
        before = cached(bagel.cache, source)
        clones = [source.clone() for _ in range(3)]
        for number, clone in enumerate(clones):
            prefill.append(clone, Text((7 + number, 8, 9)))
        prefill.run()
        assert all(torch.equal(a, b) for a, b in zip(before, cached(bagel.cache, source), strict=True))
        assert (source.length, source.position, len(source.history)) == (5, 5, 1)
        for number, clone in enumerate(clones):
            fresh = Context(bagel.cache)
            prefill.append(fresh, Text((1, 2, 3, 4, 5)))
            prefill.append(fresh, Text((7 + number, 8, 9)))
            prefill.run()
            assert fresh.same_as(clone) and not fresh.same_as(source)
            for a, b in zip(cached(bagel.cache, clone), cached(bagel.cache, fresh), strict=True):
                close(a, b)


def test_contexts_are_equal_for_equal_texts_but_not_for_equal_images(bagel, photo):
    with torch.inference_mode():
        prefill = Prefill(bagel.model, bagel.cache)
        first, equal, other = (bagel.model.open_contexts(prefill, bagel.tokenizer, [], seed=0) for _ in range(3))
        for contexts, text in ((first, "a"), (equal, "a"), (other, "b")):
            contexts.add_text(text)
        assert first.cond.same_as(equal.cond) and not first.cond.same_as(other.cond)
        assert first.cond.same_as(first.no_img) and not first.cond.same_as(first.no_text)
        first.add_image(photo), equal.add_image(photo)
        assert not first.cond.same_as(equal.cond), "two encodings draw different noise"
        prefill.run()


# Requests


def test_result_depends_on_the_seed_only(bagel, photo):
    for call in (
        lambda seed: bagel.generate("a boat", size=(32, 32), seed=seed, **FAST),
        lambda seed: bagel.edit(photo, "make it night", seed=seed, **FAST),
    ):
        first, again, other = call(3), call(3), call(4)
        assert torch.equal(first.latents, again.latents) and first.image.tobytes() == again.image.tobytes()
        assert not torch.equal(first.latents, other.latents)
    random = bagel.generate("a boat", size=(32, 32), **FAST)
    assert torch.equal(bagel.generate("a boat", size=(32, 32), seed=random.seed, **FAST).latents, random.latents)


def test_noise_argument_replaces_the_seed(bagel):
    noise = torch.randn(4, bagel.model.config.latent_features)
    one, two = (bagel.generate("a", size=(32, 32), seed=seed, noise=noise, **FAST) for seed in (1, 2))
    assert torch.equal(one.latents, two.latents)


def test_stream_concatenates_to_the_chat_answer(bagel, photo):
    for images in ((), photo, [photo, photo]):
        options = {"max_think_token_n": 24, "think": True}
        assert "".join(bagel.stream("What is this?", images, **options)) == bagel.chat(
            "What is this?", images, **options
        )


def test_sampled_text_depends_on_the_seed(bagel):
    options = {"max_think_token_n": 24, "do_sample": True, "text_temperature": 1.0}
    first, again, other = (bagel.chat("Why?", seed=seed, **options) for seed in (1, 1, 2))
    assert first == again != other


def test_thinking_returns_a_thought_and_changes_the_image(bagel):
    result = bagel.generate("a boat", size=(32, 32), seed=0, think=True, max_think_token_n=8, **FAST)
    plain = bagel.generate("a boat", size=(32, 32), seed=0, **FAST)
    assert isinstance(result.thought, str) and result.thought and plain.thought is None
    assert not torch.equal(result.latents, plain.latents)


def test_interleave_stops_when_the_text_requests_no_image(bagel, photo):
    parts = bagel.interleave([photo, "continue the story"], max_think_token_n=6, seed=0, **FAST)
    assert [type(part) for part in parts] == [str]


def test_interleave_generates_at_most_max_rounds_images(bagel, photo, monkeypatch):
    monkeypatch.setattr(Engine, "_stream_text", lambda self, *_: iter(["look <image_start>"]))
    parts = bagel.interleave([photo, "go on"], max_rounds=2, seed=0, **FAST)
    assert [type(part) for part in parts] == [str, ImageResult, str, ImageResult]
    assert parts[1].image.size == parts[3].image.size == (96, 64)
    assert not torch.equal(parts[1].latents, parts[3].latents), "the first image is in the context of the second"


def test_result_contains_its_parameters(bagel):
    result = bagel.generate("a", size=(32, 48), seed=9, negative_prompt="b", cfg_text_scale=2.5, **FAST)
    assert result.parameters["cfg_text_scale"] == 2.5 and result.parameters["num_timesteps"] == 5
    assert (result.parameters["height"], result.parameters["width"], result.seed) == (32, 48, 9)
    assert result.parameters["negative_prompt"] == "b" and "max_think_token_n" not in result.parameters


@pytest.mark.parametrize(
    "stage, call",
    [
        ("image", lambda bagel, photo, **options: bagel.edit(photo, "night", seed=1, num_timesteps=6, **options)),
        ("text", lambda bagel, photo, **options: bagel.chat("what?", photo, max_think_token_n=10, **options)),
    ],
)
def test_cancelling_frees_slots_and_does_not_affect_the_next_request(bagel, photo, stage, call):
    seen = []

    def stop(progress):
        seen.append(progress)
        if progress.step == 3:
            raise Cancelled

    gc.collect()
    free = bagel.cache.slots - bagel.cache.free_slots
    before = call(bagel, photo)
    with pytest.raises(Cancelled) as caught:
        call(bagel, photo, progress=stop)
    assert caught.tb is not None, "slots are freed although the exception still holds its frames"
    assert bagel.cache.slots - bagel.cache.free_slots == free
    assert [(p.stage, p.step) for p in seen] == [(stage, 1), (stage, 2), (stage, 3)]
    after = call(bagel, photo)
    assert before == after if stage == "text" else torch.equal(before.latents, after.latents)


def test_cancelling_keeps_a_stream_started_in_the_callback(bagel):
    """The slots of a stream started in a callback do not belong to the request of the callback."""
    expected, started = bagel.chat("what?", max_think_token_n=20), []

    def start_stream(progress):
        if progress.step == 2:
            started.append(bagel.stream("what?", max_think_token_n=20))
            started.append(next(started[0]))
        if progress.step == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        bagel.generate("a", size=(32, 32), seed=1, progress=start_stream, **FAST)
    bagel.generate("b", size=(64, 64), seed=2, **FAST)
    assert "".join([started[1], *started[0]]) == expected


def test_closing_a_stream_frees_its_slots(bagel, photo):
    gc.collect()
    used = bagel.cache.slots - bagel.cache.free_slots
    pieces = bagel.stream("what?", photo)
    next(pieces)
    assert bagel.cache.slots - bagel.cache.free_slots > used
    pieces.close()
    assert bagel.cache.slots - bagel.cache.free_slots == used


def test_caller_is_not_in_inference_mode(bagel):
    pieces = bagel.stream("what?", max_think_token_n=4)
    next(pieces)
    assert not torch.is_inference_mode_enabled()
    modes = []
    report = lambda progress: modes.append(torch.is_inference_mode_enabled())  # noqa: E731
    result = bagel.generate("a", size=(16, 16), seed=0, num_timesteps=3, progress=report)
    assert modes == [False, False] and not torch.is_inference_mode_enabled()
    result.latents.add_(1)  # an inference tensor would not allow this


def test_long_prefill_is_split_into_bounded_forwards(bagel, monkeypatch):
    monkeypatch.setattr("bagel_rt.runtime.context.MAX_ROWS", 8)
    rows, forward = [], type(bagel.model.transformer).forward

    def spy(self, hidden, *rest):
        rows.append(len(hidden))
        return forward(self, hidden, *rest)

    monkeypatch.setattr(type(bagel.model.transformer), "forward", spy)
    with torch.inference_mode():
        prefill = Prefill(bagel.model, bagel.cache)
        contexts = [Context(bagel.cache) for _ in range(4)]
        for context, length in zip(contexts, (3, 4, 5, 12), strict=True):
            prefill.append(context, Text(tuple(range(length))))
        prefill.run()
    assert rows == [7, 5, 12], "full batches, and a separate one for a content beyond the limit"


def test_thinking_tokens_count_only_for_thinking_requests(bagel):
    limit = bagel.model.config.llm.max_position_embeddings
    bagel.generate("a", size=(16, 16), seed=0, num_timesteps=2, max_think_token_n=limit)
    with pytest.raises(ValueError, match="are for generated text"):
        bagel.generate("a", size=(16, 16), seed=0, num_timesteps=2, max_think_token_n=limit, think=True)


def test_default_size_is_the_default_resolution(bagel):
    result = bagel.generate("a", seed=0, num_timesteps=2)
    assert result.image.size == (128, 128)


def test_rejects_an_image_beyond_the_position_tables_before_prefill(bagel, photo, monkeypatch):
    small = replace(bagel.model.config, max_latent_size=5)
    monkeypatch.setattr(bagel.model, "config", small)
    monkeypatch.setattr(Prefill, "run", lambda self: pytest.fail("prefill ran"))
    with pytest.raises(ValueError, match="must have sides of at most .* got 96x64 and .* from 90x70"):
        bagel.edit(photo, "night")


def test_one_error_lists_the_problems_of_both_weight_files(bagel, tmp_path):
    import shutil

    from bagel_rt import CheckpointError

    folder = tmp_path / "model"
    shutil.copytree(CHECKPOINT, folder)
    weights = load_file(folder / "ema.safetensors")
    del weights["llm2vae.bias"]
    save_file(weights, folder / "ema.safetensors")
    (folder / "ae.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)missing tensor llm2vae\.bias.*must contain ae\.safetensors"):
        Bagel.from_pretrained(folder)

"""What a user of ``Bagel`` relies on: packing, sharing, cancelling change nothing; bad input is named."""

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


def frozen(cache, context):
    slots = slice(context.key_start, context.key_start + context.length)
    return cache.k[:, slots].clone(), cache.v[:, slots].clone()


# Packing


def test_a_packed_prefill_equals_one_append_at_a_time(bagel, photo):
    def filled(run_each):
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
        for packed, single in zip(filled(False), filled(True), strict=True):
            assert (packed.length, packed.position) == (single.length, single.position)
            for a, b in zip(frozen(bagel.cache, packed), frozen(bagel.cache, single), strict=True):
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
    ids=["prompts", "an edit of two images", "a question about two images", "a thought after", "a thought on an edit"],
)
def test_a_request_is_prefilled_in_one_forward_and_no_context_moves(bagel, photo, monkeypatch, call, forwards):
    counted, moved = [], []
    run, copy = Prefill.run, type(bagel.cache).copy
    monkeypatch.setattr(Prefill, "run", lambda self: counted.append(bool(self._segments)) or run(self))
    monkeypatch.setattr(type(bagel.cache), "copy", lambda self, *a: moved.append(a) or copy(self, *a))
    call(bagel, photo)
    assert sum(counted) == forwards and not moved


@pytest.mark.parametrize("image_scale", [1.0, 1.5])
def test_branch_deduplication_changes_nothing(bagel, image_scale):
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


def test_two_denoisings_at_once_do_not_share_slots(bagel, photo):
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

    def rows_of(denoiser):
        packed = {denoiser._buffers.guided, denoiser._buffers.plain}
        return {slot for branches in packed for slot in branches._batch.slots.tolist()}

    with torch.inference_mode():
        first, second = start(1), start(2)
        assert not rows_of(first) & rows_of(second)
        for step in range(len(first)):
            first.step(step), second.step(step)
        for seed, result in ((1, first), (2, second)):
            alone = start(seed)
            for step in range(len(alone)):
                alone.step(step)
            assert torch.equal(alone.state, result.state)


# Contexts


def test_a_cloned_and_extended_context_leaves_its_source_untouched(bagel):
    with torch.inference_mode():
        source = Context(bagel.cache, capacity=64)
        prefill = Prefill(bagel.model, bagel.cache)
        prefill.append(source, Text((1, 2, 3, 4, 5)))
        prefill.run()
        before = frozen(bagel.cache, source)
        clones = [source.clone() for _ in range(3)]
        for number, clone in enumerate(clones):
            prefill.append(clone, Text((7 + number, 8, 9)))
        prefill.run()
        assert all(torch.equal(a, b) for a, b in zip(before, frozen(bagel.cache, source), strict=True))
        assert (source.length, source.position, len(source.history)) == (5, 5, 1)
        for number, clone in enumerate(clones):
            fresh = Context(bagel.cache)
            prefill.append(fresh, Text((1, 2, 3, 4, 5)))
            prefill.append(fresh, Text((7 + number, 8, 9)))
            prefill.run()
            assert fresh.same_as(clone) and not fresh.same_as(source)
            for a, b in zip(frozen(bagel.cache, clone), frozen(bagel.cache, fresh), strict=True):
                close(a, b)


def test_equal_texts_make_equal_contexts_and_images_only_themselves(bagel, photo):
    with torch.inference_mode():
        prefill = Prefill(bagel.model, bagel.cache)
        talks = [bagel.model.open_contexts(prefill, bagel.tokenizer, [], seed=0) for _ in range(3)]
        for talk, text in zip(talks, ("a", "a", "b"), strict=True):
            talk.add_text(text)
        assert talks[0].cond.same_as(talks[1].cond) and not talks[0].cond.same_as(talks[2].cond)
        assert talks[0].cond.same_as(talks[0].no_img) and not talks[0].cond.same_as(talks[0].no_text)
        talks[0].add_image(photo), talks[1].add_image(photo)
        assert not talks[0].cond.same_as(talks[1].cond), "two encodings draw different noise"
        prefill.run()


# Requests


def test_the_same_seed_repeats_and_another_does_not(bagel, photo):
    for call in (
        lambda seed: bagel.generate("a boat", size=(32, 32), seed=seed, **FAST),
        lambda seed: bagel.edit(photo, "make it night", seed=seed, **FAST),
    ):
        first, again, other = call(3), call(3), call(4)
        assert torch.equal(first.latents, again.latents) and first.image.tobytes() == again.image.tobytes()
        assert not torch.equal(first.latents, other.latents)
    drawn = bagel.generate("a boat", size=(32, 32), **FAST)
    assert torch.equal(bagel.generate("a boat", size=(32, 32), seed=drawn.seed, **FAST).latents, drawn.latents)


def test_injected_noise_replaces_the_seed(bagel):
    noise = torch.randn(4, bagel.model.config.latent_features)
    one, two = (bagel.generate("a", size=(32, 32), seed=seed, noise=noise, **FAST) for seed in (1, 2))
    assert torch.equal(one.latents, two.latents)


def test_a_streamed_answer_is_the_whole_answer(bagel, photo):
    for images in ((), photo, [photo, photo]):
        options = {"max_think_token_n": 24, "think": True}
        assert "".join(bagel.stream("What is this?", images, **options)) == bagel.chat(
            "What is this?", images, **options
        )


def test_sampled_text_repeats_with_its_seed(bagel):
    options = {"max_think_token_n": 24, "do_sample": True, "text_temperature": 1.0}
    first, again, other = (bagel.chat("Why?", seed=seed, **options) for seed in (1, 1, 2))
    assert first == again != other


def test_thinking_puts_the_thought_into_the_result(bagel):
    result = bagel.generate("a boat", size=(32, 32), seed=0, think=True, max_think_token_n=8, **FAST)
    plain = bagel.generate("a boat", size=(32, 32), seed=0, **FAST)
    assert isinstance(result.thought, str) and result.thought and plain.thought is None
    assert not torch.equal(result.latents, plain.latents)


def test_interleaving_returns_texts_and_stops_when_no_image_is_asked_for(bagel, photo):
    parts = bagel.interleave([photo, "continue the story"], max_think_token_n=6, seed=0, **FAST)
    assert [type(part) for part in parts] == [str]


def test_interleaving_draws_at_most_max_rounds_images(bagel, photo, monkeypatch):
    monkeypatch.setattr(Engine, "_stream_text", lambda self, *_: iter(["look <image_start>"]))
    parts = bagel.interleave([photo, "go on"], max_rounds=2, seed=0, **FAST)
    assert [type(part) for part in parts] == [str, ImageResult, str, ImageResult]
    assert parts[1].image.size == parts[3].image.size == (96, 64)
    assert not torch.equal(parts[1].latents, parts[3].latents), "the second picture has seen the first"


def test_parameters_say_what_was_done(bagel):
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
def test_cancelling_frees_everything_and_the_next_request_is_unharmed(bagel, photo, stage, call):
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
    assert caught.tb is not None, "the frames of the exception are still there"
    assert bagel.cache.slots - bagel.cache.free_slots == free
    assert [(p.stage, p.step) for p in seen] == [(stage, 1), (stage, 2), (stage, 3)]
    after = call(bagel, photo)
    assert before == after if stage == "text" else torch.equal(before.latents, after.latents)


def test_a_failed_request_leaves_those_that_began_in_its_callback(bagel):
    """A callback may begin a stream of its own; its slots are not the failed request's."""
    expected, begun = bagel.chat("what?", max_think_token_n=20), []

    def begin(progress):
        if progress.step == 2:
            begun.append(bagel.stream("what?", max_think_token_n=20))
            begun.append(next(begun[0]))
        if progress.step == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        bagel.generate("a", size=(32, 32), seed=1, progress=begin, **FAST)
    bagel.generate("b", size=(64, 64), seed=2, **FAST)
    assert "".join([begun[1], *begun[0]]) == expected


def test_an_abandoned_stream_frees_everything(bagel, photo):
    gc.collect()
    used = bagel.cache.slots - bagel.cache.free_slots
    pieces = bagel.stream("what?", photo)
    next(pieces)
    assert bagel.cache.slots - bagel.cache.free_slots > used
    pieces.close()
    assert bagel.cache.slots - bagel.cache.free_slots == used


def test_the_caller_is_not_left_in_inference_mode(bagel):
    pieces = bagel.stream("what?", max_think_token_n=4)
    next(pieces)
    assert not torch.is_inference_mode_enabled()
    seen = []
    report = lambda progress: seen.append(torch.is_inference_mode_enabled())  # noqa: E731
    result = bagel.generate("a", size=(16, 16), seed=0, num_timesteps=3, progress=report)
    assert seen == [False, False] and not torch.is_inference_mode_enabled()
    result.latents.add_(1)  # an ordinary tensor


def test_a_long_prefill_is_cut_into_bounded_forwards(bagel, monkeypatch):
    monkeypatch.setattr("bagel_rt.runtime.context.MAX_ROWS", 8)
    rows, forward = [], type(bagel.model.transformer).forward

    def counted(self, hidden, *rest):
        rows.append(len(hidden))
        return forward(self, hidden, *rest)

    monkeypatch.setattr(type(bagel.model.transformer), "forward", counted)
    with torch.inference_mode():
        prefill = Prefill(bagel.model, bagel.cache)
        contexts = [Context(bagel.cache) for _ in range(4)]
        for context, length in zip(contexts, (3, 4, 5, 12), strict=True):
            prefill.append(context, Text(tuple(range(length))))
        prefill.run()
    assert rows == [7, 5, 12], "full packs, and a content longer than the bound alone"


def test_thinking_tokens_take_no_positions_of_a_request_that_does_not_think(bagel):
    limit = bagel.model.config.llm.max_position_embeddings
    bagel.generate("a", size=(16, 16), seed=0, num_timesteps=2, max_think_token_n=limit)
    with pytest.raises(ValueError, match="are for generated text"):
        bagel.generate("a", size=(16, 16), seed=0, num_timesteps=2, max_think_token_n=limit, think=True)


def test_the_default_size_is_the_largest_square_of_the_model(bagel):
    result = bagel.generate("a", seed=0, num_timesteps=2)
    assert result.image.size == (128, 128)


def test_an_image_beyond_the_position_tables_is_refused_before_any_work(bagel, photo, monkeypatch):
    small = replace(bagel.model.config, max_latent_size=5)
    monkeypatch.setattr(bagel.model, "config", small)
    monkeypatch.setattr(Prefill, "run", lambda self: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="must have sides of at most .* got 96x64 and .* from 90x70"):
        bagel.edit(photo, "night")


def test_one_error_lists_what_is_wrong_with_both_files(bagel, tmp_path):
    import shutil

    from bagel_rt import CheckpointError

    folder = tmp_path / "model"
    shutil.copytree(CHECKPOINT, folder)
    weights = load_file(folder / "ema.safetensors")
    del weights["llm2vae.bias"]
    save_file(weights, folder / "ema.safetensors")
    (folder / "ae.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)missing tensor llm2vae\.bias.*must contain one of ae\.safetensors"):
        Bagel.from_pretrained(folder)

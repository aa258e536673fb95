"""Batches: every result equals that of a separate request."""

import pytest

from bagel_rt.engine import Engine

FAST = {"num_timesteps": 5}
PROMPTS = ["a small red boat", "?", "draw a green bicycle, morning light; 3 birds", "x"]
SIZES = [(64, 96), (16, 16), (96, 48), (32, 128)]


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("negative_prompt", [None, "blurry"])
@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_batch_matches_separate_requests(bagel, renorm, negative_prompt):
    options = FAST | {"cfg_renorm_type": renorm, "negative_prompt": negative_prompt, "cfg_interval": (0.7, 1.0)}
    batch = bagel.generate(PROMPTS, size=SIZES, seed=[5, 6, 7, 8], **options)
    for index, result in enumerate(batch):
        alone = bagel.generate(PROMPTS[index], size=SIZES[index], seed=5 + index, **options)
        close(result.latents, alone.latents)
        assert result.image.size == alone.image.size == SIZES[index][::-1]


def test_batch_with_hyperparameters_per_prompt_matches_separate_requests(bagel):
    options = {
        "cfg_text_scale": [1.0, 3.0, 4.0, 6.0],
        "cfg_img_scale": [1.5, 1.0, 2.0, 1.5],
        "cfg_interval": [(0.0, 1.0), (0.5, 0.9), (0.7, 1.0), (0.2, 0.3)],
        "cfg_renorm_type": ["global", "channel", "text_channel", "global"],
        "cfg_renorm_min": [0.0, 0.5, 0.0, 1.0],
        "timestep_shift": [3.0, 1.0, 3.0, 2.0],
        "num_timesteps": [6, 6, 4, 6],
    }
    steps = []
    batch = bagel.generate(PROMPTS, size=SIZES, seed=5, progress=lambda p: steps.append((p.step, p.total)), **options)
    for index, result in enumerate(batch):
        own = {name: values[index] for name, values in options.items()}
        alone = bagel.generate(PROMPTS[index], size=SIZES[index], seed=5 + index, **own)
        close(result.latents, alone.latents)
        assert result.parameters == alone.parameters
    assert steps == [(n, 8) for n in range(1, 9)], "five steps of three prompts and three steps of one"


def test_thoughts_of_a_batch_match_separate_requests(bagel):
    options = FAST | {
        "think": [True, True, False, True],
        "do_sample": [False, True, True, False],
        "text_temperature": 1.5,
    }
    options |= {
        "negative_prompt": [None, "blurry", "dark", None],
        "max_think_token_n": [12, 12, 12, 5],
        "top_k": [0, 30, 0, 0],
        "top_p": [1.0, 0.8, 1.0, 1.0],
    }
    steps = []
    batch = bagel.generate(PROMPTS, size=(32, 32), seed=5, progress=steps.append, **options)
    texts = [p.step for p in steps if p.stage == "text"]
    assert texts == sorted(set(texts)) and {p.total for p in steps if p.stage == "text"} == {15}
    assert texts[:12] == list(range(1, 13)), "11 steps of the two greedy texts, then the others"
    assert [result.thought is not None for result in batch] == options["think"]
    for index, result in enumerate(batch):
        own = {name: value[index] if isinstance(value, list) else value for name, value in options.items()}
        alone = bagel.generate(PROMPTS[index], size=(32, 32), seed=5 + index, **own)
        assert result.thought == alone.thought and result.parameters == alone.parameters
        close(result.latents, alone.latents)


def test_more_than_eight_thoughts_are_decoded_in_groups(bagel, monkeypatch):
    batches = []
    tokens = Engine._tokens
    monkeypatch.setattr(Engine, "_tokens", lambda self, c, *rest: batches.append(len(c)) or tokens(self, c, *rest))
    prompts = [f"boat {number}" for number in range(9)]
    results = bagel.generate(prompts, size=(16, 16), seed=1, think=True, max_think_token_n=4, num_timesteps=2)
    assert batches == [8, 1] and all(result.thought for result in results)


def test_large_batch_is_denoised_in_groups_with_the_same_result(bagel, monkeypatch):
    prompts, steps = ["a", "b c", "d", "e"], []
    expected = bagel.generate(prompts, size=(32, 32), seed=1, **FAST)
    monkeypatch.setattr("bagel_rt.engine.MAX_ROWS", 40)
    monkeypatch.setattr("bagel_rt.runtime.context.MAX_ROWS", 4)
    results = bagel.generate(prompts, size=(32, 32), seed=1, progress=lambda p: steps.append((p.step, p.total)), **FAST)
    for a, b in zip(expected, results, strict=True):
        close(a.latents, b.latents)
    assert steps == [(n, 8) for n in range(1, 9)]

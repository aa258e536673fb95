"""Several requests at once: each gets what it gets alone, whatever shares its forwards."""

import pytest

from bagel_rt.engine import Engine

FAST = {"num_timesteps": 5}
PROMPTS = ["a small red boat", "", "draw a green bicycle, morning light; 3 birds", "x"]
SIZES = [(64, 96), (16, 16), (96, 48), (32, 128)]


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("negative_prompt", [None, "blurry"])
@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_a_batch_gives_each_prompt_what_it_gets_alone(bagel, renorm, negative_prompt):
    options = FAST | {"cfg_renorm_type": renorm, "negative_prompt": negative_prompt, "cfg_interval": (0.7, 1.0)}
    together = bagel.generate(PROMPTS, size=SIZES, seed=[5, 6, 7, 8], **options)
    for index, result in enumerate(together):
        alone = bagel.generate(PROMPTS[index], size=SIZES[index], seed=5 + index, **options)
        close(result.latents, alone.latents)
        assert result.image.size == alone.image.size == SIZES[index][::-1]


def test_each_prompt_of_a_batch_has_its_own_hyper_parameters(bagel):
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
    together = bagel.generate(
        PROMPTS, size=SIZES, seed=5, progress=lambda p: steps.append((p.step, p.total)), **options
    )
    for index, result in enumerate(together):
        own = {name: values[index] for name, values in options.items()}
        alone = bagel.generate(PROMPTS[index], size=SIZES[index], seed=5 + index, **own)
        close(result.latents, alone.latents)
        assert result.parameters == alone.parameters
    assert steps == [(n, 8) for n in range(1, 9)], "three share five steps, one has three of its own"


def test_thoughts_of_a_batch_are_those_of_each_alone(bagel):
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
    together = bagel.generate(PROMPTS, size=(32, 32), seed=5, progress=steps.append, **options)
    texts = [p.step for p in steps if p.stage == "text"]
    assert texts == sorted(set(texts)) and {p.total for p in steps if p.stage == "text"} == {15}
    assert texts[:12] == list(range(1, 13)), "11 steps of two texts, then those of another"
    assert [result.thought is not None for result in together] == options["think"]
    for index, result in enumerate(together):
        own = {name: value[index] if isinstance(value, list) else value for name, value in options.items()}
        alone = bagel.generate(PROMPTS[index], size=(32, 32), seed=5 + index, **own)
        assert result.thought == alone.thought and result.parameters == alone.parameters
        close(result.latents, alone.latents)


def test_more_than_eight_thoughts_are_decoded_in_parts(bagel, monkeypatch):
    batches = []
    tokens = Engine._tokens
    monkeypatch.setattr(Engine, "_tokens", lambda self, c, *rest: batches.append(len(c)) or tokens(self, c, *rest))
    prompts = [f"boat {number}" for number in range(9)]
    results = bagel.generate(prompts, size=(16, 16), seed=1, think=True, max_think_token_n=4, num_timesteps=2)
    assert batches == [8, 1] and all(result.thought for result in results)


def test_a_large_batch_is_drawn_in_parts_with_the_same_result(bagel, monkeypatch):
    prompts, steps = ["a", "b c", "d", "e"], []
    whole = bagel.generate(prompts, size=(32, 32), seed=1, **FAST)
    monkeypatch.setattr("bagel_rt.engine.MAX_ROWS", 40)
    monkeypatch.setattr("bagel_rt.runtime.context.MAX_ROWS", 4)
    parts = bagel.generate(prompts, size=(32, 32), seed=1, progress=lambda p: steps.append((p.step, p.total)), **FAST)
    for a, b in zip(whole, parts, strict=True):
        close(a.latents, b.latents)
    assert steps == [(n, 8) for n in range(1, 9)]

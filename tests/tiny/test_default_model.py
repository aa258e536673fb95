"""The embedded model: its files and a lower bound of its accuracy.

``bagel-rt eval`` measures the accuracy in minutes. The few examples here only detect a broken model.
"""

from collections import Counter

import numpy as np
import pytest
import torch

from bagel_rt import Bagel
from bagel_rt.checkpoint import DEFAULT_MODEL
from bagel_rt.tiny.claims import Claims, GroupClaim
from bagel_rt.tiny.evaluate import choose_problems, evaluate
from bagel_rt.tiny.judge import judge

FILES = {
    "ae.safetensors",
    "config.json",
    "ema.safetensors",
    "generation_config.json",
    "llm_config.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "vit_config.json",
    "vocab.json",
}


@pytest.fixture(scope="module")
def bagel():
    return Bagel.from_pretrained(device="cpu")


def test_embedded_model_has_official_files_within_12_megabytes():
    assert {path.name for path in DEFAULT_MODEL.iterdir()} == FILES
    assert sum(path.stat().st_size for path in DEFAULT_MODEL.iterdir()) <= 12_000_000


def test_generates_the_readme_prompt(bagel):
    claims = Claims((GroupClaim(1, "star", "red", "large"),), background="black")
    text = "a large red star on black"
    results = bagel.generate([text] * 4, seed=[0, 1, 2, 3])
    assert sum(judge(claims, result.image).correct for result in results) >= 3


def test_capital_letters_draw_the_same_image(bagel):
    lower, capital = (
        bagel.generate(text, seed=1, num_timesteps=20).image for text in ("a large red star.", "A Large Red Star.")
    )
    assert capital.tobytes() == lower.tobytes()
    assert judge(Claims((GroupClaim(1, "star", "red", "large"),)), capital).correct


# The measured numbers are 21 of 24, 12 of 14 and 40 of 40.
@pytest.mark.slow
@pytest.mark.parametrize("task, count, minimum", [("generate", 6, 17), ("edit", 2, 8), ("ask", 4, 36)])
def test_accuracy_on_held_out_examples(bagel, task, count, minimum):
    settings = {} if task == "ask" else {"num_timesteps": 25}
    trials = list(evaluate(bagel, choose_problems(count, 17, [task]), **settings))
    failures = Counter(failure for trial in trials for failure in trial.failures)
    assert sum(trial.correct for trial in trials) >= minimum, failures


@pytest.mark.slow
def test_kernels_match_reference_images(kernels):
    def generate(backend, device):
        model = Bagel.from_pretrained(device=device, dtype=torch.float32, backend=backend)
        result = model.generate("a large red star on black", seed=3, num_timesteps=3)
        return np.asarray(result.image).astype(int)

    assert np.abs(generate("triton", kernels) - generate("reference", "cpu")).mean() < 0.5

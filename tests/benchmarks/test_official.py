"""The official composition used as a baseline gives the same results as the runtime."""

import functools

import pytest
import torch

from bagel_rt import Cancelled, Progress
from bagel_rt.models.bagel.settings import TASKS
from benchmarks.official import OfficialInferencer, attend, guide

PROMPT = "a small red boat"
SHORT = {"seed": 3, "num_timesteps": 8}


@pytest.fixture(scope="module")
def official(bagel):
    return OfficialInferencer(bagel.model, bagel.tokenizer)


def close(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cfg_renorm_type": "channel", "cfg_renorm_min": 0.5},
        {"cfg_renorm_type": "text_channel", "cfg_interval": (0.0, 1.0), "timestep_shift": 1.0},
        {"cfg_img_scale": 1.0},
        {"cfg_text_scale": 1.0},
        {"think": True, "max_think_token_n": 8},
    ],
    ids=["defaults", "channel", "text_channel", "no image guidance", "no guidance", "think"],
)
def test_generate_matches_the_runtime(bagel, official, options):
    ours = bagel.generate(PROMPT, size=(32, 64), **SHORT, **options)
    theirs = official.generate(PROMPT, size=(32, 64), **SHORT, **options)
    close(theirs.latents, ours.latents)
    assert theirs.thought == ours.thought and theirs.image.size == ours.image.size
    assert theirs.parameters["cfg_interval"] == ours.parameters["cfg_interval"]


def test_edit_matches_the_runtime(bagel, official, photo):
    ours, theirs = (pipeline.edit(photo, "make it night", **SHORT) for pipeline in (bagel, official))
    close(theirs.latents, ours.latents)
    assert theirs.image.size == ours.image.size == (96, 64)


@pytest.mark.parametrize("think", [False, True], ids=["plain", "think"])
def test_chat_matches_the_runtime(bagel, official, photo, think):
    options = {"max_think_token_n": 16, "think": think}
    for images in ((), photo, [photo, photo]):
        assert official.chat("what is this?", images, **options) == bagel.chat("what is this?", images, **options)


def test_list_of_prompts_runs_sequentially(official):
    batch = official.generate(["a", "b"], size=(16, 16), **SHORT)
    single = official.generate("b", size=(16, 16), seed=SHORT["seed"] + 1, num_timesteps=8)
    assert torch.equal(batch[1].latents, single.latents) and len(batch) == 2


def test_runs_all_branches_of_the_official_code(official, photo, monkeypatch):
    counted = []
    forward = OfficialInferencer.forward
    monkeypatch.setattr(
        OfficialInferencer, "forward", lambda self, *a, **k: counted.append(k) or forward(self, *a, **k)
    )
    official.generate(PROMPT, size=(16, 16), seed=0, num_timesteps=3, cfg_interval=(0.0, 1.0))
    assert sum("append" not in options for options in counted) == 2 * 3
    counted.clear()
    official.generate(PROMPT, size=(16, 16), seed=0, num_timesteps=3, cfg_interval=(0.0, 0.0))
    assert sum("append" not in options for options in counted) == 2


def test_progress_is_reported_and_can_cancel(official):
    seen = []

    def stop(progress):
        seen.append(progress)
        if progress.step == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        official.generate(PROMPT, size=(16, 16), progress=stop, **SHORT)
    with pytest.raises(Cancelled):
        official.chat(PROMPT, progress=stop, max_think_token_n=9)
    assert seen == [Progress("image", n, 7) for n in (1, 2, 3)] + [Progress("text", n, 8) for n in (1, 2, 3)]


def test_layers_can_be_compiled(bagel, official):
    compiled = OfficialInferencer(
        bagel.model, bagel.tokenizer, functools.partial(torch.compile, backend="eager", fullgraph=True)
    )
    options = {"size": (16, 32), "seed": 0, "num_timesteps": 3}
    close(compiled.generate(PROMPT, **options).latents, official.generate(PROMPT, **options).latents)
    assert compiled.chat(PROMPT, max_think_token_n=6) == official.chat(PROMPT, max_think_token_n=6)


@pytest.mark.parametrize("n, m, causal", [(3, 3, False), (3, 3, True), (3, 7, True), (1, 5, True), (4, 9, False)])
def test_attend_matches_dense_attention(n, m, causal):
    q, k, v = (torch.randn(rows, heads, 4, dtype=torch.float64) for rows, heads in ((n, 4), (m, 2), (m, 2)))
    k_of_query, v_of_query = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k_of_query) / 2
    if causal:
        scores = scores.masked_fill(torch.arange(m) > torch.arange(n)[:, None] + m - n, float("-inf"))
    expected = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v_of_query)
    torch.testing.assert_close(attend(q, k, v, causal), expected)


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_guide_renormalizes_without_amplifying(task):
    settings = TASKS[task].image
    cond, no_text, no_img = torch.randn(3, 5, 8).unbind(0)
    guided = guide(cond, no_text, no_img, settings)
    if settings.cfg_renorm_type == "global":
        assert guided.norm() <= cond.norm() * (1 + 1e-5)
    torch.testing.assert_close(guide(cond, cond, cond, settings), cond)

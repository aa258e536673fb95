"""Previews in progress callbacks: computed on request only, without effect on the result."""

import gc

import denoising
import pytest
import torch
from conftest import CHECKPOINT, DEVICE
from recording import Recording, dispatch_ops

from bagel_rt import Bagel
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.settings import ImageSettings
from bagel_rt.runtime.context import Prefill

FAST = {"num_timesteps": 7, "cfg_interval": (0.7, 1.0), "seed": 3}  # three or more steps each with and without guidance


@pytest.fixture(scope="module")
def eager():
    return Bagel.from_pretrained(CHECKPOINT, device=DEVICE, dtype=torch.float32, graphs=False)


@pytest.fixture(params=["eager", "graphs"])
def runtime(request, eager, monkeypatch):
    """The model in eager mode or with captured steps; on a CPU a graph is emulated by a recording of calls."""
    if request.param == "eager":
        return eager
    bagel = Bagel(eager.model, eager.tokenizer)
    if DEVICE.type == "cpu":
        dispatch_ops(monkeypatch)
        bagel.engine.graphs.capture = Recording
    return bagel


class PreviewRecorder:
    """A progress callback that records every preview.

    Attributes:
        previews: (stage, index of the prompt) -> its previews.
        progress: every progress report.
    """

    def __init__(self):
        self.previews, self.progress = {}, []

    def __call__(self, progress):
        self.progress.append(progress)
        for index, preview in progress.preview().items():
            self.previews.setdefault((progress.stage, index), []).append(preview)


REQUESTS = {
    "image": lambda bagel, photo, **options: [bagel.generate("a red circle", size=(32, 48), **FAST, **options)],
    "edit": lambda bagel, photo, **options: [bagel.edit(photo, "make it night", **FAST, **options)],
    "batch with sizes and shifts per prompt": lambda bagel, photo, **options: bagel.generate(
        ["a", "b c"], size=[(32, 32), (48, 32)], timestep_shift=[1.0, 4.0], **FAST, **options
    ),
    "batch with step counts per prompt": lambda bagel, photo, **options: bagel.generate(
        ["a", "b c"], size=(32, 32), **FAST | {"num_timesteps": [4, 5]}, **options
    ),
}


@pytest.mark.parametrize("generate", REQUESTS.values(), ids=REQUESTS)
def test_last_preview_is_the_image_and_previews_do_not_change_it(runtime, eager, photo, generate):
    for _ in range(2):  # the second request replays every graph
        recorder = PreviewRecorder()
        results = generate(runtime, photo, progress=recorder)
        for index, (result, expected) in enumerate(zip(results, generate(eager, photo), strict=True)):
            assert torch.equal(result.latents, expected.latents) and result.image == expected.image
            previews = recorder.previews["image", index]
            assert len(previews) == result.parameters["num_timesteps"] - 1
            assert previews[-1] == result.image != previews[0]


def test_images_are_decoded_only_for_requested_previews(bagel, monkeypatch):
    decoded, decode = [], BagelModel.decode_image
    monkeypatch.setattr(BagelModel, "decode_image", lambda *args: decoded.append(args) or decode(*args))
    steps = []
    bagel.generate(["a", "b"], size=(32, 32), progress=steps.append, **FAST)
    assert len(steps) == FAST["num_timesteps"] - 1 and len(decoded) == 2  # the two results
    bagel.generate("a", size=(32, 32), progress=lambda step: step.step == 3 and step.preview(), **FAST)
    assert len(decoded) == 4


def test_preview_of_a_straight_path_is_its_end(bagel):
    settings = ImageSettings(num_timesteps=5)
    with torch.inference_mode():
        prefill = Prefill(bagel.model, bagel.cache)
        contexts = bagel.model.open_contexts(prefill, bagel.tokenizer, [], seed=1)
        contexts.add_text("a small red boat")
        prefill.run()
        noise, end = (contexts.noise.draw(24, bagel.model.config.latent_features) for _ in range(2))
        denoiser = denoising.start(bagel.model, bagel.cache, contexts.branches, noise, settings, (4, 6))
        for step, t in enumerate([*denoiser.guidance.timesteps[1:, 0], 0.0]):
            denoiser.step(step)
            denoiser.state.copy_((1 - t) * end + t * noise)
            torch.testing.assert_close(denoiser.estimates()[0], end, rtol=1e-5, atol=1e-5)


def test_text_previews_are_growing_prefixes(bagel, photo):
    recorder = PreviewRecorder()
    text = bagel.chat("what?", [photo], max_think_token_n=12, progress=recorder)
    previews = recorder.previews["text", 0]
    assert len(previews) == 11 and text.startswith(previews[-1]) and previews[-1]
    assert all(longer.startswith(shorter) for shorter, longer in zip(previews, previews[1:], strict=False))


def test_previews_are_keyed_by_prompt_index(bagel):
    recorder, think = PreviewRecorder(), [False, True, True]
    options = {"size": (32, 32), "seed": 1, "num_timesteps": 3, "max_think_token_n": 6, "think": think}
    results = bagel.generate(["a", "b", "c"], progress=recorder, **options)
    assert recorder.previews.keys() == {("text", 1), ("text", 2), ("image", 0), ("image", 1), ("image", 2)}
    for index in (1, 2):
        assert results[index].thought.startswith(recorder.previews["text", index][-1])


def test_late_preview_raises_and_holds_no_slots(bagel):
    recorder = PreviewRecorder()
    bagel.generate("a", size=(32, 32), progress=recorder, **FAST)
    gc.collect()
    assert bagel.cache.free_slots == bagel.cache.slots
    with pytest.raises(RuntimeError, match="within the progress callback"):
        recorder.progress[-1].preview()

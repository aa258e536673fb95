"""What a progress callback can see of unfinished work: it costs nothing unseen, and seeing changes nothing."""

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

FAST = {"num_timesteps": 7, "cfg_interval": (0.7, 1.0), "seed": 3}  # steps of both kinds, each more than twice


@pytest.fixture(scope="module")
def eager():
    return Bagel.from_pretrained(CHECKPOINT, device=DEVICE, dtype=torch.float32, graphs=False)


@pytest.fixture(params=["launch by launch", "as graphs"])
def runtime(request, eager, monkeypatch):
    """The model, its steps run as they are, or captured and replayed (on a CPU a graph is a recording of calls)."""
    if request.param == "launch by launch":
        return eager
    bagel = Bagel(eager.model, eager.tokenizer)
    if DEVICE.type == "cpu":
        dispatch_ops(monkeypatch)
        bagel.engine.graphs.capture = Recording
    return bagel


class Watch:
    """A progress callback that sees everything: (stage, number of the prompt) -> its previews."""

    def __init__(self):
        self.seen, self.progress = {}, []

    def __call__(self, progress):
        self.progress.append(progress)
        for number, made in progress.preview().items():
            self.seen.setdefault((progress.stage, number), []).append(made)


REQUESTS = {
    "a picture": lambda bagel, photo, **options: [bagel.generate("a red circle", size=(32, 48), **FAST, **options)],
    "an edit": lambda bagel, photo, **options: [bagel.edit(photo, "make it night", **FAST, **options)],
    "a batch of other sizes and shifts": lambda bagel, photo, **options: bagel.generate(
        ["a", "b c"], size=[(32, 32), (48, 32)], timestep_shift=[1.0, 4.0], **FAST, **options
    ),
    "a batch of other lengths": lambda bagel, photo, **options: bagel.generate(
        ["a", "b c"], size=(32, 32), **FAST | {"num_timesteps": [4, 5]}, **options
    ),
}


@pytest.mark.parametrize("draw", REQUESTS.values(), ids=REQUESTS)
def test_the_last_preview_is_the_picture_and_seeing_it_changes_nothing(runtime, eager, photo, draw):
    for _ in range(2):  # the second time everything is replayed
        watch = Watch()
        results = draw(runtime, photo, progress=watch)
        for number, (result, unseen) in enumerate(zip(results, draw(eager, photo), strict=True)):
            assert torch.equal(result.latents, unseen.latents) and result.image == unseen.image
            previews = watch.seen["image", number]
            assert len(previews) == result.parameters["num_timesteps"] - 1
            assert previews[-1] == result.image != previews[0]


def test_what_is_not_looked_at_is_not_decoded(bagel, monkeypatch):
    decoded, decode = [], BagelModel.decode_image
    monkeypatch.setattr(BagelModel, "decode_image", lambda *given: decoded.append(given) or decode(*given))
    steps = []
    bagel.generate(["a", "b"], size=(32, 32), progress=steps.append, **FAST)
    assert len(steps) == FAST["num_timesteps"] - 1 and len(decoded) == 2  # the two pictures
    bagel.generate("a", size=(32, 32), progress=lambda step: step.step == 3 and step.preview(), **FAST)
    assert len(decoded) == 4


def test_on_a_straight_path_every_preview_is_the_end(bagel):
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


def test_texts_are_seen_as_they_grow(bagel, photo):
    watch = Watch()
    text = bagel.chat("what?", [photo], max_think_token_n=12, progress=watch)
    seen = watch.seen["text", 0]
    assert len(seen) == 11 and text.startswith(seen[-1]) and seen[-1]
    assert all(longer.startswith(shorter) for shorter, longer in zip(seen, seen[1:], strict=False))


def test_a_preview_says_which_prompt_it_is_of(bagel):
    watch, thinks = Watch(), [False, True, True]
    options = {"size": (32, 32), "seed": 1, "num_timesteps": 3, "max_think_token_n": 6, "think": thinks}
    results = bagel.generate(["a", "b", "c"], progress=watch, **options)
    assert watch.seen.keys() == {("text", 1), ("text", 2), ("image", 0), ("image", 1), ("image", 2)}
    for number in (1, 2):
        assert results[number].thought.startswith(watch.seen["text", number][-1])


def test_what_keeps_a_preview_keeps_no_slots_and_is_told_that_it_is_late(bagel):
    watch = Watch()
    bagel.generate("a", size=(32, 32), progress=watch, **FAST)
    gc.collect()
    assert bagel.cache.free_slots == bagel.cache.slots
    with pytest.raises(RuntimeError, match="within the progress callback"):
        watch.progress[-1].preview()

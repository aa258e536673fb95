"""A model that computes NaN or infinity raises the same error on every path, and works again afterwards."""

import contextlib
import threading

import pytest
import torch
from conftest import CHECKPOINT
from PIL import Image

from bagel_rt import Bagel, NonFiniteError
from bagel_rt.model_thread import Job, ModelThread
from bagel_rt.models.bagel.settings import GENERATE
from bagel_rt.request import ImageRequest

FAST = {"num_timesteps": 3, "max_think_token_n": 4}
SIZE = (32, 32)
PHOTO = Image.new("RGB", (32, 32), "red")
TEXT_CALLS = {
    "chat": lambda b, **o: b.chat("a", **o),
    "chat with an image": lambda b, **o: b.chat("a", PHOTO, **o),
    "chat of one token": lambda b, **o: b.chat("a", **o | {"max_think_token_n": 1}),
    "stream": lambda b, **o: next(b.stream("a", **o), None),
    "thought before an image": lambda b, **o: b.generate("a", size=SIZE, think=True, num_timesteps=3, **o),
    "thoughts of a batch": lambda b, **o: b.generate(["a", "b"], size=SIZE, think=True, num_timesteps=3, **o),
    "thought before an edit": lambda b, **o: b.edit(PHOTO, "a", think=True, num_timesteps=3, **o),
    "interleave": lambda b, **o: b.interleave(["a"], size=SIZE, **o),
}


@pytest.fixture(scope="module")
def fresh():
    return Bagel.from_pretrained(CHECKPOINT, device="cpu")


@contextlib.contextmanager
def poisoned(tensor, value):
    """The first row of a weight set to a value."""
    with torch.inference_mode():
        saved = tensor[0].clone()
        tensor[0] = value
    try:
        yield
    finally:
        with torch.inference_mode():
            tensor[0] = saved


@pytest.mark.parametrize("do_sample", [False, True], ids=["most likely", "sampled"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("call", TEXT_CALLS.values(), ids=TEXT_CALLS)
def test_text_of_logits_that_are_not_finite_is_an_error(fresh, call, value, do_sample):
    with poisoned(fresh.model.weights.lm_head, value), pytest.raises(NonFiniteError, match="the logits .* NaN or inf"):
        call(fresh, max_think_token_n=4, do_sample=do_sample)


def test_image_with_nan_is_the_same_error(fresh):
    with poisoned(fresh.model.weights.vae2llm.weight, float("nan")), pytest.raises(NonFiniteError, match="an image"):
        fresh.generate("a", size=SIZE, num_timesteps=3)


def test_model_works_after_the_error(fresh, bagel):
    slots = fresh.cache.slots - fresh.cache.free_slots
    with poisoned(fresh.model.weights.layers[0].qkv.und, float("nan")), pytest.raises(NonFiniteError):
        fresh.chat("a", max_think_token_n=4)
    assert fresh.cache.slots - fresh.cache.free_slots == slots
    assert fresh.chat("a", max_think_token_n=4) == bagel.chat("a", max_think_token_n=4)


def test_replayed_step_finds_logits_that_are_not_finite(fresh):
    class Replay:
        def __init__(self, work):
            self.replay = work

    fresh.engine.graphs.capture = Replay
    try:
        text = fresh.chat("a", max_think_token_n=6)  # its third step and all later ones are replayed
        with poisoned(fresh.model.weights.lm_head, float("nan")), pytest.raises(NonFiniteError):
            fresh.chat("a", max_think_token_n=6)
        assert fresh.chat("a", max_think_token_n=6) == text
    finally:
        fresh.engine.graphs.capture = None
        fresh.release_memory()


class ResultJob(Job):
    """A job that keeps its outcome."""

    def __init__(self, request):
        super().__init__(batch_key="same")
        self.request, self.done, self.outcome = request, threading.Event(), None

    def deliver(self, outcome):
        self.outcome = outcome
        self.done.set()


def test_bad_request_of_a_batch_fails_alone(fresh):
    text = GENERATE.text.__class__(max_think_token_n=4)
    image = GENERATE.image.__class__(num_timesteps=3)
    jobs = [
        ResultJob(ImageRequest(inputs=[prompt], seed=1, text=text, system="think", size=SIZE, image=image))
        for prompt in ("a", "~", "b")
    ]
    [*_, token] = fresh.tokenizer.encode("~")
    embedding = fresh.model.weights.embed_tokens[token : token + 1]
    with poisoned(embedding, float("nan")):
        thread = ModelThread(
            fresh, lambda jobs, check: fresh.engine.run_images([job.request for job in jobs]), lambda e, n: e, 8, 8
        )
        try:
            thread.submit(jobs)
            assert all(job.done.wait(60) for job in jobs)
        finally:
            thread.stop(30)
    assert isinstance(jobs[1].outcome, NonFiniteError)
    assert all(jobs[index].outcome.image.size == SIZE for index in (0, 2))

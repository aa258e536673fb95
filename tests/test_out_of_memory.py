"""Out of memory: caches are dropped and the request is retried once; the final error gives advice and frees all."""

import gc

import pytest
import torch

from bagel_rt.models.bagel.transformer import Transformer

FAST = {"num_timesteps": 5}


@pytest.mark.parametrize(
    "task, call",
    [
        ("generate", lambda bagel, photo: bagel.generate(["a", "b"], size=(128, 256), seed=1, **FAST)),
        ("edit", lambda bagel, photo: bagel.edit([photo, photo], "night", seed=1, think=True, **FAST)),
        ("chat", lambda bagel, photo: bagel.chat("what?", photo, max_think_token_n=2000)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_out_of_memory_error_gives_advice_and_frees_everything(bagel, photo, monkeypatch, task, call):
    gc.collect()
    used = bagel.cache.slots - bagel.cache.free_slots
    bagel.generate("a", size=(32, 32), seed=1, **FAST)
    full = bagel.cache.allocate(bagel.cache.free_slots)  # the next request must grow the cache
    with monkeypatch.context() as patch:
        patch.setattr(type(bagel.cache), "_grow", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
        with pytest.raises(torch.OutOfMemoryError, match="(?s)no memory.*the request needs about .* GB in total"):
            call(bagel, photo)
    bagel.cache.release(full, bagel.cache.slots - full)
    assert bagel.cache.slots - bagel.cache.free_slots == used and bagel.engine.graphs.kept == 0
    call(bagel, photo)


class FailingForward:
    """Patches the forward pass to raise OutOfMemoryError at the given calls, counted from 1."""

    def __init__(self, monkeypatch, *fails):
        self.calls, self._fails, self._forward = 0, fails, Transformer.forward
        monkeypatch.setattr(Transformer, "forward", lambda *args, **options: self(*args, **options))

    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls in self._fails:
            raise torch.OutOfMemoryError("no memory")
        return self._forward(*args, **options)


REQUESTS = {
    "generate": lambda bagel, photo: bagel.generate("a", size=(32, 32), seed=1, **FAST).latents.tolist(),
    "edit": lambda bagel, photo: bagel.edit(photo, "b", seed=1, **FAST).latents.tolist(),
    "think": lambda bagel, photo: bagel.generate(
        ["a", "b"], size=(32, 32), seed=1, think=True, max_think_token_n=5, **FAST
    )[1].latents.tolist(),
    "chat": lambda bagel, photo: bagel.chat("what?", photo, max_think_token_n=8),
    "interleave": lambda bagel, photo: bagel.interleave(["what?", photo], seed=1, max_think_token_n=5, **FAST),
}


@pytest.mark.parametrize("call", REQUESTS.values(), ids=REQUESTS)
def test_out_of_memory_drops_caches_and_retries_once(bagel, photo, monkeypatch, call):
    expected = call(bagel, photo)
    assert bagel.engine.graphs.kept and bagel.cache.slots
    gc.collect()
    forward = FailingForward(monkeypatch, 2)  # the first token or the first step
    assert call(bagel, photo) == expected
    assert forward.calls > 2
    bagel.release_memory()
    assert bagel.cache.slots == 0, "the first attempt holds no slots"
    forward.calls = 0
    with pytest.raises(torch.OutOfMemoryError, match="the request needs about"):
        call(bagel, photo)
    assert forward.calls == 2 and bagel.cache.free_slots == bagel.cache.slots, "no retry without caches to drop"


def test_out_of_memory_ends_a_started_stream_and_frees_everything(bagel, photo, monkeypatch):
    gc.collect()
    pieces = bagel.stream("what?", photo, max_think_token_n=30)
    next(pieces)
    forward = FailingForward(monkeypatch, 3)
    with pytest.raises(torch.OutOfMemoryError, match="the request needs about") as caught:
        list(pieces)
    assert forward.calls == 3 and caught.tb is not None
    assert bagel.cache.free_slots == bagel.cache.slots and bagel.engine.graphs.kept == 0

"""A model is used by one thread at a time; other calls raise an error that names the remedies."""

import threading

import pytest
from conftest import CHECKPOINT

from bagel_rt import Bagel

OPTIONS = {"size": (32, 32), "num_timesteps": 4, "seed": 1}


@pytest.fixture(scope="module")
def fresh():
    return Bagel.from_pretrained(CHECKPOINT, device="cpu")


@pytest.fixture
def elsewhere(fresh):
    """A request that runs in another thread and waits in its first step, and its result."""
    begun, go, results = threading.Event(), threading.Event(), []

    def progress(step):
        begun.set()
        assert go.wait(60)

    def run():
        results.append(fresh.generate("a", progress=progress, **OPTIONS))

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(60)

    def finish():
        go.set()
        thread.join()
        return results[0]

    yield finish
    finish()


CALLS = {
    "generate": lambda b: b.generate("a", **OPTIONS),
    "chat": lambda b: b.chat("a", max_think_token_n=4),
    "interleave": lambda b: b.interleave(["a"], size=(32, 32), max_think_token_n=4),
    "release_memory": lambda b: b.release_memory(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_rejects_a_call_while_another_thread_runs_a_request(fresh, elsewhere, call):
    with pytest.raises(RuntimeError, match="one thread at a time.*Bagel per thread, hold a lock .* server"):
        call(fresh)


def test_rejected_call_does_not_disturb_the_running_request(fresh, elsewhere):
    with pytest.raises(RuntimeError):
        fresh.chat("a", max_think_token_n=4)
    result = elsewhere()
    assert (result.latents == fresh.generate("a", **OPTIONS).latents).all()


def test_threads_may_take_turns(fresh):
    results = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: results.append(fresh.chat("a", max_think_token_n=4)))
        thread.start()
        thread.join()
    assert results[0] == results[1] == fresh.chat("a", max_think_token_n=4)


def test_open_stream_allows_other_requests_of_its_thread(fresh):
    whole = fresh.chat("a", max_think_token_n=12)
    stream = fresh.stream("a", max_think_token_n=12)
    pieces = [next(stream)]
    fresh.generate("a", **OPTIONS)
    assert "".join([*pieces, *stream]) == whole


def test_progress_callback_may_start_another_request(fresh):
    texts = []
    fresh.generate("a", progress=lambda step: texts.append(fresh.chat("a", max_think_token_n=4)), **OPTIONS)
    assert len(set(texts)) == 1


def test_models_of_two_threads_run_at_once(fresh, elsewhere):
    other = Bagel.from_pretrained(CHECKPOINT, device="cpu")
    assert other.chat("a", max_think_token_n=4)

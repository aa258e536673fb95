"""The model's thread without a model: batches, ends of every kind, and what is kept of them."""

import asyncio
import gc
import logging
import threading
import time
import weakref
from contextlib import aclosing
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import torch  # noqa: E402

from bagel_rt.errors import Cancelled  # noqa: E402
from bagel_rt.model_thread import Busy, DeadlineExceeded, ModelThread, Stopping  # noqa: E402
from bagel_rt.models.bagel.settings import TextSettings  # noqa: E402
from bagel_rt.request import Progress, Request  # noqa: E402
from bagel_rt.serve.app import _cancel_on_disconnect  # noqa: E402
from bagel_rt.serve.worker import AsyncJob, Completion, Failed, start_worker  # noqa: E402


class Model:
    """Stands in for a model: draws a prompt by saying it, once it is let go; writes the letters of a prompt.

    Attributes:
        go: set to let it draw.
        drawn: the prompts of every batch.
    """

    def __init__(self):
        self.go, self.drawn, self.released = threading.Event(), [], 0
        self.engine, self.model = self, SimpleNamespace(device=torch.device("cpu"))
        self.go.set()

    def run_images(self, requests, progress):
        prompts = [request.inputs[0] for request in requests]
        self.drawn.append(prompts)
        while not self.go.wait(0.005):
            progress(Progress("image", 1, 2))
        for prompt in prompts:
            if prompt == "poison":
                raise FloatingPointError("NaN")
        if "huge" in prompts or (len(prompts) > 1 and "large" in prompts):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prompts

    def run_answer(self, request, progress):
        for number, letter in enumerate(request.inputs[0], start=1):
            progress(Progress("text", number, 9))
            yield letter
            self.go.wait(30)

    def release_memory(self):
        self.released += 1


def request(prompt):
    return Request([prompt], (16, 16), 0, None, TextSettings(max_think_token_n=5))


def image_job(prompt, seconds=60, batch_key="same"):
    return AsyncJob(request(prompt), "image", time.monotonic() + seconds, batch_key)


async def result(job):
    async with aclosing(job.listen()) as events:
        return [value async for _, value in events][-1]


async def ends(*jobs):
    """What came of jobs: results and exceptions."""
    return await asyncio.gather(*map(result, jobs), return_exceptions=True)


async def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def run(model):
    """Runs a test's coroutine, which is given a worker of a queue of three and batches of two."""

    def run(test, **options):
        async def whole():
            worker = start_worker(model, **({"queue": 3, "batch": 2} | options))
            try:
                await asyncio.wait_for(test(worker), 120)
            finally:
                model.go.set()
                await asyncio.to_thread(worker.stop, 30)
            assert not worker._thread.is_alive() and not worker.running and not worker.waiting

        asyncio.run(whole())

    return run


def test_jobs_of_equal_size_are_drawn_together_and_others_keep_their_turn(run, model):
    async def test(worker):
        model.go.clear()
        jobs = [image_job("a"), image_job("b"), image_job("c", batch_key="other"), image_job("d")]
        worker.submit(jobs[:1])
        await until(lambda: worker.running == 1)
        worker.submit(jobs[1:])
        model.go.set()
        assert await ends(*jobs) == ["a", "b", "c", "d"]
        assert model.drawn == [["a"], ["b", "d"], ["c"]]

    run(test)


def test_jobs_that_go_with_nobody_are_drawn_alone(run, model):
    async def test(worker):
        jobs = [image_job(name, batch_key=None) for name in "abc"]
        worker.submit(jobs)
        assert await ends(*jobs) == ["a", "b", "c"]
        assert model.drawn == [["a"], ["b"], ["c"]]

    run(test)


def test_a_full_queue_takes_none_of_a_request_and_an_empty_one_all(run, model):
    async def test(worker):
        model.go.clear()
        first = image_job("first")
        worker.submit([first])
        await until(lambda: worker.running == 1)
        many = [image_job(str(number)) for number in range(5)]
        worker.submit(many)  # more than the queue is long, but it will never be emptier
        with pytest.raises(Busy):
            worker.submit([image_job("late")])
        assert worker.waiting == 5
        for job in many[:3]:
            job.cancel()
        worker.submit([last := image_job("last")])  # those that nobody waits for make room
        assert worker.waiting == 3
        model.go.set()
        assert await ends(first, *many[3:], last) == ["first", "3", "4", "last"]

    run(test)


def test_what_nobody_waits_for_is_not_drawn(run, model):
    async def test(worker):
        model.go.clear()
        first, gone, late = image_job("first"), image_job("gone"), image_job("late", seconds=0.05)
        worker.submit([first])
        await until(lambda: worker.running == 1)
        worker.submit([gone, late])
        gone.cancel()
        assert isinstance((await ends(late))[0], DeadlineExceeded)
        model.go.set()
        assert await ends(first) == ["first"] and isinstance((await ends(gone))[0], Cancelled)
        assert model.drawn == [["first"]]

    run(test)


def test_a_batch_goes_on_for_those_that_stay_and_ends_when_all_have_left(run, model):
    async def test(worker):
        model.go.clear()
        stay, leave = image_job("stay"), image_job("leave")
        worker.submit([stay, leave])
        await until(lambda: worker.running == 2)
        leave.cancel()
        assert isinstance((await ends(leave))[0], Cancelled)
        assert worker.running == 2
        stay.cancel()
        await until(lambda: worker.running == 0)

    run(test)


def test_a_job_that_is_late_while_it_runs_ends(run, model):
    async def test(worker):
        model.go.clear()
        worker.submit([job := image_job("slow", seconds=0.05)])
        assert isinstance((await ends(job))[0], DeadlineExceeded)
        await until(lambda: worker.running == 0)

    run(test)


def test_one_that_fails_does_not_spoil_its_batch(run, model):
    async def test(worker):
        jobs = [image_job("good"), image_job("poison")]
        worker.submit(jobs)
        good, bad = await ends(*jobs)
        assert good == "good" and isinstance(bad, Failed) and not bad.memory and len(bad.name) == 12
        assert model.drawn == [["good", "poison"], ["good"], ["poison"]]

    run(test)


def test_a_batch_beyond_the_memory_is_drawn_one_by_one(run, model):
    async def test(worker):
        jobs = [image_job("large"), image_job("small")]
        worker.submit(jobs)
        assert await ends(*jobs) == ["large", "small"]
        worker.submit([huge := image_job("huge")])
        [failed] = await ends(huge)
        assert isinstance(failed, Failed) and failed.memory
        assert model.released == 2

    run(test)


def test_pieces_that_wait_come_as_one(run, model):
    async def test(worker):
        job = AsyncJob(request("word"), "text", time.monotonic() + 60)
        worker.submit([job])
        await until(lambda: job.ended and worker.running == 0)
        events = [event async for event in job.listen()]
        assert events == [("text", "word"), ("result", Completion([], 4, True))]

    run(test)


def test_pieces_come_as_they_are_written(run, model):
    async def test(worker):
        model.go.clear()
        worker.submit([job := AsyncJob(request("no"), "text", time.monotonic() + 60)])
        async with aclosing(job.listen()) as events:
            assert await anext(events) == ("text", "n")
            model.go.set()
            assert [event async for event in events] == [("text", "o"), ("result", Completion([], 2, False))]

    run(test)


def test_silence_is_told(run, model):
    async def test(worker):
        model.go.clear()
        worker.submit([job := AsyncJob(request("no"), "text", time.monotonic() + 60)])
        async with aclosing(job.listen(silence=0.02)) as events:
            assert [await anext(events) for _ in range(3)] == [("text", "n"), ("silence", None), ("silence", None)]
            model.go.set()
            rest = [event async for event in events if event[0] != "silence"]
            assert rest == [("text", "o"), ("result", Completion([], 2, False))]

    run(test)


def test_a_connection_that_fails_ends_its_jobs(run, model):
    async def fail():
        raise OSError("gone")

    async def test(worker):
        model.go.clear()
        worker.submit([job := image_job("slow")])
        async with _cancel_on_disconnect(SimpleNamespace(receive=fail), [job]):
            assert [type(end) for end in await ends(job)] == [Cancelled]
        await until(lambda: worker.running == 0)

    run(test)


def test_whoever_stops_listening_has_cancelled(run, model):
    async def test(worker):
        model.go.clear()
        worker.submit([job := AsyncJob(request("word"), "text", time.monotonic() + 60)])
        async with aclosing(job.listen()) as events:
            await anext(events)
        model.go.set()
        await until(lambda: worker.running == 0)
        assert job.ended

    run(test)


def test_at_the_end_jobs_have_their_grace_and_then_fail(run, model):
    async def test(worker):
        model.go.clear()
        jobs = [image_job("runs", batch_key=None), image_job("waits", batch_key=None)]
        worker.submit(jobs)
        await until(lambda: worker.running == 1)
        stopping = asyncio.create_task(asyncio.to_thread(worker.stop, 0.05))
        assert [type(end) for end in await ends(*jobs)] == [Stopping, Stopping]
        await stopping
        assert not worker._thread.is_alive()
        with pytest.raises(Stopping):
            worker.submit([image_job("after")])

    run(test)


def test_at_the_end_jobs_that_can_be_done_are_done(run, model):
    async def test(worker):
        jobs = [image_job(name, batch_key=None) for name in "abc"]
        worker.submit(jobs)
        await asyncio.to_thread(worker.stop, 30)
        assert await ends(*jobs) == ["a", "b", "c"]

    run(test)


def test_a_model_that_is_stuck_in_a_step_does_not_keep_its_clients(run, model):
    stuck = threading.Event()
    model.run_images = lambda requests, progress: stuck.wait(60)

    async def test(worker):
        worker.submit([job := image_job("stuck")])
        await until(lambda: worker.running == 1)
        await asyncio.to_thread(worker.stop, 0.05)
        assert isinstance((await ends(job))[0], Stopping)
        stuck.set()

    run(test)


def test_a_lost_device_ends_all_and_is_told(run, model, monkeypatch):
    def lost(worker):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ModelThread, "_check_device", lost)

    async def test(worker):
        jobs = [image_job("poison", batch_key=None), image_job("waits", batch_key=None)]
        worker.submit(jobs)
        assert [type(end) for end in await ends(*jobs)] == [Stopping, Stopping]
        await until(lambda: worker.failure is not None)
        with pytest.raises(Stopping):
            worker.submit([image_job("after")])

    run(test)


@pytest.mark.parametrize("prompt", ["poison", "huge", "fine"])
def test_nothing_of_a_job_outlives_it(run, model, monkeypatch, prompt):
    monkeypatch.setattr(logging.getLogger("bagel_rt.serve"), "disabled", True)  # pytest keeps what is logged
    kept, draw = [], model.run_images

    class Tensor:
        pass

    def drawing(requests, progress):
        tensor = Tensor()
        kept.append(weakref.ref(tensor))
        return draw(requests, progress)

    model.run_images = drawing

    async def test(worker):
        gc.collect()
        gc.disable()
        try:
            job = image_job(prompt)
            kept.append(weakref.ref(job))
            worker.submit([job])
            try:
                await result(job)
            except Failed:
                pass
            await until(lambda: worker.running == 0)
            del job
            await until(lambda: all(one() is None for one in kept))
        finally:
            gc.enable()

    run(test)

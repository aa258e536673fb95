"""The model thread and its jobs with a fake model: batches, deadlines, failures, shutdown, memory."""

import asyncio
import gc
import logging
import threading
import time
import weakref
from contextlib import aclosing, suppress
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import torch

from bagel_rt.errors import Cancelled
from bagel_rt.model_thread import Busy, DeadlineExceeded, ModelThread, Stopping
from bagel_rt.models.bagel.settings import TASKS, TextSettings
from bagel_rt.request import ImageRequest, ImageResult, Progress, Request
from bagel_rt.serve.app import _cancel_on_disconnect
from bagel_rt.serve.worker import AsyncJob, Completion, Failed, start_worker


class Model:
    """A fake model: an image is its prompt, once ``go`` is set; a text is the letters of its prompt.

    Attributes:
        go: set to let it run.
        drawn: prompts of every batch.
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
        return [ImageResult(prompt, 0, {}, torch.zeros(0)) for prompt in prompts]

    def run_answer(self, request, progress):
        for number, letter in enumerate(request.inputs[0], start=1):
            progress(Progress("text", number, 9))
            yield letter
            self.go.wait(30)

    def release_memory(self):
        self.released += 1


def request(prompt):
    return Request(inputs=[prompt], seed=0, text=TextSettings(max_think_token_n=5))


def image_job(prompt, seconds=60, batch_key="same"):
    task = TASKS["generate"]
    image = ImageRequest(inputs=[prompt], seed=0, text=task.text, size=(16, 16), image=task.image)
    return AsyncJob(image, time.monotonic() + seconds, batch_key)


async def ends(*jobs):
    """Images and exceptions of jobs."""
    outcomes = await asyncio.gather(*(job.finish() for job in jobs), return_exceptions=True)
    return [outcome.image if isinstance(outcome, ImageResult) else outcome for outcome in outcomes]


async def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def run(model):
    """Runs a test's coroutine with a worker that has a queue of three and batches of two."""

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


def test_equal_keys_share_a_batch_and_others_keep_their_order(run, model):
    async def test(worker):
        model.go.clear()
        jobs = [image_job("a"), image_job("b"), image_job("c", batch_key="other"), image_job("d")]
        worker.submit(jobs[:1])
        await wait_until(lambda: worker.running == 1)
        worker.submit(jobs[1:])
        model.go.set()
        assert await ends(*jobs) == ["a", "b", "c", "d"]
        assert model.drawn == [["a"], ["b", "d"], ["c"]]

    run(test)


def test_jobs_without_a_key_run_alone(run, model):
    async def test(worker):
        jobs = [image_job(name, batch_key=None) for name in "abc"]
        worker.submit(jobs)
        assert await ends(*jobs) == ["a", "b", "c"]
        assert model.drawn == [["a"], ["b"], ["c"]]

    run(test)


def test_full_queue_takes_no_job_and_an_empty_one_any_number(run, model):
    async def test(worker):
        model.go.clear()
        first = image_job("first")
        worker.submit([first])
        await wait_until(lambda: worker.running == 1)
        many = [image_job(str(number)) for number in range(5)]
        worker.submit(many)  # more than the limit, but the queue is empty
        with pytest.raises(Busy):
            worker.submit([image_job("late")])
        assert worker.waiting == 5
        for job in many[:3]:
            job.cancel()
        worker.submit([last := image_job("last")])  # cancelled jobs make room
        assert worker.waiting == 3
        model.go.set()
        assert await ends(first, *many[3:], last) == ["first", "3", "4", "last"]

    run(test)


def test_ended_jobs_never_run(run, model):
    async def test(worker):
        model.go.clear()
        first, gone, late = image_job("first"), image_job("gone"), image_job("late", seconds=0.05)
        worker.submit([first])
        await wait_until(lambda: worker.running == 1)
        worker.submit([gone, late])
        gone.cancel()
        assert isinstance((await ends(late))[0], DeadlineExceeded)
        model.go.set()
        assert await ends(first) == ["first"] and isinstance((await ends(gone))[0], Cancelled)
        assert model.drawn == [["first"]]

    run(test)


def test_batch_runs_until_all_its_jobs_are_cancelled(run, model):
    async def test(worker):
        model.go.clear()
        stay, leave = image_job("stay"), image_job("leave")
        worker.submit([stay, leave])
        await wait_until(lambda: worker.running == 2)
        leave.cancel()
        assert isinstance((await ends(leave))[0], Cancelled)
        assert worker.running == 2
        stay.cancel()
        await wait_until(lambda: worker.running == 0)

    run(test)


def test_deadline_ends_a_running_job(run, model):
    async def test(worker):
        model.go.clear()
        worker.submit([job := image_job("slow", seconds=0.05)])
        assert isinstance((await ends(job))[0], DeadlineExceeded)
        await wait_until(lambda: worker.running == 0)

    run(test)


def test_failing_job_does_not_fail_its_batch(run, model):
    async def test(worker):
        jobs = [image_job("good"), image_job("poison")]
        worker.submit(jobs)
        good, bad = await ends(*jobs)
        assert good == "good" and isinstance(bad, Failed) and not bad.memory and len(bad.name) == 12
        assert model.drawn == [["good", "poison"], ["good"], ["poison"]]

    run(test)


def test_out_of_memory_batch_runs_one_by_one(run, model):
    async def test(worker):
        jobs = [image_job("large"), image_job("small")]
        worker.submit(jobs)
        assert await ends(*jobs) == ["large", "small"]
        worker.submit([huge := image_job("huge")])
        [failed] = await ends(huge)
        assert isinstance(failed, Failed) and failed.memory
        assert model.released == 2

    run(test)


def test_waiting_pieces_are_joined(run, model):
    async def test(worker):
        job = AsyncJob(request("word"), time.monotonic() + 60)
        worker.submit([job])
        await wait_until(lambda: job.ended and worker.running == 0)
        assert [piece async for piece in job.listen()] == ["word"]
        assert job.result == Completion([], 4, True)

    run(test)


def test_pieces_arrive_as_generated(run, model):
    async def test(worker):
        model.go.clear()
        worker.submit([job := AsyncJob(request("no"), time.monotonic() + 60)])
        async with aclosing(job.listen()) as pieces:
            assert await anext(pieces) == "n"
            model.go.set()
            assert [piece async for piece in pieces] == ["o"]
        assert job.result == Completion([], 2, False)

    run(test)


def test_silence_is_reported(run, model):
    async def test(worker):
        model.go.clear()
        worker.submit([job := AsyncJob(request("no"), time.monotonic() + 60)])
        async with aclosing(job.listen(silence=0.02)) as pieces:
            assert [await anext(pieces) for _ in range(3)] == ["n", None, None]
            model.go.set()
            assert [piece async for piece in pieces if piece is not None] == ["o"]

    run(test)


def test_broken_connection_cancels_its_jobs(run, model):
    async def fail():
        raise OSError("gone")

    async def test(worker):
        model.go.clear()
        worker.submit([job := image_job("slow")])
        async with _cancel_on_disconnect(SimpleNamespace(receive=fail), [job]):
            assert [type(end) for end in await ends(job)] == [Cancelled]
        await wait_until(lambda: worker.running == 0)

    run(test)


def test_closing_the_listener_cancels(run, model):
    async def test(worker):
        model.go.clear()
        worker.submit([job := AsyncJob(request("word"), time.monotonic() + 60)])
        async with aclosing(job.listen()) as pieces:
            await anext(pieces)
        model.go.set()
        await wait_until(lambda: worker.running == 0)
        assert job.ended

    run(test)


def test_stop_fails_jobs_after_the_grace_period(run, model):
    async def test(worker):
        model.go.clear()
        jobs = [image_job("runs", batch_key=None), image_job("waits", batch_key=None)]
        worker.submit(jobs)
        await wait_until(lambda: worker.running == 1)
        stopping = asyncio.create_task(asyncio.to_thread(worker.stop, 0.05))
        assert [type(end) for end in await ends(*jobs)] == [Stopping, Stopping]
        await stopping
        assert not worker._thread.is_alive()
        with pytest.raises(Stopping):
            worker.submit([image_job("after")])

    run(test)


def test_stop_finishes_jobs_within_the_grace_period(run, model):
    async def test(worker):
        jobs = [image_job(name, batch_key=None) for name in "abc"]
        worker.submit(jobs)
        await asyncio.to_thread(worker.stop, 30)
        assert await ends(*jobs) == ["a", "b", "c"]

    run(test)


def test_stuck_step_does_not_block_stop(run, model):
    stuck = threading.Event()
    model.run_images = lambda requests, progress: stuck.wait(60)

    async def test(worker):
        worker.submit([job := image_job("stuck")])
        await wait_until(lambda: worker.running == 1)
        await asyncio.to_thread(worker.stop, 0.05)
        assert isinstance((await ends(job))[0], Stopping)
        stuck.set()

    run(test)


def test_lost_device_ends_all_jobs(run, model, monkeypatch):
    def lost(worker):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ModelThread, "_check_device", lost)

    async def test(worker):
        jobs = [image_job("poison", batch_key=None), image_job("waits", batch_key=None)]
        worker.submit(jobs)
        assert [type(end) for end in await ends(*jobs)] == [Stopping, Stopping]
        await wait_until(lambda: worker.failure is not None)
        with pytest.raises(Stopping):
            worker.submit([image_job("after")])

    run(test)


@pytest.mark.parametrize("prompt", ["poison", "huge", "fine"])
def test_ended_job_releases_its_memory(run, model, monkeypatch, prompt):
    monkeypatch.setattr(logging.getLogger("bagel_rt.serve"), "disabled", True)  # pytest keeps records
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
            with suppress(Failed):
                await job.finish()
            await wait_until(lambda: worker.running == 0)
            del job
            await wait_until(lambda: all(one() is None for one in kept))
        finally:
            gc.enable()

    run(test)

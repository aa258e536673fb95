"""Requests of the page in the model thread: views, cancellation, previews, failures."""

import logging
import re
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from bagel_rt.errors import NonFiniteError
from bagel_rt.model_thread import ModelThread
from bagel_rt.request import Progress
from bagel_rt.ui.jobs import MAX_JOBS, Jobs

WAIT = 60  # seconds, on a busy machine


@pytest.fixture
def jobs():
    model = SimpleNamespace(device=torch.device("cpu"))
    made = Jobs(SimpleNamespace(model=model, release_memory=lambda: None))
    yield made
    made.close()


class Held:
    """A request that runs until ``go_on`` is set."""

    def __init__(self, result="done"):
        self.result, self.began, self.go_on, self.steps = result, threading.Event(), threading.Event(), 0

    def __call__(self, progress):
        self.began.set()
        while not self.go_on.wait(0.01):
            self.steps += 1
            progress(Progress("text", self.steps, 1000, lambda: {0: "word " * self.steps}))
        return self.result


def parts(*stages):
    """A request of stages (name, previews)."""

    def call(progress):
        for stage, made in stages:
            for step, part in enumerate(made, start=1):
                progress(Progress(stage, step, len(made), lambda part=part: {0: part}))
        return [made[-1] for _, made in stages]

    return call


def test_views_are_the_newest_and_the_last_has_the_result(jobs):
    held = Held()
    views = jobs.watch(("page", "ask"), held)
    seen = [next(view for view in views if view.stage == "text")]
    time.sleep(0.3)
    seen.append(next(views))  # the newest state, not the next one
    assert seen[1].step > seen[0].step + 2 and seen[1].text == "word " * seen[1].step
    held.go_on.set()
    assert list(views)[-1].result == "done"


def test_requests_run_one_at_a_time_in_order(jobs):
    first, second = Held("a"), Held("b")
    watched = [jobs.watch(("one", "draw"), first), jobs.watch(("two", "draw"), second)]
    assert first.began.wait(WAIT) and not second.began.wait(0.1)
    view = next(view for view in watched[1] if view.ahead)
    assert (view.stage, view.ahead) == ("waiting", 1)
    first.go_on.set(), second.go_on.set()
    assert [list(views)[-1].result for views in watched] == ["a", "b"]


def test_cancelled_waiting_request_never_runs(jobs):
    first, second = Held(), Held()
    jobs.watch(("one", "draw"), first)
    views = jobs.watch(("two", "draw"), second)
    assert first.began.wait(WAIT)
    jobs.cancel(("two", "draw"))
    assert list(views)[-1].stage == "cancelled"
    jobs.leave("one")
    assert list(jobs.watch(("three", "draw"), lambda progress: "next"))[-1].result == "next"
    assert not second.began.is_set()


@pytest.mark.parametrize("how", ["by its button", "by the page's end", "by another of its tab", "by not looking"])
def test_running_request_is_cancelled(jobs, how):
    held = Held()
    views = jobs.watch(("page", "draw"), held)
    assert next(view for view in views if view.stage == "text").step
    if how == "by its button":
        jobs.cancel(("page", "draw"))
    elif how == "by the page's end":
        jobs.leave("page")
    elif how == "by not looking":
        views.close()
    following = list(jobs.watch(("page", "draw"), lambda progress: "next"))
    assert following[-1].result == "next"
    if how != "by not looking":
        last = list(views)[-1]
        assert last.stage == "cancelled" and last.text.startswith("word")


def test_texts_and_images_are_in_order(jobs):
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    call = parts(("text", ["a", "a b"]), ("image", [red, blue]), ("text", ["c", "c d"]))
    last = list(jobs.watch(("page", "chat"), call, previews=True, keep_last=True))[-1]
    assert last.parts == ("a b", blue, "c d") and last.image is blue and last.text == "c d"


def test_nothing_is_decoded_without_previews(jobs):
    def refuse():
        raise AssertionError("decoded")

    def call(progress):
        for step in range(1, 4):
            progress(Progress("image", step, 3, refuse))
        return "done"

    assert list(jobs.watch(("page", "draw"), call))[-1].result == "done"


@pytest.mark.parametrize("keep_last", [False, True])
def test_last_preview_is_decoded_if_kept(jobs, keep_last):
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    call = parts(("image", [red, red, red, blue]))
    last = list(jobs.watch(("page", "draw"), call, previews=True, keep_last=keep_last))[-1]
    assert last.image is (blue if keep_last else red)


def test_previews_take_at_most_their_share_of_time(jobs):
    decoding = []

    def preview():
        start = time.monotonic()
        time.sleep(0.1)
        decoding.append(time.monotonic() - start)
        return {0: Image.new("RGB", (8, 8))}

    def call(progress):
        for step in range(1, 101):
            time.sleep(0.01)
            progress(Progress("image", step, 100, preview))

    last = list(jobs.watch(("page", "draw"), call, previews=True))[-1]
    assert len(decoding) >= 2
    assert sum(decoding[:-1]) <= last.seconds / 4 + decoding[0]


def failed_view(jobs, error):
    """The last view of a request that raises an error."""

    def fail(progress):
        raise error

    last = list(jobs.watch(("page", "draw"), fail))[-1]
    assert last.stage == "failed"
    return last


@pytest.mark.parametrize("error", [ValueError("size must be 8x8. Use 8x8."), NonFiniteError("an image")])
def test_errors_written_for_users_are_shown_and_not_logged(jobs, caplog, error):
    with caplog.at_level(logging.ERROR, "bagel_rt.ui"):
        assert failed_view(jobs, error).error == str(error)
    assert not caplog.records
    assert list(jobs.watch(("page", "draw"), lambda progress: "next"))[-1].result == "next"


@pytest.mark.parametrize("error", [RuntimeError("/srv/x.py: mat1 and mat2"), KeyError("cfg"), OSError(28, "/srv")])
def test_unexpected_errors_are_logged_under_the_name_that_is_shown(jobs, caplog, error):
    with caplog.at_level(logging.ERROR, "bagel_rt.ui"):
        shown = failed_view(jobs, error).error
    [record] = caplog.records
    name = re.search(r"as request (\w{8})\.$", shown).group(1)
    assert "internal error" in shown and str(error) not in shown
    assert name in record.getMessage() and record.exc_info[1] is error
    assert list(jobs.watch(("page", "draw"), lambda progress: "next"))[-1].result == "next"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_out_of_memory_names_a_remedy(jobs, error):
    shown = failed_view(jobs, error).error
    assert shown == "There is not enough memory for this request. Choose a smaller image, or fewer images at once."


def test_page_of_a_lost_device_refuses_requests(jobs, caplog, monkeypatch):
    def lost(thread):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fail(progress):
        held.began.wait(WAIT)
        raise RuntimeError("broken")

    monkeypatch.setattr(ModelThread, "_check_device", lost)
    held = Held()
    watched = [jobs.watch((name, "draw"), call) for name, call in (("one", fail), ("two", held))]
    held.began.set()
    views = [list(views)[-1] for views in (*watched, jobs.watch(("three", "draw"), held))]
    assert all(view.stage == "failed" and "no more requests" in str(view.error) for view in views)


def test_too_many_requests_are_refused(jobs):
    held = Held()
    jobs.watch(("first", "draw"), held)
    assert held.began.wait(WAIT)
    for number in range(1, MAX_JOBS):
        jobs.watch((number, "draw"), held)
    [refused] = jobs.watch(("more", "draw"), held)
    assert refused.stage == "failed" and "Try again later" in refused.error
    held.go_on.set()

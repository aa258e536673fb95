"""Steps are replayed at fixed addresses: what was captured for one request serves the next, and nothing leaks between.

On a CPU the graph is a recording of operator calls (see ``recording``); on a GPU it is a CUDA graph.
"""

import gc

import pytest
import torch
from conftest import CHECKPOINT, DEVICE
from recording import Recording, dispatch_ops

from bagel_rt import Bagel, Cancelled
from bagel_rt.kernels.backend import choose_backend
from bagel_rt.runtime.graphs import CUDACapture, GraphCache, run_pipelined

cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
FAST = {"num_timesteps": 7, "cfg_interval": (0.7, 1.0)}  # steps of both kinds, each more than twice


@pytest.fixture(scope="module")
def eager():
    """The model run as it is."""
    return Bagel.from_pretrained(CHECKPOINT, device=DEVICE, dtype=torch.float32, graphs=False)


@pytest.fixture
def captured(eager, monkeypatch):
    """The same model, every repeated step captured and replayed."""
    if DEVICE.type == "cuda":
        return Bagel(eager.model, eager.tokenizer)
    dispatch_ops(monkeypatch)
    bagel = Bagel(eager.model, eager.tokenizer)
    bagel.engine.graphs.capture = Recording
    return bagel


def draw(prompt, size=(32, 48), **options):
    return lambda bagel, photo: bagel.generate(prompt, size=size, **FAST | {"seed": 3} | options)


def edit(prompt, **options):
    return lambda bagel, photo: bagel.edit(photo, prompt, **FAST | {"seed": 3} | options)


def chat(prompt, *images, **options):
    return lambda bagel, photo: bagel.chat(prompt, [photo] * len(images), max_think_token_n=12, **options)


SAME_STRUCTURE = {
    "another text, seed and guidance": [
        draw("a red circle"),
        draw("two green squares above it", seed=4, cfg_text_scale=2.0, cfg_renorm_type="channel", cfg_renorm_min=0.2),
        draw("x", seed=5, cfg_interval=(0.4, 0.9), timestep_shift=1.0, cfg_renorm_type="text_channel"),
    ],
    "an edit of another length": [edit("make it night"), edit("remove the second boat from the left", seed=9)],
    "a batch": [
        draw(["a", "b c"], cfg_renorm_type=["global", "channel"]),
        draw(["d e f", "g"], cfg_text_scale=[2.0, 5.0], cfg_img_scale=2.0),
    ],
    "a question": [chat("why?"), chat("what is this, and where?", 1), chat("a", 1, 2)],
    "a sampled answer": [
        chat("why?", do_sample=True, text_temperature=1.0, seed=1),
        chat("how?", do_sample=True, text_temperature=2.0, top_k=20, seed=2),
        chat("who?", do_sample=True, text_temperature=1.5, top_p=0.9, seed=3),
    ],
    "thoughts": [
        draw(["a", "b"], think=True, max_think_token_n=9),
        draw(["c d", "e f g"], think=True, max_think_token_n=9, seed=7),
    ],
}


def same(result, expected):
    if isinstance(expected, list):
        return all(same(one, other) for one, other in zip(result, expected, strict=True))
    if isinstance(expected, str):
        return result == expected
    return result.thought == expected.thought and torch.equal(result.latents, expected.latents)


@pytest.mark.parametrize("requests", SAME_STRUCTURE.values(), ids=SAME_STRUCTURE)
def test_captured_steps_are_shared_by_requests(captured, eager, photo, requests):
    captures = []
    for request in requests:
        assert same(request(captured, photo), request(eager, photo))
        captures.append(captured.engine.graphs.captures)
    first = requests[0](captured, photo)  # and the first one again, after the others used its buffers
    assert same(first, requests[0](eager, photo))
    assert captures[0] > 0
    grown = captured.engine.graphs.captures - captures[-1]
    assert grown <= 1, "only the decoding of an image is captured at the second request of its size"


def test_repeated_request_captures_nothing(captured, photo):
    requests = [draw("a"), edit("b"), chat("c", 1)]
    for request in requests * 2:
        request(captured, photo)
    count, seconds = captured.engine.graphs.captures, captured.engine.graphs.capture_seconds
    for request in requests * 2:
        request(captured, photo)
    assert (captured.engine.graphs.captures, captured.engine.graphs.capture_seconds) == (count, seconds)


def test_growing_cache_invalidates_captured_steps(captured, eager, photo):
    request = draw("a red circle")
    request(captured, photo)
    old = captured.cache.k
    start = captured.cache.allocate(captured.cache.slots + 1)
    assert captured.cache.k is not old
    with torch.inference_mode():
        old.fill_(torch.nan)
    before = captured.engine.graphs.captures
    assert same(request(captured, photo), request(eager, photo))
    assert captured.engine.graphs.captures > before
    captured.cache.release(start, captured.cache.slots)


def test_released_memory_is_allocated_again(captured, eager, photo):
    for _ in range(2):
        for request in (draw("a"), chat("b")):
            assert same(request(captured, photo), request(eager, photo))
        gc.collect()
        captured.release_memory()
        assert captured.cache.slots == 0 and captured.engine.graphs.kept == 0


def test_request_runs_during_an_open_stream(captured, eager, photo):
    options = {"max_think_token_n": 20}
    pieces = captured.stream("what?", **options)
    text = next(pieces) + next(pieces)
    assert captured.chat("and this?", **options) == eager.chat("and this?", **options)
    draw("x", size=(64, 64))(captured, photo)
    assert text + "".join(pieces) == eager.chat("what?", **options)


def test_cancelled_request_does_not_affect_the_next(captured, eager, photo):
    def stop(progress):
        if progress.step == 4:
            raise Cancelled

    for request in (draw("a red circle", progress=stop), chat("why?", progress=stop)):
        with pytest.raises(Cancelled):
            request(captured, photo)
    gc.collect()
    assert captured.cache.free_slots == captured.cache.slots
    for request in (draw("a red circle"), chat("why?")):
        assert same(request(captured, photo), request(eager, photo))


class Owner:
    pass


def test_cache_evicts_the_least_recently_used_buffers_of_a_kind():
    graphs, made = GraphCache(None, limit=2), []

    def take(*key):
        return graphs.acquire(key, lambda: made.append(key), Owner())

    other = take("text", 1)
    first = take("image", "a")
    take("image", "b")
    assert take("image", "a") is first
    take("image", "c")
    assert take("image", "a") is first and len(made) == 4
    take("image", "b")
    assert made[4:] == [("image", "b")]
    assert take("text", 1) is other, "another kind has places of its own"
    assert graphs.kept == 3


def test_released_buffers_are_free_while_their_run_exists():
    graphs, owner = GraphCache(None), Owner()
    first = graphs.acquire(("a",), list, owner)
    first.release()
    assert graphs.acquire(("a",), list, Owner()) is first
    del owner


def test_buffers_in_use_are_not_given_to_another_run():
    graphs, owner = GraphCache(None), Owner()
    first = graphs.acquire(("a",), list, owner)
    second = graphs.acquire(("a",), list, other := Owner())
    assert first is not second and first.buffers is not second.buffers
    del owner
    assert graphs.acquire(("a",), list, Owner()) is not second, "its run still exists"
    del other


def test_work_runs_eagerly_once_then_is_captured_and_replayed():
    done, owner = [], Owner()

    class Captured:
        def __init__(self, work):
            done.append("captured")

        def replay(self):
            done.append("replayed")

    graphs = GraphCache(Captured)
    static = graphs.acquire(("a",), lambda: None, owner)
    for _ in range(3):
        graphs.run(static, "step", lambda: done.append("ran"))
    assert done == ["ran", "captured", "replayed", "replayed"] and graphs.captures == 1
    graphs.invalidate()
    graphs.run(static, "step", lambda: done.append("ran"))
    assert done[4:] == ["captured", "replayed"]


def test_work_that_fails_the_first_time_runs_eagerly_again():
    graphs, owner = GraphCache(Recording), Owner()
    static = graphs.acquire(("a",), lambda: None, owner)

    def fail():
        raise torch.OutOfMemoryError("no memory")

    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            graphs.run(static, "step", fail)
    assert graphs.captures == 0


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_pipelined_work_is_counted_when_it_is_finished(count):
    done = []
    assert list(run_pipelined(DEVICE, [lambda: done.append(1)] * count)) == list(range(1, count + 1))
    assert len(done) == count


@cuda
def test_graphs_are_the_default_on_a_gpu_and_can_be_disabled(eager):
    assert eager.engine.graphs.capture is None
    assert Bagel(eager.model, eager.tokenizer).engine.graphs.capture is not None


def test_work_of_reference_ops_runs_eagerly_before_its_capture():
    graphs, owner, done = GraphCache(Recording), Owner(), []
    static = graphs.acquire(("a",), lambda: None, owner)
    choose_backend("reference")
    try:
        for _ in range(3):
            graphs.run(static, "step", lambda: done.append("reference"))
    finally:
        choose_backend(None)
    graphs.run(static, "step", lambda: done.append("compiles the kernels"))
    assert done == ["reference"] * 3 + ["compiles the kernels"] and graphs.captures == 0


def test_stored_exceptions_do_not_keep_buffers_in_use(captured):
    """A server's log may keep the exceptions of cancelled requests; the next ones find their buffers all the same."""

    def stop(progress):
        if progress.step == 6:
            raise Cancelled

    requests = [draw("a red circle", progress=stop), chat("why?", progress=stop)]
    requests.append(draw(["a", "b"], think=True, max_think_token_n=9, progress=stop))
    static, captures, alive = [], [], []
    for _ in range(4):
        for request in requests:
            with pytest.raises(Cancelled) as caught:
                request(captured, None)
            static.append(caught)
        pieces = captured.stream("why?", max_think_token_n=12)
        next(pieces)
        with pytest.raises(Cancelled) as caught:
            pieces.throw(Cancelled())
        static.append(caught)
        captures.append(captured.engine.graphs.captures)
        alive.append(len(captured.engine.graphs._alive))
    assert captures[1:] == captures[1:2] * 3 and alive[1:] == alive[1:2] * 3
    assert captured.cache.free_slots == captured.cache.slots


class BrokenCapture:
    """What torch.cuda.graph does when the work under it fails: its stream stays the current one."""

    def __init__(self, cuda, problem):
        self._cuda, self._problem = cuda, problem

    def __call__(self, graph, pool, capture_error_mode):
        return self

    def __enter__(self):
        self._cuda.stream = "the capture's"

    def __exit__(self, *_):
        raise self._problem


class FakeCUDA:
    """The part of torch.cuda that a capture calls, without a device."""

    def __init__(self, problem):
        self.stream, self.pools, self.graph = "the caller's", 0, BrokenCapture(self, problem)
        self.CUDAGraph = object

    def graph_pool_handle(self):
        self.pools += 1
        return self.pools

    def current_stream(self):
        return self.stream

    def set_stream(self, stream):
        self.stream = stream


@pytest.mark.parametrize(
    "raised, problem, error, message",
    [
        (None, RuntimeError("not permitted"), RuntimeError, r"could not be captured .*not permitted.*graphs=False"),
        (torch.OutOfMemoryError("no memory"), RuntimeError("invalidated"), torch.OutOfMemoryError, "no memory"),
        (None, torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError, "no memory"),
    ],
    ids=["what cannot be captured", "memory runs out", "memory runs out at the end"],
)
def test_failed_capture_restores_the_stream_and_the_garbage_collector(monkeypatch, raised, problem, error, message):
    cuda = FakeCUDA(problem)
    monkeypatch.setattr("torch.cuda", cuda)

    def work():
        assert not gc.isenabled()
        if raised:
            raise raised

    capture = CUDACapture()
    for attempt in (1, 2):
        with pytest.raises(error, match=message):
            capture(work)
        assert cuda.stream == "the caller's" and gc.isenabled() and cuda.pools == attempt


@cuda
def test_replays_allocate_nothing(captured, photo):
    requests = [
        lambda **options: captured.generate("two", size=(32, 48), seed=1, **FAST | {"num_timesteps": 20} | options),
        lambda **options: captured.chat("why?", max_think_token_n=200, **options),
    ]
    for request in requests:
        for _ in range(3):
            request()
        allocated = []

        def note(progress, allocated=allocated):
            allocated.append(torch.cuda.memory_stats()["allocation.all.allocated"])

        request(progress=note)
        assert len(allocated) > 10 and len(set(allocated)) == 1

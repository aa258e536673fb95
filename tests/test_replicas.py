"""Two replicas of the small model on the CPU, behind Ray's proxy: load is shared, and one of them may die."""

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("ray") is None:  # which reads its environment when it is imported, so not here
    pytest.skip("the extra [ray] is not installed", allow_module_level=True)

import httpx  # noqa: E402
from conftest import CHECKPOINT  # noqa: E402
from PIL import Image  # noqa: E402

from bagel_rt.serve import replicas  # noqa: E402
from bagel_rt.serve.replicas import Answered, Options  # noqa: E402

DRAW, CHAT = "/v1/images/generations", "/v1/chat/completions"
QUICK = {"prompt": "a cat", "size": "32x32", "num_timesteps": 3}
PATIENCE = 120  # seconds; a replica starts in a few, but machines differ
OPTIONS = Options(folder=str(CHECKPOINT), name="small", replicas=2, device="cpu", limits={"steps": 5000, "grace": 5})


def listened_at() -> set[str]:
    """Addresses and ports, in hexadecimal, that somebody on this machine listens at but for the loopback interface."""
    loopback = ("0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F")
    found = set()
    for table in Path("/proc/net/tcp"), Path("/proc/net/tcp6"):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            _, here, _, state = line.split()[:4]
            if state == "0A" and not here.startswith(loopback):
                found.add(here)
    return found


@pytest.fixture(scope="module")
def before_ray():
    """What was listened at before."""
    return listened_at()


@pytest.fixture(scope="module")
def address(before_ray, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # where Ray keeps a token
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield replicas.start(OPTIONS, port=0)
        replicas.stop()


@pytest.fixture
def http(address):
    with httpx.Client(base_url=address, timeout=PATIENCE) as client:
        yield client


def alive() -> dict:
    """Replica -> its actor."""
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    found = [actor for actor in named if actor["name"].startswith("SERVE_REPLICA::")]
    return {a["name"].rpartition("#")[2]: ray.get_actor(a["name"], a["namespace"]) for a in found}


def who_answers(address: str) -> set[str]:
    """The replicas that take part when many requests come at once."""
    with httpx.Client(base_url=address, timeout=PATIENCE) as client, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: client.post(DRAW, json=QUICK | {"num_timesteps": 20}), range(16)))
    return {answer.headers["x-replica"] for answer in answers if answer.status_code == 200}


def test_requests_are_shared(address):
    assert who_answers(address) == set(alive()) and len(alive()) == 2


def test_an_answer_is_the_library_s(http, bagel):
    answer = http.post(DRAW, json=QUICK | {"seed": 3}).json()
    drawn = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    wanted = bagel.generate("a cat", size=(32, 32), seed=3, num_timesteps=3).image
    assert drawn.tobytes() == wanted.tobytes()


def test_a_stream_comes_in_pieces(http):
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "stream": True}
    with http.stream("POST", CHAT, json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and len(lines) > 4


def test_errors_are_json_whoever_makes_them(http):
    for answer in (http.post(DRAW, json={}), http.get("/nothing"), http.post("/v1/models")):
        assert answer.status_code in (400, 404, 405) and answer.json()["error"]["message"]


def test_a_client_that_leaves_frees_the_model(http, address):
    with pytest.raises(httpx.ReadTimeout):
        http.post(DRAW, json=QUICK | {"num_timesteps": 5000}, timeout=2)
    end = time.monotonic() + PATIENCE
    while True:  # until each of the two has said that it is idle
        texts = {a.headers["x-replica"]: a.text for a in (http.get("/metrics") for _ in range(10))}
        if len(texts) == 2 and all("bagel_rt_running 0.0" in text for text in texts.values()):
            return
        assert time.monotonic() < end, texts


def test_a_killed_replica_s_requests_end_and_it_returns(address, http):
    import ray

    before, answers = alive(), []

    def draw():
        answers.append(http.post(DRAW, json=QUICK | {"num_timesteps": 4000}))

    threads = [threading.Thread(target=draw) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    lost = sorted(before)[0]
    ray.kill(before[lost], no_restart=False)
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads) and len(answers) == 6
    codes = sorted({answer.status_code for answer in answers})
    assert codes in ([200], [200, 503])
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "replica_lost" and answer.headers["retry-after"] == "1"
    end = time.monotonic() + PATIENCE
    while lost in (found := alive()) or len(found) < 2 or who_answers(address) != set(found):
        assert time.monotonic() < end
        time.sleep(0.5)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="what listens is read from Linux' /proc")
def test_only_the_loopback_interface_is_listened_at(address, before_ray):
    assert listened_at() <= before_ray


# Without Ray's processes


def conversation(*messages):
    """An application that sends these messages; what a client of ``Answered`` around it gets."""
    sent = []

    async def app(scope, receive, send):
        for message in messages:
            await send(message)

    async def send(message):
        sent.append(message)

    asyncio.run(Answered(app)({"type": "http", "path": "/v1/models"}, None, send))
    return sent


def begin(status, kind):
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}


def body(content, more):
    return {"type": "http.response.body", "body": content, "more_body": more}


def test_an_answer_passes_as_it_is():
    whole = [begin(200, b"text/plain"), body(b"a", True), body(b"b", False)]
    assert conversation(*whole) == whole
    refused = [begin(400, b"application/json"), body(b"{}", False)]
    assert conversation(*refused) == refused


def test_no_answer_becomes_an_error():
    head, content = conversation()
    assert head["status"] == 503 and json.loads(content["body"])["error"]["code"] == "replica_lost"


@pytest.mark.parametrize("status, kind", [(404, "invalid_request_error"), (500, "server_error"), (503, "server_error")])
def test_plain_errors_become_json(status, kind):
    head, content = conversation(begin(status, b"text/plain"), body(b"Traceback", False))
    assert head["status"] == status and json.loads(content["body"])["error"]["type"] == kind


def test_a_stream_that_breaks_off_ends_with_an_event():
    *_, last = conversation(begin(200, b"text/event-stream; charset=utf-8"), body(b"data: 1\n\n", True))
    event = last["body"].decode()
    assert event.startswith("data: ") and event.endswith("\n\n") and not last.get("more_body")
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "replica_lost"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"folder": "/no/where"}, "no such folder"),
        ({"limits": {"queue": 0}}, "queue is 0: allowed are numbers above 0"),
    ],
)
def test_bad_options_are_refused_before_ray_starts(options, message):
    with pytest.raises(ValueError, match=message):
        replicas.application(Options(**options))
    with pytest.raises(ValueError, match="replica"):
        Options(replicas=0)


def test_ray_reports_nothing_to_its_makers():
    assert replicas.ENVIRONMENT["RAY_USAGE_STATS_ENABLED"] == "0"
    said = "import sys, bagel_rt.serve.replicas; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]  # so that the variables are set before it

"""Two replicas of the small model on the CPU, behind Ray's proxy: load is shared, and one of them may die."""

import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("ray") is None:  # which reads its environment when it is imported, so not here
    pytest.skip("the extra [ray] is not installed", allow_module_level=True)

import httpx
from conftest import CHECKPOINT
from PIL import Image

from bagel_rt.serve import replicas
from bagel_rt.serve.replicas import Options, ProxyErrors

DRAW, CHAT = "/v1/images/generations", "/v1/chat/completions"
QUICK = {"prompt": "a cat", "size": "32x32", "num_timesteps": 3}
SLOW = QUICK | {"size": "128x128", "num_timesteps": 1000, "n": 8}  # for minutes
TIMEOUT = 240  # seconds; a replica starts in a few, but machines differ
OPTIONS = Options(folder=str(CHECKPOINT), name="small", replicas=2, device="cpu", limits={"steps": 1000, "grace": 5})

pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables for Ray's processes."""
    variables = {"HOME": str(tmp_path_factory.mktemp("home"))}  # where Ray keeps a token
    return variables | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def stream_text(address: str, begun: threading.Semaphore) -> str:
    """Stream a long text; ``begun`` is released with its first event."""
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 400, "stream": True}
    lines = []
    with httpx.stream("POST", f"{address}{CHAT}", json=body, timeout=TIMEOUT) as response:
        for line in response.iter_lines():
            lines.append(line)
            if len(lines) == 1:
                begun.release()
    return "\n".join(lines).strip()


@pytest.mark.slow
def test_serve_ray_answers_all_requests_on_sigterm(environment):
    command = [sys.executable, "-m", "bagel_rt.cli", "serve", "--ray", "--replicas", "2", "--device", "cpu"]
    command += ["--model", str(CHECKPOINT), "--port", "0", "--steps", "1000", "--grace", "4"]
    begun, after = threading.Semaphore(0), []
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment) as server,
        ThreadPoolExecutor(8) as threads,
    ):
        try:
            line = next(line for line in server.stdout if "running on" in line)
            address = next(word.strip(";") for word in line.split() if word.startswith("http"))
            assert httpx.post(f"{address}{DRAW}", json=QUICK, timeout=TIMEOUT).status_code == 200

            def draw(**options):
                return httpx.post(f"{address}{DRAW}", json=QUICK | options, timeout=TIMEOUT)

            drawn = [threads.submit(draw, **SLOW)]
            streams = [threads.submit(stream_text, address, begun) for _ in range(4)]
            for _ in streams:
                assert begun.acquire(timeout=TIMEOUT)
            drawn += [threads.submit(draw, num_timesteps=50) for _ in range(2)]
            time.sleep(1)  # for these to reach a replica
            server.send_signal(signal.SIGTERM)
            with suppress(httpx.TransportError):  # until the port is closed
                while True:
                    after.append(httpx.post(f"{address}{DRAW}", json=QUICK, timeout=TIMEOUT))
                    time.sleep(0.2)
            assert server.wait(TIMEOUT) == 143
        finally:
            server.kill()
    for stream in streams:
        last = stream.result().splitlines()[-1].removeprefix("data: ")
        assert last == "[DONE]" or json.loads(last)["error"]["code"] == "stopping"
    for response in [*(one.result() for one in drawn), *after]:
        assert response.status_code == 200 or response.json()["error"]["code"] == "stopping"
    assert drawn[0].result().status_code == 503 and after[-1].status_code == 503


@pytest.fixture(scope="module")
def address(environment):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        handler = signal.getsignal(signal.SIGTERM)
        yield replicas.start(OPTIONS, port=0)
        assert signal.getsignal(signal.SIGTERM) is handler
        replicas.stop(OPTIONS.limits["grace"])


@pytest.fixture
def http(address):
    with httpx.Client(base_url=address, timeout=TIMEOUT) as client:
        yield client


def alive() -> dict:
    """Replica -> its actor."""
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    found = [actor for actor in named if actor["name"].startswith("SERVE_REPLICA::")]
    return {a["name"].rpartition("#")[2]: ray.get_actor(a["name"], a["namespace"]) for a in found}


def wait_until(condition):
    """Wait for a condition."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def responding_replicas(address: str) -> set[str]:
    """The replicas that respond to many concurrent requests."""
    with httpx.Client(base_url=address, timeout=TIMEOUT) as client, ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda _: client.post(DRAW, json=QUICK | {"num_timesteps": 20}), range(16)))
    return {response.headers["x-replica"] for response in replies if response.status_code == 200}


def replaced(address: str, lost: str) -> bool:
    """Whether two replicas respond and ``lost`` is not one of them."""
    found = set(alive())
    return lost not in found and len(found) == 2 and responding_replicas(address) == found


@pytest.mark.slow
def test_requests_are_shared(address):
    assert responding_replicas(address) == set(alive()) and len(alive()) == 2


@pytest.mark.slow
def test_response_equals_the_library(http, bagel):
    response = http.post(DRAW, json=QUICK | {"seed": 3}).json()
    drawn = Image.open(io.BytesIO(base64.b64decode(response["data"][0]["b64_json"])))
    expected = bagel.generate("a cat", size=(32, 32), seed=3, num_timesteps=3).image
    assert drawn.tobytes() == expected.tobytes()


@pytest.mark.slow
def test_stream_arrives_in_pieces(http):
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "stream": True}
    with http.stream("POST", CHAT, json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and len(lines) > 4


@pytest.mark.slow
def test_errors_of_proxy_and_replica_are_json(http):
    for response in (http.post(DRAW, json={}), http.get("/nothing"), http.post("/v1/models")):
        assert response.status_code in (400, 404, 405) and response.json()["error"]["message"]


@pytest.mark.slow
def test_disconnect_stops_the_model(http):
    # Without the middleware, the last header would keep the request running.
    for headers in ({}, {"X-Request-Id": "\xff"}, {"X-Request-Disconnect-Disabled": "?1"}):
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        with pytest.raises(httpx.ReadTimeout):
            http.post(DRAW, json=SLOW, headers=encoded, timeout=2)

    def idle():  # according to each of the two
        texts = {a.headers["x-replica"]: a.text for a in (http.get("/metrics") for _ in range(10))}
        return len(texts) == 2 and all("bagel_rt_running 0.0" in text for text in texts.values())

    wait_until(idle)


@pytest.mark.slow
def test_killed_replica_fails_its_requests_and_is_restarted(address, http):
    import ray

    before = alive()
    with ThreadPoolExecutor(6) as threads:
        body = QUICK | {"size": "64x64", "num_timesteps": 1000}
        sent = [threads.submit(http.post, DRAW, json=body) for _ in range(6)]
        wait_until(lambda: all(ray.get([actor.get_num_ongoing_requests.remote() for actor in before.values()])))
        lost = sorted(before)[0]
        ray.kill(before[lost], no_restart=False)
        replies = [one.result(TIMEOUT) for one in sent]
    refused = [response for response in replies if response.status_code == 503]
    assert refused and all(response.json()["error"]["code"] == "replica_lost" for response in refused)
    assert all(response.headers["retry-after"] == "1" for response in refused)
    drawn = [response for response in replies if response.status_code == 200]
    assert drawn and all(response.headers["x-replica"] != lost for response in drawn)
    assert len(refused) + len(drawn) == 6
    wait_until(lambda: replaced(address, lost))


@pytest.mark.slow
def test_replica_with_a_dead_model_thread_is_replaced(address):
    import ray

    def lose(_):
        [thread] = [one for one in threading.enumerate() if one.name == "bagel_rt"]
        thread._target.__self__.failure = RuntimeError("CUDA error")

    before = alive()
    lost = sorted(before)[0]
    ray.get(before[lost].__ray_call__.remote(lose))
    wait_until(lambda: replaced(address, lost))


def listening_addresses() -> set[str]:
    """Addresses and ports, in hexadecimal, on which this process and its descendants listen, except loopback."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    ours, found, sockets = {os.getpid()}, set(), set()
    while more := {one for one, parent in parents.items() if parent in ours} - ours:
        ours |= more
    for process in ours:
        with suppress(OSError):  # it has ended
            for file in Path(f"/proc/{process}/fd").iterdir():
                with suppress(OSError):
                    sockets.add(os.readlink(file))
    loopback = ("0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F")
    for table in Path("/proc/net/tcp"), Path("/proc/net/tcp6"):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            _, here, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets and not here.startswith(loopback):
                found.add(here)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="what listens is read from Linux' /proc")
def test_ray_listens_on_loopback_only(address):

    assert not listening_addresses()
    with socket.create_server(("0.0.0.0", 0)) as elsewhere:
        assert [entry.rpartition(":")[2] for entry in listening_addresses()] == [f"{elsewhere.getsockname()[1]:04X}"]


# Without Ray's processes


def conversation(*messages, headers=()):
    """Run ``ProxyErrors`` around an application that sends these messages; returns what the client receives, and the
    headers that the application receives."""
    sent, got = [], []

    async def app(scope, receive, send):
        got.extend(scope["headers"])
        for message in messages:
            await send(message)

    async def send(message):
        sent.append(message)

    asyncio.run(ProxyErrors(app)({"type": "http", "path": "/v1/models", "headers": list(headers)}, None, send))
    return sent, got


def begin(status, kind):
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}


def body(content, more):
    return {"type": "http.response.body", "body": content, "more_body": more}


def test_json_responses_pass_unchanged():
    whole = [begin(200, b"text/plain"), body(b"a", True), body(b"b", False)]
    assert conversation(*whole)[0] == whole
    refused = [begin(400, b"application/json"), body(b"{}", False)]
    assert conversation(*refused)[0] == refused


def test_control_headers_are_dropped():
    kept = [(b"authorization", b"Bearer x"), (b"x-replica", b"a")]
    obeyed = [b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"x-session-id", b"x_session_id"]
    obeyed += [b"x-request-id", b"serve_multiplexed_model_id", b"serve-multiplexed-model-id"]
    assert conversation(headers=[*kept, *((name, b"1") for name in obeyed)])[1] == kept


def test_missing_response_becomes_an_error():
    (head, content), _ = conversation()
    assert head["status"] == 503 and json.loads(content["body"])["error"]["code"] == "replica_lost"


@pytest.mark.parametrize(
    "proxy, status, code, again",
    [
        (404, 503, "stopping", (b"retry-after", b"5")),
        (408, 504, "timeout", (b"x-should-retry", b"false")),
        (429, 429, "busy", (b"retry-after", b"1")),
        (500, 503, "replica_lost", (b"retry-after", b"1")),
        (503, 503, "replica_lost", (b"retry-after", b"1")),
    ],
)
def test_plain_errors_become_json(proxy, status, code, again):
    (head, content), _ = conversation(begin(proxy, b"text/plain"), body(b"Traceback", False))
    assert head["status"] == status and again in head["headers"]
    assert json.loads(content["body"])["error"]["code"] == code


def test_broken_stream_ends_with_an_error_event():
    (*_, last), _ = conversation(begin(200, b"text/event-stream; charset=utf-8"), body(b"data: 1\n\n", True))
    event = last["body"].decode()
    assert event.startswith("data: ") and event.endswith("\n\n") and not last.get("more_body")
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "replica_lost"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"folder": "/no/where"}, "no such folder"),
        ({"limits": {"queue": 0}}, "queue must be an integer >= 1, got 0"),
    ],
)
def test_bad_options_are_refused_before_ray_starts(options, message):
    with pytest.raises(ValueError, match=message):
        replicas.application(Options(**options))
    with pytest.raises(ValueError, match="replica"):
        Options(replicas=0)


def test_empty_key_is_refused(monkeypatch):
    monkeypatch.setenv("BAGEL_RT_API_KEY", " ")
    with pytest.raises(ValueError, match="BAGEL_RT_API_KEY is set but empty"):
        replicas.application(OPTIONS)


def test_ray_usage_statistics_are_off():
    assert replicas.ENVIRONMENT["RAY_USAGE_STATS_ENABLED"] == "0"
    code = "import sys, bagel_rt.serve.replicas; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]  # so that the variables are set before it

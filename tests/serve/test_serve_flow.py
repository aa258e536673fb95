"""The server over real HTTP: concurrent, disconnecting and slow clients, and shutdown."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import httpx
import openai
from conftest import CHECKPOINT
from serving import (
    CHAT,
    DRAW,
    EDIT,
    IMAGE,
    LIMITS,
    TIMEOUT,
    chat_body,
    decode_image,
    draw,
    metric,
    paused_server,
    png,
    running_server,
    send,
    wait_until,
)

from bagel_rt.serve import responses, run


@pytest.fixture
def threads():
    with ThreadPoolExecutor(16) as pool:
        yield pool


def leave(server, **options):
    """Request an image and disconnect before the response."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.address}{DRAW}", json=IMAGE | options, timeout=httpx.Timeout(TIMEOUT, read=0.3))


def test_full_queue_returns_429_and_equal_sizes_share_a_batch(threads):
    with paused_server(queue=3, batch=4) as server:
        first = threads.submit(draw, server)
        wait_until(lambda: server.worker.running == 1)
        others = [threads.submit(draw, server, seed=seed) for seed in (2, 3, 4)]
        wait_until(lambda: server.worker.waiting == 3)
        busy = draw(server)
        assert busy.status_code == 429 and busy.headers["retry-after"]
        assert busy.json()["error"]["type"] == "rate_limit_error"
        server.go.set()
        assert [response.result().status_code for response in (first, *others)] == [200] * 4
        assert metric(server.http, "bagel_rt_batch_size_count") == 2
        assert metric(server.http, "bagel_rt_batch_size_sum") == 4


def test_retrying_client_succeeds(threads):
    with paused_server(queue=1, batch=1) as server:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=50, timeout=TIMEOUT)
        request = {"prompt": "x", "size": "32x32", "extra_body": {"num_timesteps": 3}}
        replies = [threads.submit(client.images.generate, **request) for _ in range(5)]
        wait_until(lambda: metric(server.http, 'bagel_rt_requests_total{route="/v1/images/generations",status="429"}'))
        server.go.set()
        assert all(response.result().data for response in replies)


def test_excess_requests_are_refused_unread(threads):
    with paused_server(queue=1, batch=1) as server:  # holds four requests
        slow = [send(server, DRAW, b"", length=99) for _ in range(4)]  # clients that never finish their request
        wait_until(lambda: draw(server, num_timesteps=0).status_code == 429)  # 400 until all four are admitted
        assert server.http.get("/health").status_code == 200
        for connection in slow:
            connection.close()
        wait_until(lambda: draw(server, num_timesteps=0).status_code == 400)


def test_disconnect_stops_a_running_image():
    with paused_server() as server:
        leave(server)
        wait_until(lambda: not server.worker.running)
        wait_until(lambda: metric(server.http, "bagel_rt_cancelled_total") == 1)
        cache = server.app.state.server.bagel.cache
        assert cache.free_slots == cache.slots


def test_disconnect_removes_a_waiting_request(threads):
    with paused_server() as server:
        first = threads.submit(draw, server)
        wait_until(lambda: server.worker.running == 1)
        for _ in range(2):
            leave(server)
        wait_until(lambda: metric(server.http, "bagel_rt_cancelled_total") == 2)
        server.go.set()
        assert first.result().status_code == 200
        wait_until(lambda: not server.worker.waiting)
        assert metric(server.http, "bagel_rt_batch_size_sum") == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_disconnect_stops_a_running_text(stream):
    with paused_server() as server:
        request = chat_body("x", stream=stream)
        if stream:
            with server.http.stream("POST", CHAT, json=request) as response:
                pieces = response.iter_text()
                wait_until(lambda: "first " in next(pieces))
                assert server.worker.running == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                server.http.post(CHAT, json=request, timeout=httpx.Timeout(TIMEOUT, read=0.3))
        wait_until(lambda: not server.worker.running)
        wait_until(lambda: metric(server.http, "bagel_rt_cancelled_total") == 1)


def test_disconnect_removes_a_waiting_stream(threads):
    with paused_server() as server:
        first = threads.submit(draw, server)
        wait_until(lambda: server.worker.running == 1)
        with server.http.stream("POST", CHAT, json=chat_body("x", stream=True)) as response:
            assert '"role": "assistant"' in next(response.iter_text())
            assert server.worker.waiting == 1
        wait_until(lambda: metric(server.http, "bagel_rt_cancelled_total") == 1)
        server.go.set()
        assert first.result().status_code == 200
        wait_until(lambda: not server.worker.waiting)
        assert metric(server.http, "bagel_rt_batch_size_sum") == 1


def test_deadline_ends_running_and_waiting_requests(threads):
    with paused_server(seconds=4) as server:
        drawn = threads.submit(draw, server)
        wait_until(lambda: server.worker.running == 1 or drawn.done())
        waiting = threads.submit(draw, server, size="48x48")
        lines = httpx.post(f"{server.address}{CHAT}", json=chat_body("x", stream=True), timeout=TIMEOUT).text
        for response in (drawn.result(), waiting.result()):
            assert response.status_code == 504 and "took too long" in response.json()["error"]["message"]
            assert response.headers["x-should-retry"] == "false"
        last = json.loads(lines.strip().splitlines()[-1].removeprefix("data: "))
        assert last["error"]["code"] == "timeout" and "[DONE]" not in lines
        server.go.set()
        assert draw(server).status_code == 200


def test_unfinished_body_times_out():
    with paused_server(seconds=0.5) as server:
        with send(server, DRAW, b"", length=99) as connection:
            assert connection.recv(4096).startswith(b"HTTP/1.1 504")


def test_disconnect_during_the_body_logs_no_error(caplog):
    with paused_server() as server:
        with send(server, DRAW, b"{", length=99):
            wait_until(lambda: server.uvicorn.server_state.tasks)
        wait_until(lambda: metric(server.http, "bagel_rt_cancelled_total") == 1)
        assert not caplog.records


def test_error_event_raises_in_openai_client():
    with paused_server(seconds=0.7) as server:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
        messages = [{"role": "user", "content": "x"}]
        with pytest.raises(openai.APIError, match="took too long"):
            list(client.chat.completions.create(model="small", messages=messages, stream=True))


def test_running_requests_fail_after_the_grace_period(threads):
    with paused_server(grace=0.3) as server:
        drawn = threads.submit(draw, server)
        wait_until(lambda: server.worker.running == 1)
        waiting = threads.submit(draw, server, size="48x48")
        streamed = threads.submit(
            httpx.post, f"{server.address}{CHAT}", json=chat_body("x", stream=True), timeout=TIMEOUT
        )
        wait_until(lambda: server.worker.waiting == 2)
        server.uvicorn.should_exit = True
        for response in (drawn.result(), waiting.result()):
            assert response.status_code == 503 and response.json()["error"]["code"] == "stopping"
        assert '"code": "stopping"' in streamed.result().text
        wait_until(lambda: not server.worker._thread.is_alive())


def test_running_requests_finish_within_the_grace_period(threads):
    with paused_server(grace=60) as server:
        replies = [threads.submit(draw, server, seed=seed) for seed in range(6)]
        wait_until(lambda: server.worker.running + server.worker.waiting == 6)
        server.uvicorn.should_exit = True
        wait_until(lambda: server.worker.stopping)
        # While it drains, new connections are still answered.
        assert httpx.get(f"{server.address}/health/live").status_code == 200
        assert httpx.get(f"{server.address}/health/ready").json()["status"] == "stopping"
        assert draw(server).json()["error"]["code"] == "stopping"
        server.go.set()
        assert [response.result().status_code for response in replies] == [200] * 6


def test_unfinished_request_gets_503_on_shutdown(monkeypatch):
    monkeypatch.setattr(run, "_MARGIN", 0)
    with paused_server(grace=0.6) as server:
        with send(server, DRAW, b"", length=99) as connection:
            wait_until(lambda: server.uvicorn.server_state.tasks)
            server.uvicorn.should_exit = True
            assert connection.recv(4096).startswith(b"HTTP/1.1 503")


def test_health_reports_a_dead_model_thread():
    with paused_server() as server:
        server.worker.failure = RuntimeError("CUDA error")
        response = server.http.get("/health")
        assert response.status_code == 503 and response.json()["status"] == "failed"
        assert server.http.get("/health/live").status_code == server.http.get("/health/ready").status_code == 503
        assert draw(server).status_code == 503


def test_out_of_memory_returns_503():
    import torch

    with paused_server() as server:

        def exhausted(requests, progress):
            raise torch.OutOfMemoryError("CUDA out of memory: /root/model")

        server.app.state.server.bagel.engine.run_images = exhausted
        response = draw(server)
        assert response.status_code == 503 and response.headers["x-should-retry"] == "false"
        assert "out of memory" in response.text and "/root" not in response.text


@contextmanager
def listening(command):
    """Start a server; yields (process, address)."""
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        lines = [""]
        while "running on" not in lines[-1]:
            lines.append(server.stderr.readline())
            assert lines[-1], "".join(lines)
        address = next(word for word in lines[-1].split() if word.startswith("http"))
        wait_until(lambda: httpx.get(f"{address}/health/ready").status_code == 200)
        yield server, address
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


@pytest.mark.slow
def test_sigterm_lets_requests_finish(threads):
    command = [sys.executable, "-m", "bagel_rt.cli", "serve", "--port", "0", "--device", "cpu", "--grace", "100"]
    command += ["--model", str(CHECKPOINT)]
    with listening(command) as (server, address):
        with httpx.Client(base_url=address) as http:
            request = IMAGE | {"size": "96x96", "num_timesteps": 60}
            sent = [threads.submit(draw, SimpleNamespace(address=address), **request) for _ in range(3)]
            wait_until(lambda: metric(http, "bagel_rt_queue ") + metric(http, "bagel_rt_running ") == 3)
        log = threads.submit(server.stderr.read)
        server.send_signal(signal.SIGTERM)
        assert [response.result().status_code for response in sent] == [200] * 3
        assert server.wait(TIMEOUT) == 143
        assert "Traceback" not in log.result()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_the_server_at_once(threads, number):
    command = [sys.executable, "-m", "bagel_rt.cli", "serve", "--port", "0", "--device", "cpu", "--grace", "1000"]
    command += ["--model", str(CHECKPOINT), "--steps", "1000"]
    with listening(command) as (server, address):
        request = IMAGE | {"size": "128x128", "num_timesteps": 1000, "n": 8}
        # More than can be done between the two interrupts, however busy the machine is.
        sent = [threads.submit(draw, SimpleNamespace(address=address), **request) for _ in range(4)]
        with httpx.Client(base_url=address) as http:
            wait_until(lambda: metric(http, "bagel_rt_running ") and metric(http, "bagel_rt_queue ") == 24)
            server.send_signal(number)
            wait_until(lambda: http.get("/health").status_code == 503)
        server.send_signal(number)
        assert server.wait(TIMEOUT) == 128 + number
        for one in sent:
            assert isinstance(one.exception(), httpx.HTTPError) or one.result().status_code == 503


def test_disconnect_stops_a_running_edit():
    with paused_server() as server:
        with pytest.raises(httpx.ReadTimeout):
            server.http.post(
                EDIT, files={"image": png()}, data={"prompt": "x"}, timeout=httpx.Timeout(TIMEOUT, read=0.3)
            )
        wait_until(lambda: metric(server.http, "bagel_rt_cancelled_total") == 1)
        wait_until(lambda: not server.worker.running)


def test_silent_stream_sends_keep_alive_comments(threads, monkeypatch):
    monkeypatch.setattr(responses, "_SILENCE", 0.05)
    with paused_server() as server:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
        request = {"model": "small", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "stream": True}
        chunks = threads.submit(lambda: list(client.chat.completions.create(**request)))
        with server.http.stream("POST", CHAT, json=request) as response:
            pieces = response.iter_text()
            wait_until(lambda: ": wait\n\n" in next(pieces))
            server.go.set()
            assert "".join(pieces).endswith("data: [DONE]\n\n")
        assert chunks.result()[-1].choices[0].finish_reason == "length"


def test_concurrent_requests_equal_single_ones_with_batch_1(threads):
    seeds = range(8)
    with running_server(replace(LIMITS, queue=16, batch=1)) as (address, _):
        server = SimpleNamespace(address=address)
        together = [threads.submit(draw, server, seed=seed) for seed in seeds]
        images = [decode_image(one.result().json()["data"][0]["b64_json"]).tobytes() for one in together]
        alone = [draw(server, seed=seed).json()["data"][0]["b64_json"] for seed in seeds]
        assert images == [decode_image(one).tobytes() for one in alone]

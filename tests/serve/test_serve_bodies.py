"""Large bodies and images neither fill the memory nor block other requests."""

import gc
import json
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import httpx
from PIL import Image
from serving import (
    CHAT,
    DRAW,
    EDIT,
    TIMEOUT,
    chat_body,
    data_url,
    draw,
    image_part,
    paused_server,
    png,
    send,
    wait_until,
)

from bagel_rt.serve import app as app_module
from bagel_rt.serve.decoder_pool import DecoderPool

FORM = "multipart/form-data; boundary=b"


@pytest.fixture
def threads():
    with ThreadPoolExecutor(16) as pool:
        yield pool


def form(file: bytes) -> bytes:
    """The body of an edit request."""
    body = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--b\r\nContent-Disposition: '
    return body + b'form-data; name="image"; filename="a.png"\r\n\r\n' + file + b"\r\n--b--\r\n"


def test_queued_requests_hold_little_memory(threads):
    with paused_server() as server:
        first = threads.submit(draw, server)
        wait_until(lambda: server.worker.running == 1)
        most = server.app.state.server.bagel.model.config.vae_transform.max_size
        tracemalloc.start()  # sees bodies, but not Pillow's memory
        try:
            edit, chat = form(png(1500, 1500)), json.dumps(chat_body(image_part(data_url(png(1500, 1500))))).encode()
            large = len(edit)
            connections = [send(server, EDIT, edit, FORM), send(server, CHAT, chat)]
            del edit, chat
            wait_until(lambda: server.worker.waiting == 2)
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < large / 2 and large > 6 << 20
        finally:
            tracemalloc.stop()
        parts = [part for job in server.worker._waiting for part in job.request.inputs]
        seen = [part.size for part in parts if isinstance(part, Image.Image)]
        assert len(seen) == 2 and all(max(size) <= most < 1500 for size in seen)
        for connection in connections:
            connection.close()
        server.go.set()
        assert first.result().status_code == 200


def test_total_size_of_held_bodies_is_bounded(threads):
    with paused_server(body=1 << 20) as server:
        first = threads.submit(draw, server)
        wait_until(lambda: server.worker.running == 1)
        waiting = []
        for seed in range(10):
            waiting.append(send(server, EDIT, form(png(550, 550, seed)), FORM))
            wait_until(lambda: server.worker.waiting == len(waiting))  # bodies of queued requests have been released
        # One client may hold the bytes of four bodies.
        slow = [send(server, DRAW, b"x" * ((1 << 20) - 1), length=1 << 20) for _ in range(4)]
        wait_until(lambda: draw(server, num_timesteps=0).status_code == 429)  # 400 until all of them have arrived
        for connection in slow:
            connection.close()
        wait_until(lambda: draw(server, num_timesteps=0).status_code == 400)
        for connection in waiting:
            connection.close()
        server.go.set()
        assert first.result().status_code == 200


def test_slow_decoding_delays_neither_finished_responses_nor_texts(threads, monkeypatch):
    go_on, reading = threading.Event(), []

    def slowly(*arguments):
        reading.append(1)
        go_on.wait(TIMEOUT)
        return decode(*arguments)

    def edit(server):
        files, fields = {"image": png()}, {"prompt": "x", "num_timesteps": "3"}
        return httpx.post(f"{server.address}{EDIT}", files=files, data=fields, timeout=TIMEOUT)

    decode = DecoderPool.decode
    monkeypatch.setattr(DecoderPool, "decode", slowly)
    with paused_server() as server:
        first = threads.submit(draw, server)
        wait_until(lambda: server.worker.running == 1)
        edits = [threads.submit(edit, server) for _ in range(app_module._READERS)]
        wait_until(lambda: len(reading) == len(edits))
        server.go.set()
        try:
            assert first.result(TIMEOUT).status_code == 200
            chat = httpx.post(f"{server.address}{CHAT}", json=chat_body("hello", max_tokens=4), timeout=TIMEOUT)
            assert chat.status_code == 200
        finally:
            go_on.set()
        assert [response.result().status_code for response in edits] == [200] * len(edits)

"""Run a server in a thread, also with a blocked model; build requests and images for it."""

import base64
import io
import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import numpy as np
from conftest import CHECKPOINT
from PIL import Image

from bagel_rt import Bagel
from bagel_rt.serve.app import create_app
from bagel_rt.serve.limits import Limits
from bagel_rt.serve.run import make_server

DRAW, EDIT, CHAT = "/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"
LIMITS = Limits(body=1 << 20, pixels=1 << 16, images=2, prompt_tokens=200, side=96, steps=2000, outputs=3, queue=4)
IMAGE = {"prompt": "x", "size": "32x32", "num_timesteps": 3, "seed": 1}
TIMEOUT = 120


@contextmanager
def running_server(limits=LIMITS, keys=(), bagel=None, tls_cert=None, tls_key=None, **options):
    """Run a server in a thread; yields its address and application."""
    bagel = bagel or Bagel.from_pretrained(CHECKPOINT, device="cpu")
    app = create_app(bagel, "small", limits, keys, **options)
    server = make_server(app, log_level="error", tls_cert=tls_cert, tls_key=tls_key)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        app.state.uvicorn = server
        yield f"http{'s' if tls_cert else ''}://127.0.0.1:{listening.getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def paused_server(**limits):
    """Run a server whose model stays at its first step until ``go`` is set."""
    with running_server(Limits(**limits)) as (address, app), httpx.Client(base_url=address, timeout=TIMEOUT) as http:
        engine, go = app.state.server.bagel.engine, threading.Event()
        draw, answer, step = engine.run_images, engine.run_answer, SimpleNamespace(stage="image", step=1)

        def wait(progress):
            while not go.wait(0.005):
                progress(step)

        def run_images(requests, progress):
            wait(progress)
            return draw(requests, progress)

        def run_answer(request, progress):
            yield "first "
            wait(progress)
            yield from answer(request, progress)

        engine.run_images, engine.run_answer = run_images, run_answer
        worker = app.state.server.worker
        try:
            yield SimpleNamespace(http=http, app=app, worker=worker, go=go, address=address, uvicorn=app.state.uvicorn)
        finally:
            go.set()


def wait_until(condition):
    """Wait for a condition."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def draw(server, **options):
    """Request a small image; returns the response."""
    return httpx.post(f"{server.address}{DRAW}", json=IMAGE | options, timeout=TIMEOUT)


def send(server, route, content, kind="application/json", length=None):
    """Open a connection and send a request, incomplete if ``length`` exceeds the content."""
    connection = socket.create_connection(server.address.removeprefix("http://").split(":"), TIMEOUT)
    length = len(content) if length is None else length
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def png(width=48, height=32, seed=0) -> bytes:
    """A PNG file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def data_url(content: bytes) -> str:
    """The data URL of a PNG file."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def decode_image(encoded: str) -> Image.Image:
    """Decode a base64 image of a response."""
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def metric(http, name: str) -> float:
    """The sum of the server's metrics whose names start with ``name``."""
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def chat_body(*parts, **options) -> dict:
    """The body of a chat with one message of texts and image parts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "user", "content": content}], **options}


def image_part(url: str) -> dict:
    """An image in a message."""
    return {"type": "image_url", "image_url": {"url": url}}

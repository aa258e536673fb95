"""Connections, headers, URLs and slow bodies are bounded."""

import socket
import time

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import httpx
from serving import DRAW, IMAGE, TIMEOUT, paused_server, running_server, send, wait_until

from bagel_rt.serve import middleware, protocol
from bagel_rt.serve.limits import Limits


@pytest.fixture(scope="module")
def server():
    with running_server() as (address, _):
        yield address.removeprefix("http://").split(":")


def exchange(server, *pieces: bytes) -> bytes:
    """Send pieces until the server closes the connection; returns what it sent."""
    with socket.create_connection(server, TIMEOUT) as connection:
        received = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
            while data := connection.recv(1 << 16):
                received += data
        except ConnectionError:  # reset: it closed while this side still sent
            pass
        return received


HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


def test_long_headers_get_431(server):
    assert exchange(server, HEAD + b"A: " + b"x" * 40000).startswith(b"HTTP/1.1 431")
    assert exchange(server, HEAD + b"A: " + b"x" * 31000 + b"\r\nB: " + b"x" * 2000 + b"\r\n\r\n").startswith(
        b"HTTP/1.1 431"
    )
    begun = time.monotonic()
    exchange(server, HEAD + b"A: ", *[b"x" * (1 << 20)] * 128)
    assert time.monotonic() - begun < 10
    assert exchange(server, HEAD + b"A: " + b"x" * 30000 + b"\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_long_urls_get_414(server):
    assert exchange(server, b"GET /" + b"x" * 40000).startswith(b"HTTP/1.1 414")
    long = HEAD.replace(b"/health", b"/health?" + b"x" * 9000)
    assert exchange(server, long + b"\r\n").startswith(b"HTTP/1.1 414")


def test_other_protocols_get_400(server):
    assert exchange(server, b"\x16\x03\x01\x02\x00\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_slow_headers_and_silent_connections_are_closed(server, monkeypatch):
    monkeypatch.setattr(protocol, "_HEAD_SECONDS", 0.2)
    assert exchange(server, HEAD).startswith(b"HTTP/1.1 408")
    assert exchange(server) == b""
    kept = HEAD.replace(b"Connection: close\r\n", b"") + b"\r\n"
    assert exchange(server, kept + HEAD).count(b"HTTP/1.1 ") == 2  # 200, then 408 for the unfinished second request


def test_slow_bodies_are_refused(server, monkeypatch):
    monkeypatch.setattr(middleware, "_BODY_SECONDS", 0.2)
    head = f"POST {DRAW} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 99\r\n\r\n".encode()
    assert exchange(server, head).startswith(b"HTTP/1.1 408")
    assert exchange(server, head + b"{").startswith(b"HTTP/1.1 408")


def test_idle_connections_give_way_to_new_ones():
    with running_server(Limits(connections=20)) as (address, app):
        host, port = address.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, port)) for _ in range(60)]
        assert httpx.get(f"{address}/health", timeout=TIMEOUT).status_code == 200
        assert len(app.state.uvicorn.server_state.connections) <= 20
        for connection in idle:
            connection.close()


def test_running_requests_keep_their_connection():
    with paused_server(connections=2) as server:
        host, port = server.address.removeprefix("http://").split(":")
        running_one = send(server, DRAW, httpx.Request("POST", server.address, json=IMAGE).content)
        wait_until(lambda: server.worker.running == 1)
        idle = [socket.create_connection((host, port)) for _ in range(9)]
        assert httpx.get(f"{server.address}/health", timeout=TIMEOUT).status_code == 200
        server.go.set()
        assert running_one.recv(12) == b"HTTP/1.1 200"
        for connection in idle:
            connection.close()


def test_unfinished_bodies_of_one_client_do_not_keep_others_out():
    with running_server(Limits(queue=2, batch=1, side=96)) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        head = f"POST {DRAW} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n".encode()
        slow = [socket.create_connection((host, port)) for _ in range(20)]
        for connection in slow:
            connection.sendall(head)
        invalid = IMAGE | {"num_timesteps": 0}
        wait_until(lambda: httpx.post(address + DRAW, json=invalid, timeout=TIMEOUT).status_code == 429)
        other = httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2"), timeout=TIMEOUT)
        assert other.post(address + DRAW, json=IMAGE).status_code == 200
        for connection in slow:
            connection.close()
        wait_until(lambda: httpx.post(address + DRAW, json=invalid, timeout=TIMEOUT).status_code == 400)


def test_connections_are_bounded_by_the_limit_of_open_files():
    resource = pytest.importorskip("resource")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert protocol.max_connections(Limits(connections=10)) == 10
    assert protocol.max_connections(Limits(connections=files + 1000)) < files

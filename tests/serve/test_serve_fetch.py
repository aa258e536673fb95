"""Images fetched by the server: address checks, and a local TLS site in place of a public one."""

import socket
import ssl
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import trustme
from serving import LIMITS, png

from bagel_rt.serve import images

NAME = "images.example"
OK, END = b"HTTP/1.1 200 OK\r\n", b"\r\n"
SECONDS = 0.5


@pytest.mark.parametrize(
    "host, addresses, allowed",
    [
        ("images.example", ["93.184.216.34"], True),
        ("inside.example", ["10.0.0.7"], False),
        ("mixed.example", ["93.184.216.34", "127.0.0.1"], False),
        ("metadata.example", ["169.254.169.254"], False),
        ("mapped.example", ["::ffff:192.168.0.1"], False),
        ("six.example", ["fd00::1"], False),
        ("tunnel.example", ["64:ff9b::7f00:1"], False),
        ("older-tunnel.example", ["2002:7f00:1::"], False),
    ],
)
def test_only_public_addresses_are_fetched(monkeypatch, host, addresses, allowed):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    if allowed:
        assert images.public_address(host, 443) == addresses[0]
    else:
        with pytest.raises(ValueError, match="which is not public"):
            images.public_address(host, 443)
    with pytest.raises(ValueError, match="must be a data: URL or an https URL on good.example"):
        images.read_url(f"https://{host}/a.png", LIMITS, frozenset({"good.example"}))


@pytest.fixture(scope="module")
def authority():
    """A certificate authority."""
    return trustme.CA()


@pytest.fixture
def site(authority, monkeypatch):
    """A TLS server with the certificate of ``NAME``; all names resolve to it. It sends its ``pieces``, with a ``pause``
    after each; ``requests`` has what it received."""
    certified, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert(NAME).configure_cert(certified)
    authority.configure_trust(trusting)
    monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
    monkeypatch.setattr(images, "public_address", lambda host, port: "127.0.0.1")
    listening = socket.create_server(("127.0.0.1", 0))
    site = SimpleNamespace(port=listening.getsockname()[1], pieces=[], pause=0.0, requests=[])

    def response(connection):
        with suppress(OSError), certified.wrap_socket(connection, server_side=True) as secure:
            request = b""
            while not request.endswith(2 * END):
                request += secure.recv(1)
            site.requests.append(request)
            for piece in site.pieces:
                secure.sendall(piece)
                time.sleep(site.pause)

    def answer_all():
        with suppress(OSError):
            while True:
                response(listening.accept()[0])

    thread = threading.Thread(target=answer_all)
    thread.start()
    yield site
    listening.shutdown(socket.SHUT_RDWR)
    thread.join()
    listening.close()


def fetched(site, name=NAME, path="/a.png?b=c"):
    """Fetch the site's image."""
    return images.read_url(f"https://{name}:{site.port}{path}", LIMITS, frozenset({name}))


@pytest.mark.parametrize("length", [True, False])
def test_image_is_fetched(site, length):
    content = png()
    head = b"Content-Length: %d\r\n" % len(content) if length else b""
    site.pieces = [OK + head + END, content]
    assert fetched(site) == content
    assert site.requests[0].startswith(b"GET /a.png?b=c HTTP/1.1\r\nHost: images.example:")


@pytest.mark.parametrize(
    "pieces, message",
    [
        ([b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1/a\r\n\r\n"], "302 Found. Redirects are not followed"),
        ([b"HTTP/1.1 404 Not Found\r\n\r\n"], "returned 404"),
        ([OK + END, b"x" * (LIMITS.body + 1)], f"at most {LIMITS.body} bytes"),
        ([OK + b"Content-Length: 9999\r\n\r\n", png()[:200]], "9799 bytes before the end|cannot fetch the image"),
        ([b"SSH-2.0-OpenSSH\r\n"], "cannot fetch the image"),
        ([], "cannot fetch the image"),
    ],
)
def test_fetch_errors_are_explained(site, pieces, message):
    site.pieces = pieces
    with pytest.raises(ValueError, match=message):
        fetched(site)
    assert len(site.requests) == 1


def test_certificate_must_match_the_host(site):
    with pytest.raises(ValueError, match="cannot fetch the image from other.example: .*certificate verify failed"):
        fetched(site, "other.example")
    assert not site.requests


@pytest.mark.parametrize(
    "pieces",
    [
        [b"HTTP/1.1 200", *[b" "] * 200],
        [OK, *[b"X: y\r\n"] * 90],
        [b"HTTP/1.1 100 Continue\r\n\r\n"] * 90,
        [OK + END, *[b"x"] * 200],
    ],
    ids=["status", "headers", "continue", "body"],
)
def test_slow_site_times_out(site, monkeypatch, pieces):
    monkeypatch.setattr(images, "_FETCH_SECONDS", SECONDS)
    site.pieces, site.pause = pieces, SECONDS / 5
    begun = time.monotonic()
    with pytest.raises(ValueError, match="took over 0.5 s|timed out"):
        fetched(site)
    assert time.monotonic() - begun < 10 * SECONDS


def test_silent_site_times_out(site, monkeypatch):
    monkeypatch.setattr(images, "_FETCH_SECONDS", SECONDS)
    begun = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        site.port = mute.getsockname()[1]
        with pytest.raises(ValueError, match="cannot fetch the image"):
            fetched(site)
    assert time.monotonic() - begun < 10 * SECONDS

"""Fetch and encode images.

Images arrive as data URLs or files. Other URLs are fetched only from hosts on the server's allowlist, over HTTPS,
without redirects, and never from an address that is not public.
"""

import base64
import binascii
import http.client
import io
import ipaddress
import socket
import ssl
import time
from typing import Any
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

from PIL import Image

from bagel_rt.serve.limits import Limits

JPEG_QUALITY = 95
"""Default quality of JPEG and WebP, up to 100."""

_MEDIA = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")  # from that of URLs
_FETCH_SECONDS = 10.0  # from the connection to the last byte
# IPv6 networks that lead to any IPv4 address, private ones included: NAT64 and 6to4.
_TUNNELS = [ipaddress.ip_network(name) for name in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16")]


def read_url(url: str, limits: Limits, hosts: frozenset[str] = frozenset()) -> bytes:
    """Return the file of a data URL, or fetch it from one of ``hosts``. Blocks meanwhile.

    Raises:
        ValueError: another kind of URL, or too large.
    """
    url = url.strip()
    if url[:5].lower() == "data:":
        return _decode_data_url(url)
    parts = urlsplit(url)
    if parts.scheme != "https" or parts.hostname is None or parts.hostname.lower() not in hosts:
        allowed = f" or an https URL on {', '.join(sorted(hosts))}" if hosts else ""
        raise ValueError(f"image_url must be a data: URL{allowed}, got {url[:60]!r}")
    return _fetch(parts, parts.hostname, limits.body)


def encode(image: Image.Image, output_format: str, quality: int = JPEG_QUALITY) -> str:
    """Encode an image as "png", or as "jpeg" or "webp" with a quality from 0 to 100, in base64."""
    out = io.BytesIO()
    image.save(out, _MEDIA[output_format], **({} if output_format == "png" else {"quality": max(quality, 1)}))
    return base64.b64encode(out.getvalue()).decode()


def _decode_data_url(url: str) -> bytes:
    """Decode a data URL: percent-encoded, or base64 with or without padding and line breaks, in either alphabet."""
    header, comma, content = url.partition(",")
    if not comma:
        raise ValueError("image_url must be a data URL such as data:image/png;base64,..., got one without a comma")
    data = unquote_to_bytes(content)
    if not header.rstrip().lower().endswith(";base64"):
        return data
    data = data.translate(_STANDARD_ALPHABET, b" \t\r\n\f\v").rstrip(b"=")
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"image_url must be a data URL with valid base64: {error}") from None


class _DeadlineSocket(ssl.SSLSocket):
    """A socket with one deadline for everything it receives: a plain timeout restarts with every byte."""

    end = float("inf")

    def recv_into(self, *arguments: Any) -> int:
        self.settimeout(_remaining(self.end))
        return super().recv_into(*arguments)


class _PinnedConnection(http.client.HTTPSConnection):
    """Connects to an address that was checked, and verifies the certificate for the host's name: a second DNS lookup
    could return a private address."""

    def __init__(self, host: str, port: int, address: str, end: float):
        context = ssl.create_default_context()
        context.sslsocket_class = _DeadlineSocket
        super().__init__(host, port, context=context)
        self._tls, self._address, self._end = context, address, end

    def connect(self) -> None:
        raw = socket.create_connection((self._address, self.port), _remaining(self._end))
        raw.settimeout(_remaining(self._end))
        secure = self._tls.wrap_socket(raw, server_hostname=self.host)
        assert isinstance(secure, _DeadlineSocket)  # the context's class
        secure.end = self._end
        self.sock = secure


def _fetch(parts: SplitResult, host: str, limit: int) -> bytes:
    """Fetch the content of a URL on an allowed host."""
    port = parts.port or 443
    address = public_address(host, port)
    connection = _PinnedConnection(host, port, address, time.monotonic() + _FETCH_SECONDS)
    try:
        path = parts.path or "/"
        connection.request("GET", f"{path}?{parts.query}" if parts.query else path, headers={"Accept": "image/*"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"{host} returned {response.status} {response.reason}. Redirects are not followed.")
        data = bytearray()
        while chunk := response.read1(1 << 16):  # whatever has arrived: read() would wait for all of it
            data += chunk
            if len(data) > limit:
                raise ValueError(f"the image on {host} must have at most {limit} bytes")
        if response.length:
            raise ValueError(f"{host} closed the connection {response.length} bytes before the end of the image")
        return bytes(data)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"cannot fetch the image from {host}: {error}") from None
    finally:
        connection.close()


def _remaining(end: float) -> float:
    """Seconds until a deadline."""
    remaining = end - time.monotonic()
    if remaining <= 0:
        raise TimeoutError(f"took over {_FETCH_SECONDS:g} s")
    return remaining


def public_address(host: str, port: int) -> str:
    """One address of a host whose addresses are all public.

    Raises:
        ValueError: an address is private, loopback or otherwise not public; or the host has none.
    """
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{host} has no address: {error}") from None
    for address in found:
        parsed = ipaddress.ip_address(address.partition("%")[0])
        parsed = getattr(parsed, "ipv4_mapped", None) or parsed
        if not parsed.is_global or parsed.is_multicast or any(parsed in network for network in _TUNNELS):
            raise ValueError(f"{host} has the address {address}, which is not public")
    return sorted(found)[0]

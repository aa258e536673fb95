"""Pictures in requests and in answers.

A request brings pictures as data URLs or as files; addresses on the network are fetched only from hosts that the server
was told to allow, over HTTPS, without redirects, and never from an address that is not public.
"""

import base64
import binascii
import http.client
import io
import ipaddress
import socket
import ssl
import time
from urllib.parse import urlsplit

from PIL import Image

from bagel_rt.models.bagel.images import ResizeRule, open_image, to_rgb
from bagel_rt.serve.limits import Limits

_MEDIA = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
_FETCH_SECONDS = 10.0  # from the connection to the last byte
_SCANS = 100  # of a JPEG picture; progressive ones have about ten
_TUNNELS = [
    ipaddress.ip_network(name) for name in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16")
]  # to any IPv4 address


def read_url(url: str, limits: Limits, hosts: frozenset[str] = frozenset()) -> Image.Image:
    """The picture of a data URL, or of an address on one of these hosts. Blocks while it is fetched and decoded.

    Raises:
        ValueError: it is another kind of address, no picture, or too large.
    """
    if url[:5].lower() == "data:":
        return read_picture(_data(url), limits)
    parts = urlsplit(url)
    if parts.scheme != "https" or parts.hostname is None or parts.hostname.lower() not in hosts:
        allowed = f", or https addresses on {', '.join(sorted(hosts))}" if hosts else ""
        raise ValueError(f"image_url is {url[:60]!r}: allowed are data: URLs{allowed}")
    return read_picture(_fetch(parts, limits.body), limits)


def read_picture(data: bytes, limits: Limits) -> Image.Image:
    """An encoded picture in RGB; its size is looked at before it is decoded.

    Raises:
        ValueError: it is no picture, damaged, has more pixels or scans than are allowed, or colours that are not RGB's.
    """
    # A scan is asked for with a few bytes, and takes as long as a whole picture. In other data, such as the video that
    # telephones append, its mark comes by chance once in 65536 bytes.
    most = _SCANS + len(data) // 32768
    if data.count(b"\xff\xda") > most:
        raise ValueError(f"the given {len(data)} bytes have over {most} scans of a JPEG picture: save it again")
    image = open_image(data, limits.pixels)
    try:
        return to_rgb(image)
    except Exception as error:  # Pillow raises whatever its converters do at a damaged palette
        raise ValueError(f"the given {len(data)} bytes: the picture has no RGB form: {error}") from None


def as_seen(image: Image.Image, rule: ResizeRule) -> Image.Image:
    """The picture as the model's first step makes it, if that is smaller: what waits in the queue should not be large.

    The rule leaves what it made as it is, so the model sees the same.
    """
    size = rule.output_size(*image.size)
    smaller = size[0] * size[1] < image.width * image.height
    return rule.resize(image) if smaller and rule.output_size(*size) == size else image


def encode(image: Image.Image, form: str) -> str:
    """Base64 of a picture as "png", "jpeg" or "webp"."""
    out = io.BytesIO()
    image.save(out, _MEDIA[form], **({"quality": 95} if form != "png" else {}))
    return base64.b64encode(out.getvalue()).decode()


def _data(url: str) -> bytes:
    header, comma, content = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise ValueError("image_url is a data URL without base64 content: write data:image/png;base64,...")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"image_url is a data URL whose base64 is damaged: {error}") from None


class _Ending(ssl.SSLSocket):
    """Gives nothing after a moment in time, however slowly it comes until then: a timeout by itself is begun anew with
    every byte."""

    end = float("inf")

    def recv_into(self, *arguments) -> int:
        self.settimeout(_left(self.end))
        return super().recv_into(*arguments)


class _Pinned(http.client.HTTPSConnection):
    """A connection to an address that was looked at, under the name that the certificate is for."""

    def __init__(self, host: str, port: int, address: str, end: float):
        context = ssl.create_default_context()
        context.sslsocket_class = _Ending
        super().__init__(host, port, context=context)
        self._address, self._end = address, end

    def connect(self) -> None:
        raw = socket.create_connection((self._address, self.port), _left(self._end))
        raw.settimeout(_left(self._end))
        self.sock = self._context.wrap_socket(raw, server_hostname=self.host)
        self.sock.end = self._end


def _fetch(parts, limit: int) -> bytes:
    """What an allowed address gives."""
    host, port = parts.hostname, parts.port or 443
    address = public_address(host, port)
    connection = _Pinned(host, port, address, time.monotonic() + _FETCH_SECONDS)
    try:
        path = parts.path or "/"
        connection.request("GET", f"{path}?{parts.query}" if parts.query else path, headers={"Accept": "image/*"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"{host} answers {response.status} {response.reason}: redirects are not followed")
        data = bytearray()
        while chunk := response.read1(1 << 16):  # what is there: read() would wait for all of it, however slow
            data += chunk
            if len(data) > limit:
                raise ValueError(f"the picture on {host} has over {limit} bytes")
        return bytes(data)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"{host} gives no picture: {error}") from None
    finally:
        connection.close()


def _left(end: float) -> float:
    """Seconds until then."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"it takes over {_FETCH_SECONDS:g} s")
    return left


def public_address(host: str, port: int) -> str:
    """An address of a host, if all that it has are public.

    Raises:
        ValueError: one is private, of this machine, or otherwise not on the public network; or there is none.
    """
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{host} has no address: {error}") from None
    for address in found:
        parsed = ipaddress.ip_address(address.partition("%")[0])
        parsed = getattr(parsed, "ipv4_mapped", None) or parsed
        carries = any(parsed in network for network in _TUNNELS)
        if not parsed.is_global or parsed.is_multicast or carries:
            raise ValueError(f"{host} has the address {address}, which is not public")
    return sorted(found)[0]

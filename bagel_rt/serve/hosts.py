"""Refuse requests that web pages of other origins send from a user's browser."""

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from bagel_rt.serve.errors import RequestError, error_response_for

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class HostCheck:
    """ASGI middleware: checks the headers Host and Origin.

    A page may send requests to a server on the same machine or network. The browser then adds the page's Origin. A
    page whose own name resolves to this server's address (DNS rebinding) has the same origin, but another Host.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, origins: Collection[str]):
        """
        Args:
            app: the wrapped application.
            hosts: allowed names in Host, without ports; None for all.
            origins: allowed origins such as "https://chat.example.com", beside the server's own.
        """
        self._app, self._origins = app, frozenset(origin.lower().rstrip("/") for origin in origins)
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(dict(scope["headers"])) if scope["type"] == "http" else None
        if error is not None:
            await error_response_for(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, headers: dict[bytes, bytes]) -> RequestError | None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._hosts is not None and _name(host) not in self._hosts:
            message = f"Host must be one of {', '.join(sorted(self._hosts))}, got {host[:60]!r}."
            return RequestError(f"{message} Allow it with --allowed-host.", "", "host_not_allowed", 403)
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin not in self._origins and origin.partition("://")[2] != host:
            message = f"Origin must be that of this server or an allowed one, got {origin[:60]!r}."
            return RequestError(f"{message} Allow it with --allow-origin.", "", "origin_not_allowed", 403)
        return None


def _name(host: str) -> str | None:
    """The name in a Host header: without port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:  # unbalanced brackets
        return None

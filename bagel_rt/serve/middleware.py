"""Between the network and the routes: API key, and limits of headers, bodies and requests."""

import asyncio
import hmac
import os
import time
from collections.abc import Sequence
from pathlib import Path

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bagel_rt.model_thread import Busy, DeadlineExceeded, Stopping
from bagel_rt.serve.admission import Admission, Admitted
from bagel_rt.serve.errors import RequestError, error_response, error_response_for
from bagel_rt.serve.limits import Limits

_KEY, _KEY_FILE = "BAGEL_RT_API_KEY", "BAGEL_RT_API_KEY_FILE"
_BODY_SECONDS = 10.0  # for a body, beside a second for each _BODY_RATE bytes
_BODY_RATE = 16 << 10
MAX_HEAD = 32 << 10
"""Bytes of a request's headers."""
MAX_URL = 8 << 10
"""Bytes of a path with its query."""


def read_keys() -> tuple[str, ...]:
    """The API keys of which clients must send one: that in BAGEL_RT_API_KEY, or the lines of the file named by
    BAGEL_RT_API_KEY_FILE. Empty if neither variable is set.

    Raises:
        ValueError: both are set, there is no key, which would leave the server open, or the file cannot be read.
    """
    variables = [name for name in (_KEY, _KEY_FILE) if name in os.environ]
    if not variables:
        return ()
    if len(variables) == 2:
        raise ValueError(f"{_KEY} and {_KEY_FILE} are both set. Unset one of them.")
    name, value = variables[0], os.environ[variables[0]]
    try:
        lines = [value] if name == _KEY else Path(value).read_text().splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{_KEY_FILE} must name a text file with one key per line: {error}.") from None
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ValueError(f"{name} is set but empty. Set it to the key that clients must send, or unset it.")
    return keys


class Gate:
    """ASGI middleware: refuses requests without the key, long URLs and headers, large or slow bodies while they are
    received, and more requests than the server can hold at once."""

    def __init__(self, app: ASGIApp, keys: str | Sequence[str], limits: Limits):
        """
        Args:
            app: the wrapped application.
            keys: an API key or several, of which a request under /v1/ must have one; empty for none.
            limits: of bodies, and of requests under /v1/.
        """
        self._app, self._body, self._admission = app, limits.body, Admission(limits)
        # Once for receiving and working, once more for a client that receives slowly.
        self._seconds = 2 * limits.seconds
        keys = [keys] if isinstance(keys, str) else keys  # not its letters
        self._keys = [key.encode("utf-8", "surrogateescape") for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        error = self._refusal(scope)
        if error is not None:
            return await error(scope, receive, send)
        if not scope["path"].startswith("/v1/"):
            return await self._app(scope, receive, send)
        try:
            admitted = Admitted(self._admission, (scope.get("client") or ("",))[0])
        except Busy as busy:
            return await error_response_for(busy)(scope, receive, send)
        try:
            await self._pass(scope, receive, send, admitted)
        finally:
            admitted.close()

    def _refusal(self, scope: Scope) -> Response | None:
        """The response to a request that is refused for its headers; None for others."""
        headers, wrong = scope["headers"], "invalid_request_error"
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_URL:
            return error_response(414, f"the URL must have at most {MAX_URL} bytes", wrong)
        if sum(len(name) + len(value) + 4 for name, value in headers) > MAX_HEAD:
            return error_response(431, f"the headers must have at most {MAX_HEAD} bytes", wrong)
        named = dict(headers)
        if scope["path"].startswith("/v1/") and not self._authorized(named.get(b"authorization", b"")):
            message = "the API key is missing or wrong. Send it as 'Authorization: Bearer KEY'."
            return error_response(401, message, wrong, "invalid_api_key", WWW_Authenticate="Bearer")
        length = named.get(b"content-length", b"0")
        if length.isdigit() and (len(length) >= 20 or int(length) > self._body):
            return error_response_for(_too_large(self._body))
        return None

    async def _pass(self, scope: Scope, receive: Receive, send: Send, admitted: Admitted) -> None:
        begun, seen, started = time.monotonic(), 0, False

        async def bounded() -> Message:
            nonlocal seen
            left = None if admitted.complete else begun + _BODY_SECONDS + seen / _BODY_RATE - time.monotonic()
            with anyio.move_on_after(left) as scope:
                message = await receive()
            if scope.cancelled_caught:
                raise _too_slow()
            size = len(message.get("body", b""))
            if seen + size > self._body:
                raise _too_large(self._body)
            admitted.receive(size)
            seen += size
            if not message.get("more_body", False):
                admitted.hold()
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            with anyio.move_on_after(self._seconds):
                await self._app({**scope, "bagel_rt.release": admitted.release_body}, bounded, watched)
                return
            error: Exception = DeadlineExceeded()
        except asyncio.CancelledError:  # uvicorn shuts down and gives this request no more time
            error = Stopping()
        if not started:
            await error_response_for(error)(scope, receive, send)

    def _authorized(self, header: bytes) -> bool:
        if not self._keys:
            return True
        scheme, _, sent = header.partition(b" ")
        # Compares all keys, so that the time does not tell which one is similar.
        matches = [hmac.compare_digest(sent.strip(), key) for key in self._keys]
        return any(matches) and scheme.lower() == b"bearer"


def release_body(request: Request) -> None:
    """Tell the :class:`Gate` that a request's body is no longer held in memory: other bodies may take its room."""
    request.scope["bagel_rt.release"]()


def _too_large(limit: int) -> RequestError:
    return RequestError(f"the body must have at most {limit} bytes. Send smaller images.", "", "body_too_large", 413)


def _too_slow() -> RequestError:
    message = f"the body must arrive within {_BODY_SECONDS:g} s plus one second for each {_BODY_RATE} bytes"
    return RequestError(message, "", "body_too_slow", 408)

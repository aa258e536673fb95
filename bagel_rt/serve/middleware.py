"""Between the network and the routes: API key, size limits, and errors mapped to responses."""

import asyncio
import hmac
import logging
import os
import time
import uuid

import anyio
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bagel_rt.errors import Cancelled
from bagel_rt.model_thread import Busy, DeadlineExceeded, Stopping
from bagel_rt.serve.admission import Admission, Admitted
from bagel_rt.serve.errors import RequestError, describe
from bagel_rt.serve.limits import Limits
from bagel_rt.serve.metrics import CLOSED
from bagel_rt.serve.worker import Failed

log = logging.getLogger("bagel_rt.serve")

_KEY = "BAGEL_RT_API_KEY"
_BODY_SECONDS = 10.0  # for a body, beside a second for each _BODY_RATE bytes
_BODY_RATE = 16 << 10
MAX_HEAD = 32 << 10
"""Bytes of a request's headers."""
MAX_URL = 8 << 10
"""Bytes of a path with its query."""


class TooLarge(Exception):
    """A body has more bytes than its argument, the limit."""


def read_key() -> str | None:
    """The API key that clients must send, from the environment; None for none.

    Raises:
        ValueError: it is set but empty; that would leave the server open.
    """
    key = os.environ.get(_KEY)
    if key is not None and not key.strip():
        raise ValueError(f"{_KEY} is set but empty. Set it to the key that clients must send, or unset it.")
    return key and key.strip()


class TooSlow(Exception):
    """A body arrives more slowly than :data:`_BODY_RATE`."""


class Gate:
    """ASGI middleware: refuses requests without the key, long URLs and headers, large or slow bodies while they are
    received, and more requests than the server can hold at once."""

    def __init__(self, app: ASGIApp, key: str | None, limits: Limits):
        """
        Args:
            app: the wrapped application.
            key: API key required under /v1/; None for none.
            limits: of bodies, and of requests under /v1/.
        """
        self._app, self._body, self._admission = app, limits.body, Admission(limits)
        # Once for receiving and working, once more for a client that receives slowly.
        self._seconds = 2 * limits.seconds
        self._key = None if key is None else key.encode("utf-8", "surrogateescape")

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
            return error_response_for(TooLarge(self._body))
        return None

    async def _pass(self, scope: Scope, receive: Receive, send: Send, admitted: Admitted) -> None:
        begun, seen, started = time.monotonic(), 0, False

        async def bounded() -> Message:
            nonlocal seen
            left = None if admitted.complete else begun + _BODY_SECONDS + seen / _BODY_RATE - time.monotonic()
            with anyio.move_on_after(left) as scope:
                message = await receive()
            if scope.cancelled_caught:
                raise TooSlow
            size = len(message.get("body", b""))
            if seen + size > self._body:
                raise TooLarge(self._body)
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
                return await self._app({**scope, "bagel_rt.release": admitted.release_body}, bounded, watched)
            error: Exception = DeadlineExceeded()
        except asyncio.CancelledError:  # uvicorn shuts down and gives this request no more time
            error = Stopping()
        if not started:
            await error_response_for(error)(scope, receive, send)

    def _authorized(self, header: bytes) -> bool:
        if self._key is None:
            return True
        scheme, _, key = header.partition(b" ")
        return hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"


def release_body(request: Request) -> None:
    """Tell the :class:`Gate` that a request's body is no longer held in memory: other bodies may take its room."""
    request.scope["bagel_rt.release"]()


def error_response(
    status: int, message: str, kind: str, code: str | None = None, param: str | None = None, **headers: str
) -> JSONResponse:
    """An error response in OpenAI's format."""
    body = {"error": {"message": message[:1000], "type": kind, "param": param, "code": code}}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse(body, status, headers=names)


def error_response_for(error: Exception) -> JSONResponse:
    """Map an exception to an error response; log server faults under the id in the response."""
    wrong, ours = "invalid_request_error", "server_error"
    if isinstance(error, ValidationError):
        error = describe(error)
    if isinstance(error, RequestError):
        return error_response(error.status, str(error), wrong, error.code, error.param or None)
    if isinstance(error, HTTPException):
        return error_response(error.status_code, str(error.detail), wrong, **(error.headers or {}))
    if isinstance(error, TooLarge):
        message = f"the body must have at most {error.args[0]} bytes. Send smaller images."
        return error_response(413, message, wrong, "body_too_large")
    if isinstance(error, TooSlow):
        message = f"the body must arrive within {_BODY_SECONDS:g} s plus one second for each {_BODY_RATE} bytes"
        return error_response(408, message, wrong, "body_too_slow")
    if isinstance(error, Busy):
        return error_response(429, "the queue is full. Try again.", "rate_limit_error", "busy", Retry_After="1")
    if isinstance(error, DeadlineExceeded):
        message = "the request took too long. Ask for less, or try again."
        return error_response(504, message, ours, "timeout", X_Should_Retry="false")
    if isinstance(error, Stopping):
        return error_response(
            503, "the server takes no more requests. Try again later.", ours, "stopping", Retry_After="5"
        )
    if isinstance(error, (Cancelled, ClientDisconnect)):
        return error_response(CLOSED, "the client disconnected", ours, "cancelled")
    if isinstance(error, ValueError):
        return error_response(400, str(error), wrong)
    if isinstance(error, Failed) and error.memory:
        message = f"out of memory in this request (error {error.name}). Ask for smaller or fewer images."
        return error_response(503, message, ours, "memory", X_Should_Retry="false")
    if isinstance(error, Failed):
        return error_response(500, f"the model failed in this request (error {error.name})", ours, "internal")
    name = uuid.uuid4().hex[:12]
    log.error("error %s", name, exc_info=error)
    return error_response(500, f"the server failed in this request (error {name})", ours, "internal")

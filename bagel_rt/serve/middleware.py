"""Between the network and the routes: API key, size limits, and errors mapped to responses."""

import asyncio
import hmac
import json
import logging
import os
import uuid

import anyio
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from bagel_rt.errors import Cancelled
from bagel_rt.model_thread import Busy, DeadlineExceeded, Stopping
from bagel_rt.serve.limits import Limits
from bagel_rt.serve.metrics import CLOSED
from bagel_rt.serve.worker import Failed

log = logging.getLogger("bagel_rt.serve")

_KEY = "BAGEL_RT_API_KEY"
_PIECES = 1 << 16  # JSON punctuation in a body; base64, which may be long, has none


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


class Gate:
    """ASGI middleware: refuses requests without the key, bodies over the limit while they are received, and more
    requests than the server can hold at once."""

    def __init__(self, app, key: str | None, limits: Limits):
        """
        Args:
            app: the wrapped application.
            key: API key required under /v1/; None for none.
            limits: of bodies, and of requests under /v1/.
        """
        self._app, self._body, self._bodies, self._requests = app, limits.body, limits.bodies, limits.requests
        # Once for receiving and working, once more for a client that receives slowly.
        self._seconds = 2 * limits.seconds
        self._key = key and key.encode("utf-8", "surrogateescape")
        self._inside = 0
        self._held = 0  # bytes

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        guarded = scope["path"].startswith("/v1/")
        length = headers.get(b"content-length", b"0")
        if guarded and not self._authorized(headers.get(b"authorization", b"")):
            message = "the API key is missing or wrong. Send it as 'Authorization: Bearer KEY'."
            kind, code = "invalid_request_error", "invalid_api_key"
            response = error_response(401, message, kind, code, WWW_Authenticate="Bearer")
        elif guarded and self._inside >= self._requests:
            response = error_response_for(Busy())
        elif length.isdigit() and len(length) < 20 and int(length) > self._body:
            response = error_response_for(TooLarge(self._body))
        else:
            self._inside += guarded
            try:
                return await self._pass(scope, receive, send)
            finally:
                self._inside -= guarded
        await response(scope, receive, send)

    async def _pass(self, scope, receive, send) -> None:
        seen, held, started = 0, 0, False

        async def counted():
            nonlocal seen, held
            message = await receive()
            size = len(message.get("body", b""))
            if seen + size > self._body:
                raise TooLarge(self._body)
            if self._held + size > self._bodies:
                raise Busy
            seen, held, self._held = seen + size, held + size, self._held + size
            return message

        def release():
            nonlocal held
            self._held -= held
            held = 0

        async def watched(message):
            nonlocal started
            started = True
            await send(message)

        try:
            with anyio.move_on_after(self._seconds):
                return await self._app(scope | {"bagel_rt.release": release}, counted, watched)
            error = DeadlineExceeded()
        except asyncio.CancelledError:  # uvicorn shuts down and gives this request no more time
            error = Stopping()
        finally:
            release()
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
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        deepest = max(errors, key=lambda one: len(one["loc"]))  # for a text-or-list field: the error inside the list
        where = ".".join(map(str, deepest["loc"]))[:200]
        message = f"{where}: {deepest['msg']}" if where else f"body: {deepest['msg']}"
        return error_response(400, message, wrong, param=where or None)
    if isinstance(error, HTTPException):
        return error_response(error.status_code, str(error.detail), wrong, **(error.headers or {}))
    if isinstance(error, TooLarge):
        message = f"the body must have at most {error.args[0]} bytes. Send smaller images."
        return error_response(413, message, wrong, "body_too_large")
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


def parse_body(data: bytes) -> dict:
    """Parse a body as a JSON object.

    Raises:
        ValueError: not a JSON object, or so many values that parsing would take many times the body's size.
    """
    pieces = sum(map(data.count, (b",", b"[", b"{", b":")))
    if pieces > _PIECES:
        raise ValueError(f"the body must have at most {_PIECES} commas, colons and brackets, got {pieces}")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body must be JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"the body must be a JSON object, got {type(value).__name__}")
    return value

"""What stands between the network and the routes: sizes, keys, and errors that say what is wrong and nothing else."""

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
from bagel_rt.serve.limits import Limits
from bagel_rt.serve.metrics import CLOSED
from bagel_rt.serve.worker import Busy, Failed, Late, Stopping

log = logging.getLogger("bagel_rt.serve")

_KEY = "BAGEL_RT_API_KEY"
_PIECES = 1 << 16  # values in a body; base64, which may be long, has none of the characters that are counted


class TooLarge(Exception):
    """A body has more bytes than are allowed, the number that it is made with."""


def read_key() -> str | None:
    """The key that clients must send, from the environment; None for none.

    Raises:
        ValueError: it is set but empty, which would leave the server open.
    """
    key = os.environ.get(_KEY)
    if key is not None and not key.strip():
        raise ValueError(f"{_KEY} is set but empty: set it to the key that clients must send, or unset it")
    return key and key.strip()


class Gate:
    """ASGI middleware: refuses requests without the key, bodies that are too large, as they come in, and requests
    beyond those that can be held at once."""

    def __init__(self, app, key: str | None, limits: Limits):
        """
        Args:
            app: what is behind.
            key: that paths under /v1/ ask for; None for none.
            limits: of bodies, and of requests under /v1/.
        """
        self._app, self._body, self._bodies, self._requests = app, limits.body, limits.bodies, limits.requests
        # Reading and working have their time, and a client that takes its answer slowly has as much again.
        self._seconds = 2 * limits.seconds
        self._key = key and key.encode("utf-8", "surrogateescape")
        self._inside = 0
        self._held = 0  # bytes

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        guarded = scope["path"].startswith("/v1/")
        told = headers.get(b"content-length", b"0")
        if guarded and not self._knows(headers.get(b"authorization", b"")):
            answer = error_response(
                401, "the key is missing or wrong: send it as 'Authorization: Bearer KEY'", "invalid_request_error",
                "invalid_api_key", WWW_Authenticate="Bearer",
            )  # fmt: skip
        elif guarded and self._inside >= self._requests:
            answer = answer_to(Busy())
        elif told.isdigit() and len(told) < 20 and int(told) > self._body:
            answer = answer_to(TooLarge(self._body))
        else:
            self._inside += guarded
            try:
                return await self._pass(scope, receive, send)
            finally:
                self._inside -= guarded
        await answer(scope, receive, send)

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

        def forget():
            nonlocal held
            self._held -= held
            held = 0

        async def watched(message):
            nonlocal started
            started = True
            await send(message)

        try:
            with anyio.move_on_after(self._seconds):
                return await self._app(scope | {"bagel_rt.forget": forget}, counted, watched)
            error = Late()
        except asyncio.CancelledError:  # the HTTP server goes down, and has no more time for this request
            error = Stopping()
        finally:
            forget()
        if not started:
            await answer_to(error)(scope, receive, send)

    def _knows(self, given: bytes) -> bool:
        if self._key is None:
            return True
        scheme, _, key = given.partition(b" ")
        return hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"


def forget_body(request: Request) -> None:
    """Tell the :class:`Gate` that nothing is kept of a request's body any more: others have its room."""
    request.scope["bagel_rt.forget"]()


def error_response(status: int, message: str, kind: str, code: str | None = None, param: str | None = None, **headers):
    """An error in OpenAI's form."""
    body = {"error": {"message": message[:1000], "type": kind, "param": param, "code": code}}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse(body, status, headers=names)


def answer_to(error: Exception) -> JSONResponse:
    """What a client is told of an error; what is not its fault is in the log under the name that it is told."""
    wrong, ours = "invalid_request_error", "server_error"
    if isinstance(error, ValidationError):
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        deepest = max(errors, key=lambda one: len(one["loc"]))  # of a text or a list, what is wrong within the list
        where = ".".join(map(str, deepest["loc"]))[:200]
        message = f"{where}: {deepest['msg']}" if where else f"a name in the body: {deepest['msg']}"
        return error_response(400, message, wrong, param=where or None)
    if isinstance(error, HTTPException):
        return error_response(error.status_code, str(error.detail), wrong, **(error.headers or {}))
    if isinstance(error, TooLarge):
        message = f"the body has over {error.args[0]} bytes: send smaller pictures"
        return error_response(413, message, wrong, "body_too_large")
    if isinstance(error, Busy):
        return error_response(429, "too many requests wait: try again", "rate_limit_error", "busy", Retry_After="1")
    if isinstance(error, Late):
        message = "the request took too long: ask for less, or try again"
        return error_response(504, message, ours, "timeout", X_Should_Retry="false")
    if isinstance(error, Stopping):
        return error_response(503, "the server takes no more requests: try later", ours, "stopping", Retry_After="5")
    if isinstance(error, (Cancelled, ClientDisconnect)):
        return error_response(CLOSED, "the client went away", ours, "cancelled")
    if isinstance(error, ValueError):
        return error_response(400, str(error), wrong)
    if isinstance(error, Failed) and error.memory:
        message = f"not enough memory for this request (error {error.name}): ask for smaller or fewer pictures"
        return error_response(503, message, ours, "memory", X_Should_Retry="false")
    if isinstance(error, Failed):
        return error_response(500, f"the model failed at this request (error {error.name})", ours, "internal")
    name = uuid.uuid4().hex[:12]
    log.error("error %s", name, exc_info=error)
    return error_response(500, f"the server failed at this request (error {name})", ours, "internal")


def readable(data: bytes) -> dict:
    """The JSON object of a body.

    Raises:
        ValueError: it is none, or would take many times its size when it is read.
    """
    pieces = sum(map(data.count, (b",", b"[", b"{", b":")))
    if pieces > _PIECES:
        raise ValueError(f"the body has {pieces} commas, colons and brackets: allowed are {_PIECES}")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"the body is a JSON {type(value).__name__}: send an object")
    return value

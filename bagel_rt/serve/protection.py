"""What stands between the network and the routes: sizes, keys, and errors that say what is wrong and nothing else."""

import hmac
import json
import logging

from starlette.responses import JSONResponse

log = logging.getLogger("bagel_rt.serve")


def error_response(status: int, message: str, kind: str, code: str | None = None, param: str | None = None, **headers):
    """An error in OpenAI's form."""
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse(body, status, headers=names)


class TooLarge(Exception):
    """A body has more bytes than are allowed."""


class Gate:
    """ASGI middleware: refuses requests without the key and bodies that are too large, as they come in."""

    def __init__(self, app, key: str | None, body: int):
        """
        Args:
            app: what is behind.
            key: that paths under /v1/ ask for; None for none.
            body: bytes of a body at most.
        """
        self._app, self._key, self._body = app, key and key.encode(), body

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        if scope["path"].startswith("/v1/") and not self._knows(headers.get(b"authorization", b"")):
            answer = error_response(
                401, "the key is missing or wrong: send it as 'Authorization: Bearer KEY'", "invalid_request_error",
                "invalid_api_key", WWW_Authenticate="Bearer",
            )  # fmt: skip
            return await answer(scope, receive, send)
        told = headers.get(b"content-length", b"0")
        if told.isdigit() and len(told) < 20 and int(told) > self._body:
            return await too_large(self._body)(scope, receive, send)
        seen = 0

        async def counted():
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._body:
                raise TooLarge
            return message

        started = False

        async def watched(message):
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counted, watched)
        except TooLarge:
            if not started:
                await too_large(self._body)(scope, receive, send)

    def _knows(self, given: bytes) -> bool:
        if self._key is None:
            return True
        scheme, _, key = given.partition(b" ")
        return hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"


def too_large(limit: int) -> JSONResponse:
    """The answer to a body beyond the limit."""
    return error_response(
        413, f"the body has over {limit} bytes: send smaller pictures", "invalid_request_error", "body_too_large"
    )


def readable(data: bytes) -> dict:
    """The JSON object of a body.

    Raises:
        ValueError: it is none.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"the body is a JSON {type(value).__name__}: send an object")
    return value

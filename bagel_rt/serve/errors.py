"""Errors of requests and the responses to them, with OpenAI's ``code`` and ``param``."""

import logging
import reprlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from bagel_rt.errors import Cancelled
from bagel_rt.model_thread import Busy, DeadlineExceeded, Stopping
from bagel_rt.serve.metrics import CLOSED
from bagel_rt.serve.worker import Failed
from bagel_rt.validation import Spec, invalid

log = logging.getLogger("bagel_rt.serve")

_ALLOWED = {  # pydantic's error type, up to its last part -> the allowed values
    "string": "a string",
    "int": "an integer",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "list": "a list",
    "dict": "an object",
    "model": "an object",
}


class RequestError(ValueError):
    """A request that cannot be served. ``str()`` is the message for the client.

    Attributes:
        param: path of the field at fault, such as ``messages[0].content``; empty for the whole body.
        code: of OpenAI's API.
        status: of the response.
    """

    def __init__(self, message: str, param: str, code: str = "invalid_value", status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class FieldError(RequestError):
    """An error whose message starts with the field's path; ``text`` is the rest: "must be ..."."""

    def __init__(self, param: str, text: str, code: str = "invalid_value", status: int = 400):
        super().__init__(f"{param or 'the body'} {text}", param, code, status)
        self.text = text


def invalid_field(param: str, value: object, allowed: str, remedy: str = "", code: str = "invalid_value") -> FieldError:
    """The error for a value that is not allowed."""
    return FieldError(param, str(invalid("", value, allowed, remedy)).lstrip(), code)


def check_field(param: str, value: object, spec: Spec, code: str = "invalid_value") -> None:
    """Raise :class:`RequestError` unless the value is allowed."""
    if not spec.accepts(value):
        raise invalid_field(param, value, spec.allowed, spec.remedy, code)


def shown(name: str) -> str:
    """A field's name from a client, for a message: short and printable."""
    return name[:40] if name.isprintable() else ascii(name)[1:-1][:40]


@contextmanager
def errors_of(param: str, code: str = "invalid_value") -> Iterator[None]:
    """Turn a ValueError inside this block into a RequestError about a field."""
    try:
        yield
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(str(error), param, code) from None


def describe(error: ValidationError) -> FieldError:
    """The first of pydantic's errors, in the words of the API: no class names, the path as a client would write it."""
    first = error.errors(include_url=False)[0]
    kind, context = first["type"], first.get("ctx", {})
    path, value = _path(first["loc"]), first.get("input")
    raised = context.get("error")
    if isinstance(raised, FieldError):
        return FieldError(_joined(path, raised.param), raised.text, raised.code)
    if kind == "missing":
        return FieldError(path, "is missing.", "missing_required_parameter")
    if kind == "union_tag_not_found":
        return FieldError(_joined(path, "type"), "is missing.", "missing_required_parameter")
    if kind == "union_tag_invalid":
        return invalid_field(_joined(path, "type"), context["tag"], context["expected_tags"].replace(", ", " or "))
    if kind == "literal_error":
        return invalid_field(path, value, context["expected"])
    if kind in ("too_short", "too_long", "string_too_long"):
        bound = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        length = context.get("actual_length") or len(value or ())
        unit = "characters" if kind == "string_too_long" else "entries"
        return FieldError(path, f"must have {bound} {unit}, got {length}.")
    if kind in _COMPARED:
        return invalid_field(path, value, f"{_COMPARED[kind][0]} {context[_COMPARED[kind][1]]:g}")
    if kind == "string_unicode":
        return FieldError(path, "must be valid Unicode.")
    allowed = _ALLOWED.get(kind.partition("_")[0])
    if allowed is None:
        return FieldError(path, f"has a value that is not supported, got {reprlib.repr(value)}.")
    return invalid_field(path, value, allowed, code="invalid_type")


_COMPARED = {"greater_than_equal": (">=", "ge"), "less_than_equal": ("<=", "le")}


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "content", 1, "text", "text") -> "messages[0].content[1].text"."""
    path = ""
    for index, step in enumerate(location):
        if index >= 2 and location[index - 2] == "content" and isinstance(location[index - 1], int):
            continue  # pydantic names the kind of part
        path = f"{path}[{step}]" if isinstance(step, int) else _joined(path, step)
    return path


def _joined(path: str, field: str) -> str:
    return f"{path}.{field}" if path and field else path or field


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
        kind, headers = (wrong, {}) if error.status < 500 else (ours, {"Retry_After": "5"})
        return error_response(error.status, str(error), kind, error.code, error.param or None, **headers)
    if isinstance(error, HTTPException):
        return error_response(error.status_code, str(error.detail), wrong, **(error.headers or {}))
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
        reason = f": {error.reason}" if error.reason else ""
        message = f"the model failed in this request (error {error.name}){reason}"
        return error_response(500, message, ours, "not_finite" if error.reason else "internal")
    name = uuid.uuid4().hex[:12]
    log.error("error %s", name, exc_info=error)
    return error_response(500, f"the server failed in this request (error {name})", ours, "internal")

"""An id, a log line and a count for every request, refused ones included."""

import json
import logging
import re
import time
import uuid
from collections.abc import Collection
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bagel_rt.serve.metrics import CLOSED, Metrics

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")
"""Id of the request that this task works on."""

_CLIENT_ID = re.compile("[A-Za-z0-9._-]{1,64}")  # of a client or proxy; other ids could forge log lines
_PROBES = ("/health", "/metrics")  # asked every few seconds: logged only if they fail
_FIELDS = ("request_id", "method", "path", "status", "seconds")

log = logging.getLogger("bagel_rt.access")


@dataclass
class Entry:
    """One request; ``scope["bagel_rt.entry"]``.

    Attributes:
        status: of its response, or of the error in which a stream ended; 499 if the client disconnected before.
    """

    status: int = CLOSED


class RequestLog:
    """Outermost ASGI middleware: gives each request an id, returns it as ``X-Request-Id``, and logs and counts it."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Collection[str]):
        """
        Args:
            app: the wrapped application.
            metrics: counts the requests.
            routes: known paths; in the metrics, every other path is "other".
        """
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        sent = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        name = sent if _CLIENT_ID.fullmatch(sent) else uuid.uuid4().hex
        REQUEST_ID.set(name)
        entry, begun = Entry(), time.perf_counter()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", name.encode())]}
            await send(message)

        try:
            await self._app({**scope, "bagel_rt.entry": entry}, receive, send_with_id)
        finally:
            self._finish(scope, entry.status, time.perf_counter() - begun)

    def _finish(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        route = next((one for one in self._routes if path == one or path.startswith(f"{one}/")), "other")
        self._metrics.record(route, status, seconds)
        method, quoted = scope["method"], quote(path[:200])
        fields = dict(zip(_FIELDS, (REQUEST_ID.get(), method, quoted, status, round(seconds, 4)), strict=True))
        level = logging.DEBUG if path.startswith(_PROBES) and status < 400 else logging.INFO
        log.log(level, "%s %s %d in %.3f s", method, quoted, status, seconds, extra=fields)


class TextFormatter(logging.Formatter):
    """``time level message [request id]``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        name = REQUEST_ID.get()
        return super().formatMessage(record) + (f" [{name}]" if name != "-" else "")


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, request id, and the fields of a request's line."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": REQUEST_ID.get(),
        }
        entry |= {name: value for name in _FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def log_config(level: str, as_json: bool) -> dict[str, Any]:
    """A logging configuration for the server's and uvicorn's loggers, on stderr."""
    logger = {"handlers": ["server"], "level": level.upper()}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"server": {"()": JsonFormatter if as_json else TextFormatter}},
        "handlers": {"server": {"class": "logging.StreamHandler", "formatter": "server"}},
        # An application that configures the root logger gets these records there.
        "loggers": {} if logging.getLogger().handlers else {"uvicorn": logger, "bagel_rt": logger},
    }

"""uvicorn around the application; on shutdown it lets the model finish first."""

import socket

import uvicorn
from fastapi import FastAPI

from bagel_rt.serve.limits import Limits
from bagel_rt.serve.middleware import MAX_HEAD
from bagel_rt.serve.protocol import BoundedProtocol

_MARGIN = 10  # seconds to send errors to requests that did not finish in their grace period
_KEEP_ALIVE = 30  # seconds; above the 5 of common clients, which would otherwise reuse a connection just closed


class _Uvicorn(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn alone would wait for all responses before the application learns of it, then cancel them silently.
        app = self.config.app
        assert isinstance(app, FastAPI)
        app.state.server.end()
        await super().shutdown(sockets)


def make_server(app: FastAPI, host: str = "127.0.0.1", port: int = 8000, log_level: str = "info") -> uvicorn.Server:
    """Create the HTTP server; call its ``run()``. When it is stopped (by a signal or ``should_exit``), it stops
    listening; running requests finish within the grace period or get an error.

    Args:
        app: from :func:`~bagel_rt.serve.app.create_app`.
        host: address to bind.
        port: 0 for a free one.
        log_level: of uvicorn.
    """
    limits: Limits = app.state.server.limits
    config = uvicorn.Config(
        app,
        host,
        port,
        log_level=log_level,
        http=BoundedProtocol,
        h11_max_incomplete_event_size=MAX_HEAD,
        ws="none",
        timeout_graceful_shutdown=round(limits.grace) + _MARGIN,
        timeout_keep_alive=_KEEP_ALIVE,
    )
    return _Uvicorn(config)

"""uvicorn around the application; on shutdown it lets the model finish first."""

import asyncio
import socket
import ssl
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from bagel_rt.serve.middleware import MAX_HEAD
from bagel_rt.serve.protocol import BoundedProtocol
from bagel_rt.serve.request_log import log_config

_MARGIN = 10  # seconds to send responses after the model has stopped
_TICK = 0.05  # seconds
_KEEP_ALIVE = 30  # seconds; above the 5 of common clients, which would otherwise reuse a connection just closed


class _Uvicorn(uvicorn.Server):
    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Run until it is stopped, or until loading the model fails, then raise that error."""
        app = self.config.app
        assert isinstance(app, FastAPI)
        app.state.server.on_load_error = lambda: setattr(self, "should_exit", True)
        super().run(sockets)
        if app.state.server.load_error is not None:
            raise app.state.server.load_error

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at the first signal, and at once at the second."""
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then stop listening. uvicorn alone would wait for all responses before the application learns of it,
        then cancel them silently."""
        app = self.config.app
        assert isinstance(app, FastAPI)
        ending = app.state.server.end()
        while ending.is_alive() and not self.force_exit:  # /health stays reachable; new requests get 503
            await asyncio.sleep(_TICK)
        await super().shutdown(sockets)


def make_server(
    app: FastAPI,
    host: str = "127.0.0.1",
    port: int = 8000,
    log_level: str = "info",
    json_logs: bool = False,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
) -> uvicorn.Server:
    """Create the HTTP server; call its ``run()``. When it is stopped (by a signal or ``should_exit``), it refuses
    new requests; running ones finish within the grace period or get an error. A second signal ends it at once.

    Args:
        app: from :func:`~bagel_rt.serve.app.create_app`.
        host: address to bind.
        port: 0 for a free one.
        log_level: of the server and of uvicorn.
        json_logs: write each log record as a JSON object.
        tls_cert, tls_key: PEM files of the certificate chain and its key, for HTTPS.

    Raises:
        ValueError: the certificate cannot be loaded.
    """
    if tls_cert is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls_cert, tls_key)
        except OSError as error:  # SSLError is one
            raise ValueError(f"cannot load the TLS certificate {tls_cert} with its key: {error}.") from None
    config = uvicorn.Config(
        app,
        host,
        port,
        log_level=log_level,
        log_config=log_config(log_level, json_logs),
        access_log=False,  # the application's own has request ids
        http=BoundedProtocol,
        h11_max_incomplete_event_size=MAX_HEAD,
        ws="none",
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
        timeout_graceful_shutdown=_MARGIN,
        timeout_keep_alive=_KEEP_ALIVE,
    )
    return _Uvicorn(config)

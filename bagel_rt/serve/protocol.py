"""uvicorn's HTTP/1.1 protocol with limits on what happens before the application sees a request."""

import asyncio
import time

import h11
from fastapi import FastAPI
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from bagel_rt.serve.errors import error_response
from bagel_rt.serve.limits import Limits
from bagel_rt.serve.middleware import MAX_HEAD, MAX_URL

_HEAD_SECONDS = 10.0  # from opening a connection, or from a request's first byte, to the end of its headers


_OTHER_FILES = 128  # descriptors of this process that are not connections


def max_connections(limits: Limits) -> int:
    """Connections that this process can hold, by ``limits`` and by its limit of open files (``ulimit -n``)."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return limits.connections
    return max(1, min(limits.connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OTHER_FILES))


class BoundedProtocol(H11Protocol):
    """Closes connections that are silent, that send headers slowly, or that are too many: at one more than the limit,
    the one that has been idle longest.

    uvicorn would choose httptools where it is installed, which does not bound headers. h11 is written in Python, but a
    request here costs far more than its parsing.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        self._since = time.monotonic()  # of the last event: the protocol that is idle longest is closed first
        self._timer: asyncio.TimerHandle | None = self.loop.call_later(_HEAD_SECONDS, self._head_timed_out)
        app = self.config.app
        assert isinstance(app, FastAPI)
        if len(self.connections) > max_connections(app.state.server.limits):
            others = self.connections - {self}
            idle = [one for one in others if isinstance(one, BoundedProtocol) and one.is_idle()]
            min(idle, key=lambda one: one._since, default=self).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._since = time.monotonic()
        super().data_received(data)
        self._update_timer()

    def on_response_complete(self) -> None:
        self._since = time.monotonic()
        super().on_response_complete()
        if self.conn.trailing_data[0]:  # the client has sent a part of its next request
            self._update_timer()

    def is_idle(self) -> bool:
        """Whether no request is running on this connection, though a part of its headers may have arrived."""
        return self.cycle is None or self.cycle.response_complete

    def send_400_response(self, msg: str) -> None:
        """Refuse what h11 cannot parse, or does not, because it is too long."""
        head = self.conn.trailing_data[0]
        kind = "invalid_request_error"
        if len(head) <= MAX_HEAD:
            self._refuse(error_response(400, "the request must be HTTP/1.1", kind))
        elif b"\n" not in head:
            self._refuse(error_response(414, f"the URL must have at most {MAX_URL} bytes", kind))
        else:
            self._refuse(error_response(431, f"the headers must have at most {MAX_HEAD} bytes", kind))

    def _head_timed_out(self) -> None:
        self._timer = None
        if self.conn.trailing_data[0]:
            message = f"the headers must arrive within {_HEAD_SECONDS:g} s"
            self._refuse(error_response(408, message, "invalid_request_error"))
        else:
            self.transport.close()

    def _refuse(self, response: Response) -> None:
        """Send a response without the application, and close the connection."""
        if self.transport.is_closing():
            return
        headers = [*response.raw_headers, (b"connection", b"close")]
        events = h11.Response(status_code=response.status_code, headers=headers), h11.Data(data=bytes(response.body))
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (*events, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _update_timer(self) -> None:
        """Run the timer while the headers of a request are incomplete."""
        if not self.is_idle() or self.transport.is_closing():
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(_HEAD_SECONDS, self._head_timed_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

"""The HTTP server around the application: uvicorn, told to let the model end before it ends itself."""

import uvicorn
from fastapi import FastAPI

_MARGIN = 10  # seconds to send what was told to requests that had no more time
_KEEP_ALIVE = 30  # seconds; above the 5 of common clients, who else would meet a connection just closed


class _Uvicorn(uvicorn.Server):
    async def shutdown(self, sockets=None) -> None:
        # By itself uvicorn waits for all answers before it tells the application, and then cancels without a word.
        self.config.app.state.server.end()
        await super().shutdown(sockets)


def make_server(app: FastAPI, host: str = "127.0.0.1", port: int = 8000, log_level: str = "info") -> uvicorn.Server:
    """What listens and answers; ``run()`` it. When it is told to stop (by a signal, or by ``should_exit``), it listens
    no more, and every request that is under way has the grace period to finish, or is told that it did not.

    Args:
        app: of :func:`~bagel_rt.serve.app.create_app`.
        host: to listen at.
        port: 0 takes a free one.
        log_level: of uvicorn.
    """
    grace = round(app.state.server.limits.grace) + _MARGIN
    waits = {"timeout_graceful_shutdown": grace, "timeout_keep_alive": _KEEP_ALIVE}
    return _Uvicorn(uvicorn.Config(app, host, port, log_level=log_level, **waits))

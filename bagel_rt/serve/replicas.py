"""The server on several GPUs: replicas of the application under Ray Serve, one a GPU (extra ``[ray]``).

Ray's proxy listens, and gives a request to one of the replicas that have the fewest under way. A replica that dies, or
whose model's thread has ended, is started anew. Requests that it was at work on are answered with an error, which says
that they may be sent again: a picture that is half drawn is nowhere else. The others never reach it.

On one machine :func:`run` does everything. On a cluster that is there, ``serve run
bagel_rt.serve.replicas:application folder=... replicas=4`` does, with :data:`ENVIRONMENT` set on all of it.

Ray reads its variables when it is imported, so it is imported in functions.
"""

import json
import os
import socket
import threading
import warnings
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.middleware import Middleware

from bagel_rt.serve.limits import Limits

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray reports its use to its makers otherwise
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "bagel_rt.serve.replicas.proxy_middlewares",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a proxy that starts slower than 5 s is ended, again and again
}
"""Variables that are set, unless they are, before Ray is imported."""

_ONE_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray then stays on the loopback interface, on Linux too
LOOPBACK = "127.0.0.1"
KEY = "BAGEL_RT_API_KEY"
_OBJECT_STORE = 128 << 20  # bytes; requests and answers do not go through it
_HEALTH_SECONDS = 5.0  # between two looks at a replica
_ATTEMPTS = 3  # to start a replica, until it is given up
_MARGIN = 10.0  # seconds beyond the grace period, for answers to be sent
_JSON = (b"content-type", b"application/json")


class Options(BaseModel):
    """What is served, and how often.

    Attributes:
        folder: the model; None for the embedded one.
        name: what it is called in answers; by default as the folder.
        replicas: how many of it.
        device: "cuda" for a GPU each, "cpu"; by default GPUs if this machine has any.
        dtype: of the weights, as on the command line.
        limits: fields of :class:`~bagel_rt.serve.limits.Limits`, of each replica.
        image_hosts: that pictures may be fetched from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str | None = None
    name: str | None = None
    replicas: int = Field(1, ge=1)
    device: Literal["cpu", "cuda"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    limits: dict[str, int | float] = {}
    image_hosts: tuple[str, ...] = ()


class Named:
    """ASGI middleware: an answer's header ``X-Replica`` tells which replica gave it."""

    def __init__(self, app):
        from ray import serve

        self._app, self._name = app, serve.get_replica_context().replica_id.unique_id.encode()

    async def __call__(self, scope, receive, send) -> None:
        async def named(message):
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message.get("headers", ()), (b"x-replica", self._name)]}
            await send(message)

        await self._app(scope, receive, named)


def application(options: Options):
    """The application, a ``ray.serve.Application``, for ``serve.run`` or the command ``serve run``.

    The key that clients must send is taken from BAGEL_RT_API_KEY here.

    Raises:
        ValueError: a limit is out of range, or the folder is none.
    """
    import torch
    from ray import serve

    from bagel_rt.pipeline import DEFAULT_MODEL

    folder, limits = Path(options.folder or DEFAULT_MODEL).resolve(), Limits(**options.limits)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the path of a downloaded BAGEL checkpoint folder")
    device = _device(options)
    name, key = options.name or folder.name, os.environ.get(KEY, "").strip() or None
    hosts = frozenset(host.lower() for host in options.image_hosts)
    dtype = getattr(torch, options.dtype) if options.dtype else None

    def build():
        from bagel_rt.pipeline import Bagel
        from bagel_rt.serve.app import create_app

        warnings.filterwarnings("ignore", module="PIL")  # of damaged pictures: clients could fill the log with them
        app = create_app(Bagel.from_pretrained(folder, device, dtype), name, limits, key, hosts)
        app.add_middleware(Named)
        return app

    @serve.ingress(build)
    class Replica:
        """A model on a GPU of its own."""

        def check_health(self) -> None:
            """Called by Ray, which starts another in place of a replica for which this raises."""
            failure = self.app.state.server.worker.failure
            if failure is not None:
                raise RuntimeError(f"the model's thread has ended: {failure!r}")

    return serve.deployment(
        Replica,
        name="bagel_rt",
        num_replicas=options.replicas,
        # Processors are not counted: a replica keeps one busy, and should start wherever there is a GPU.
        ray_actor_options={"num_cpus": 0, "num_gpus": int(device == "cuda")},
        # More than a replica takes, so that who is refused is told so by its own queue, at once.
        max_ongoing_requests=limits.requests + 16,
        graceful_shutdown_timeout_s=limits.grace + _MARGIN,
        health_check_period_s=_HEALTH_SECONDS,
        max_constructor_retry_count=_ATTEMPTS,
    ).bind()


def _device(options: Options) -> str:
    import torch

    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def start(options: Options, host: str = LOOPBACK, port: int = 8000) -> str:
    """Start Ray on this machine alone, and the replicas. Returns the address when they take requests.

    Only the proxy listens at ``host``: all else of Ray stays on the loopback interface, unless Ray was imported before,
    and without its dashboard. Port 0 takes a free one.

    Raises:
        ValueError: as :func:`application`; or there are fewer GPUs than replicas.
        OSError: the address cannot be listened at.
        RuntimeError: a replica does not start; Ray's message says why.
    """
    for name, value in (ENVIRONMENT | _ONE_MACHINE).items():
        os.environ.setdefault(name, value)
    import ray
    from ray import serve

    served = application(options)
    with socket.create_server((host, port)) as free:  # or an error, before anything is started
        port = free.getsockname()[1]
    ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if _device(options) == "cuda" and gpus < options.replicas:
            raise ValueError(f"replicas is {options.replicas}, but Ray finds {gpus} GPUs: one is needed for each")
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        serve.run(served, name="bagel_rt", route_prefix="/")
        return f"http://{host}:{port}"
    except BaseException:
        stop()
        raise


def stop() -> None:
    """Let requests that are under way finish, for the time that ``limits.grace`` gives them, and end Ray."""
    import ray
    from ray import serve

    serve.shutdown()
    ray.shutdown()


def run(options: Options, host: str = LOOPBACK, port: int = 8000) -> None:
    """:func:`start`, then wait for Ctrl-C or SIGTERM, then :func:`stop`."""
    address = start(options, host, port)
    print(f"{options.replicas} replicas running on {address}; Ctrl-C ends them", flush=True)
    try:
        threading.Event().wait()
    finally:
        stop()


class Answered:
    """ASGI middleware of Ray's proxy: its own errors, too, have OpenAI's form.

    The proxy answers in plain text where a replica has ended, none is there, or a path is unknown to it; where an
    answer has begun, it just ends the connection. Here the former become JSON, the latter an event at the stream's end.
    """

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Ray's own routes
            return await self._app(scope, receive, send)
        begun = ended = streams = replaced = False

        async def watched(message):
            nonlocal begun, ended, streams, replaced
            if message["type"] == "http.response.start":
                kind = dict(message.get("headers", ())).get(b"content-type", b"")
                replaced = message["status"] >= 400 and not kind.startswith(b"application/json")
                if replaced:
                    await self._refuse(send, message["status"])
                begun, streams = True, kind.startswith(b"text/event-stream")
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            if not replaced:
                await send(message)

        await self._app(scope, receive, watched)
        if not begun:
            await self._refuse(send, 503)
        elif streams and not ended:
            await send({"type": "http.response.body", "body": b"data: " + _lost() + b"\n\n"})

    @staticmethod
    async def _refuse(send, status: int) -> None:
        headers = [_JSON, *([(b"retry-after", b"1")] if status == 503 else [])]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": _lost() if status >= 500 else _error("not found", status)})


def _lost() -> bytes:
    return _error("the replica at work on this request is not there any more: send it again", 503)


def _error(message: str, status: int) -> bytes:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = "replica_lost" if status >= 500 else None
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


def proxy_middlewares() -> list[Middleware]:
    """Called by Ray in every proxy."""
    return [Middleware(Answered)]

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
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
_APPLICATION = "bagel_rt"  # what Ray calls it
_OBJECT_STORE = 128 << 20  # bytes; requests and answers do not go through it
_HEALTH_SECONDS = 1.0  # between two looks at a replica
_LAST_WORDS = 1.0  # seconds for what has been answered to be sent, when a replica or the proxy ends
_ATTEMPTS = 3  # to start a replica, until it is given up
_MARGIN = 10.0  # seconds beyond those that requests have, for answers to be sent
_JSON = (b"content-type", b"application/json")

_OBEYED = frozenset({
    b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"x-request-id", b"x-session-id",
    b"serve-multiplexed-model-id",
})  # fmt: skip
"""Headers that Ray's proxy obeys: a client could have its request done without a limit, or when it has left."""

_OURS = "server_error"
_LOST = (503, "the replica at work on this request is not there any more: send it again", _OURS, "replica_lost", 1)
_REFUSALS = {
    # The application has all paths: if one is not found, the application is not there any more.
    404: (503, "the server takes no more requests: try later", _OURS, "stopping", 5),
    408: (504, "the request took too long: ask for less, or try again", _OURS, "timeout", None),
    429: (429, "too many requests wait: try again", "rate_limit_error", "busy", 1),
}
"""Status of the proxy's own errors -> status, message, type, code and seconds until another try of what is sent."""


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
        ValueError: a limit is out of range, the folder is none, or the key is empty.
    """
    import torch
    from ray import serve
    from ray.serve.config import BackpressureConfig

    from bagel_rt.checkpoint import DEFAULT_MODEL
    from bagel_rt.serve.middleware import read_key

    folder, limits = Path(options.folder or DEFAULT_MODEL).resolve(), Limits(**options.limits)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the path of a downloaded BAGEL checkpoint folder")
    device = _device(options)
    name, key = options.name or folder.name, read_key()
    hosts = frozenset(host.lower() for host in options.image_hosts)
    dtype = getattr(torch, options.dtype) if options.dtype else None

    def build():
        from bagel_rt.pipeline import Bagel
        from bagel_rt.serve.app import create_app

        _listen_on_loopback()
        warnings.filterwarnings("ignore", module="PIL")  # of damaged pictures: clients could fill the log with them
        app = create_app(Bagel.from_pretrained(folder, device, dtype), name, limits, key, hosts)
        app.add_middleware(Named)
        return app

    @serve.ingress(build)
    class Replica:
        """A model on a GPU of its own."""

        def check_health(self) -> None:
            """Called by Ray. A replica whose model's thread has ended ends its process, and Ray starts another: it
            refuses requests faster than others do them, and so would be given most of them, until Ray has found it
            failing three times."""
            failure = self.app.state.server.worker.failure
            if failure is not None:
                threading.Timer(_LAST_WORDS, os._exit, (1,)).start()
                raise RuntimeError(f"the model's thread has ended: {failure!r}")

        def end(self) -> None:
            """Called when the server is told to stop, before Ray waits for what is under way."""
            self.app.state.server.end()

    return serve.deployment(
        Replica,
        name="bagel_rt",
        num_replicas=options.replicas,
        # Processors are not counted: a replica keeps one busy, and should start wherever there is a GPU.
        ray_actor_options={"num_cpus": 0, "num_gpus": int(device == "cuda")},
        # More than a replica takes, so that who is refused is told so by its own queue, at once. In the proxy requests
        # wait only while replicas start: as many as these will take, which may also come all at once.
        max_ongoing_requests=limits.requests + 16,
        max_queued_requests=options.replicas * limits.requests,
        backpressure_config=BackpressureConfig(status_code=429),
        graceful_shutdown_wait_loop_s=_LAST_WORDS,
        graceful_shutdown_timeout_s=limits.grace + _MARGIN,
        health_check_period_s=_HEALTH_SECONDS,
        max_constructor_retry_count=_ATTEMPTS,
    ).bind()


def _listen_on_loopback() -> None:
    """Ray has each replica listen at all interfaces, for calls of other replicas. Where Ray itself is on the loopback
    interface, so is this."""
    import ray
    from ray.serve._private import replica

    if ray.util.get_node_ip_address() == LOOPBACK:
        listen = replica.add_port_to_grpc_server
        replica.add_port_to_grpc_server = lambda server, address: listen(server, address.replace("[::]", LOOPBACK))


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
    six = ":" in host
    with socket.create_server((host, port), family=socket.AF_INET6 if six else socket.AF_INET) as free:
        port = free.getsockname()[1]  # or an error, before anything is started
    seconds = 2 * Limits(**options.limits).seconds + _MARGIN  # as the application gives them, and for it to say so
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # in place of Ray's, which ends the process with code 15
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if _device(options) == "cuda" and gpus < options.replicas:
            raise ValueError(f"replicas is {options.replicas}, but Ray finds {gpus} GPUs: one is needed for each")
        listening = {"host": host, "port": port, "request_timeout_s": seconds}
        serve.start(proxy_location="HeadOnly", http_options=listening)
        serve.run(served, name=_APPLICATION, route_prefix="/")
    except BaseException:
        ray.shutdown()
        raise
    return f"http://[{host}]:{port}" if six else f"http://{host}:{port}"


def stop(grace: float = Limits.grace) -> None:
    """Take no more requests, let those that are under way finish or, after ``grace`` seconds, fail, and end Ray.

    Args:
        grace: as in the limits that the replicas were started with.
    """
    import ray
    from ray import serve

    if not ray.is_initialized():
        return
    try:
        _drain(grace)
        serve.shutdown()
    finally:
        ray.shutdown()


def _drain(grace: float) -> None:
    """End the application while the proxy lives: serve.shutdown() ends that first, and every connection with it."""
    from ray import serve

    if _APPLICATION not in serve.status().applications:
        return
    with suppress(Exception):  # a replica that does not hear of it is waited for all the same
        serve.get_app_handle(_APPLICATION).broadcast("end").results(timeout_s=_MARGIN)
    serve.delete(_APPLICATION, _blocking=False)
    end = time.monotonic() + grace + 2 * _MARGIN
    while _APPLICATION in serve.status().applications and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(_LAST_WORDS)


def run(options: Options, host: str = LOOPBACK, port: int = 8000) -> None:
    """:func:`start`, then wait for Ctrl-C or SIGTERM, then :func:`stop`; a second signal ends all at once. To be called
    in the main thread.

    Raises:
        SystemExit: at the end, with the code that shells have for the signal: 130 or 143.
    """
    with _leaving():
        try:
            address = start(options, host, port)
            print(f"{options.replicas} replicas running on {address}; Ctrl-C ends them", flush=True)
            threading.Event().wait()
        except SystemExit as told:  # code 15 is that of Ray's handler, which is there for a moment
            raise SystemExit(128 + signal.SIGTERM if told.code == signal.SIGTERM else told.code) from None
        finally:
            stop(Limits(**options.limits).grace)


@contextmanager
def _leaving() -> Iterator[None]:
    """Meanwhile SIGINT and SIGTERM raise SystemExit."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class Answered:
    """ASGI middleware of Ray's proxy: its own errors, too, have OpenAI's form, and clients give it no orders.

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
                    await _refuse(send, *_REFUSALS.get(message["status"], _LOST))
                begun, streams = True, kind.startswith(b"text/event-stream")
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            if not replaced:
                await send(message)

        headers = [(name, value) for name, value in scope["headers"] if name.replace(b"_", b"-") not in _OBEYED]
        await self._app(scope | {"headers": headers}, receive, watched)
        if not begun:
            await _refuse(send, *_LOST)
        elif streams and not ended:
            await send({"type": "http.response.body", "body": b"data: " + _error(*_LOST[1:4]) + b"\n\n"})


async def _refuse(send, status: int, message: str, kind: str, code: str, after: int | None) -> None:
    again = (b"x-should-retry", b"false") if after is None else (b"retry-after", str(after).encode())
    await send({"type": "http.response.start", "status": status, "headers": [_JSON, again]})
    await send({"type": "http.response.body", "body": _error(message, kind, code)})


def _error(message: str, kind: str, code: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


def proxy_middlewares() -> list[Middleware]:
    """Called by Ray in every proxy."""
    return [Middleware(Answered)]

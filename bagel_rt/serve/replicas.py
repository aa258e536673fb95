"""The server on several GPUs: replicas of the application under Ray Serve, one per GPU (extra ``[ray]``).

Ray's proxy listens and routes each request to a replica with the fewest running requests. A replica that dies, or
whose model thread has ended, is restarted. Its running requests fail with an error that asks to send them again.

On one machine, use :func:`run`. On an existing cluster, use ``serve run bagel_rt.serve.replicas:application folder=...
replicas=4`` with :data:`ENVIRONMENT` set on every machine.

Ray reads its environment variables when it is imported, so the functions import it.
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
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bagel_rt.serve.limits import Limits

if TYPE_CHECKING:
    from ray.serve import Application

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray sends usage statistics to its vendor otherwise
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "bagel_rt.serve.replicas.proxy_middlewares",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # with the default of 5 s, a slow proxy is restarted for ever
}
"""Defaults of environment variables, set before Ray is imported."""

_ONE_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray then stays on the loopback interface, on Linux too
LOOPBACK = "127.0.0.1"
_APPLICATION = "bagel_rt"  # its name in Ray
_OBJECT_STORE = 128 << 20  # bytes; requests and responses bypass it
_HEALTH_SECONDS = 1.0  # between two health checks of a replica
_LAST_WORDS = 1.0  # seconds to send finished responses before a replica or the proxy ends
_ATTEMPTS = 3  # to start a replica
_MARGIN = 10.0  # seconds to send responses after a request's time limit
_JSON = (b"content-type", b"application/json")

_OBEYED = frozenset({
    b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"x-request-id", b"x-session-id",
    b"serve-multiplexed-model-id",
})  # fmt: skip
"""Headers that Ray's proxy obeys: they let a client lift the time limit, or keep its request running after it left."""

_OURS = "server_error"
_LOST = (503, "the replica that ran this request has ended. Send the request again.", _OURS, "replica_lost", 1)
_REFUSALS = {
    # The application handles all paths: a 404 of the proxy means that the application has been removed.
    404: (503, "the server takes no more requests. Try again later.", _OURS, "stopping", 5),
    408: (504, "the request took too long. Ask for less, or try again.", _OURS, "timeout", None),
    429: (429, "the queue is full. Try again.", "rate_limit_error", "busy", 1),
}
"""Status of the proxy's own errors -> (status, message, type, code, seconds until a retry) of the response."""


class Options(BaseModel):
    """Options of a deployment.

    Attributes:
        folder: checkpoint folder; None for the embedded model.
        name: of the model in responses; by default the folder's name.
        replicas: number of replicas.
        device: "cuda" for one GPU per replica, or "cpu"; by default "cuda" if this machine has a GPU.
        dtype: of the weights, as on the command line.
        weights, graphs: see :meth:`~bagel_rt.pipeline.Bagel.from_pretrained`.
        limits: fields of :class:`~bagel_rt.serve.limits.Limits`, for each replica.
        image_hosts: hosts that images may be fetched from.
        allowed_hosts: names of the server in the header Host; None for all.
        origins: origins of web pages that may use the server from a browser, beside its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str | None = None
    name: str | None = None
    replicas: int = Field(1, ge=1)
    device: Literal["cpu", "cuda"] | None = None
    dtype: Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"] | None = None
    weights: str | None = None
    graphs: bool = True
    limits: dict[str, Any] = {}
    image_hosts: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] | None = None
    origins: tuple[str, ...] = ()


class ReplicaHeader:
    """ASGI middleware: adds the header ``X-Replica``, the id of the replica that responds."""

    def __init__(self, app: ASGIApp):
        from ray import serve

        self._app, self._name = app, serve.get_replica_context().replica_id.unique_id.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"x-replica", self._name)]}
            await send(message)

        await self._app(scope, receive, with_header)


def application(options: Options) -> "Application":
    """Build the ``ray.serve.Application``, for ``serve.run`` or the command ``serve run``.

    The API key is read from BAGEL_RT_API_KEY here.

    Raises:
        ValueError: a limit is out of range, the folder does not exist, or the key is empty.
    """
    from ray import serve
    from ray.serve.config import BackpressureConfig

    from bagel_rt.checkpoint import DEFAULT_MODEL
    from bagel_rt.checkpoint.find import describe_missing_folder
    from bagel_rt.serve.middleware import read_keys

    folder, limits = Path(options.folder or DEFAULT_MODEL).resolve(), Limits(**options.limits)
    if not folder.is_dir():
        raise ValueError(describe_missing_folder(options.folder or folder))
    device = _device(options)
    name, keys = options.name or folder.name, read_keys()
    hosts = frozenset(host.lower() for host in options.image_hosts)

    def build() -> FastAPI:
        from bagel_rt.pipeline import Bagel
        from bagel_rt.serve.app import create_app

        _listen_on_loopback()
        warnings.filterwarnings("ignore", module="PIL")  # about damaged images: clients could fill the log with them
        bagel = Bagel.from_pretrained(folder, device, options.dtype, weights=options.weights, graphs=options.graphs)
        app = create_app(bagel, name, limits, keys, hosts, options.allowed_hosts, options.origins)
        app.add_middleware(ReplicaHeader)
        return app

    @serve.ingress(build)
    class Replica:
        """One model on one GPU."""

        app: FastAPI  # set by serve.ingress

        def check_health(self) -> None:
            """Called by Ray. End the process if the model thread has ended; Ray then starts another replica. Ray itself
            waits for three failed checks, and would meanwhile route most requests here, because refusals are fast."""
            failure = self.app.state.server.worker.failure
            if failure is not None:
                threading.Timer(_LAST_WORDS, os._exit, (1,)).start()
                raise RuntimeError(f"the model thread has ended: {failure!r}")

        def end(self) -> None:
            """Called when the server stops, before Ray waits for running requests."""
            self.app.state.server.end()

    deploy = serve.deployment(
        name="bagel_rt",
        num_replicas=options.replicas,
        # CPUs are not counted: a replica should start wherever there is a GPU.
        ray_actor_options={"num_cpus": 0, "num_gpus": int(device == "cuda")},
        # More than a replica accepts, so that its own queue refuses at once. Requests wait in the proxy only while
        # replicas start: at most as many as these will accept.
        max_ongoing_requests=limits.requests + 16,
        max_queued_requests=options.replicas * limits.requests,
        backpressure_config=BackpressureConfig(status_code=429),
        graceful_shutdown_wait_loop_s=_LAST_WORDS,
        graceful_shutdown_timeout_s=limits.grace + _MARGIN,
        health_check_period_s=_HEALTH_SECONDS,
        max_constructor_retry_count=_ATTEMPTS,
    )
    return deploy(Replica).bind()


def _listen_on_loopback() -> None:
    """Bind each replica's gRPC port to the loopback interface if Ray itself is on it; Ray binds all interfaces."""
    import ray
    from ray.serve._private import replica

    if ray.util.get_node_ip_address() == LOOPBACK:
        listen = replica.add_port_to_grpc_server  # type: ignore[attr-defined] # imported there, not exported
        replica.add_port_to_grpc_server = (  # type: ignore[attr-defined]
            lambda server, address: listen(server, address.replace("[::]", LOOPBACK))
        )


def _device(options: Options) -> str:
    import torch

    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def start(options: Options, host: str = LOOPBACK, port: int = 8000) -> str:
    """Start Ray on this machine and the replicas. Returns the address once they accept requests.

    Only the proxy listens on ``host``. The rest of Ray stays on the loopback interface, unless Ray was imported before,
    and has no dashboard. Port 0 takes a free one.

    Raises:
        ValueError: as :func:`application`; or fewer GPUs than replicas.
        OSError: the address cannot be bound.
        RuntimeError: a replica does not start; the message is Ray's.
    """
    for name, value in (ENVIRONMENT | _ONE_MACHINE).items():
        os.environ.setdefault(name, value)
    import ray
    from ray import serve

    app = application(options)
    ipv6 = ":" in host
    with socket.create_server((host, port), family=socket.AF_INET6 if ipv6 else socket.AF_INET) as free:
        port = free.getsockname()[1]  # fails here if the port is taken, before anything is started
    seconds = 2 * Limits(**options.limits).seconds + _MARGIN  # the application's own time limit comes first
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # replaces Ray's, which ends the process with code 15
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if _device(options) == "cuda" and gpus < options.replicas:
            raise ValueError(f"replicas must be at most {gpus}, the number of GPUs, got {options.replicas}")
        listening = {"host": host, "port": port, "request_timeout_s": seconds}
        serve.start(proxy_location="HeadOnly", http_options=listening)
        serve.run(app, name=_APPLICATION, route_prefix="/")
    except BaseException:
        ray.shutdown()
        raise
    return f"http://[{host}]:{port}" if ipv6 else f"http://{host}:{port}"


def stop(grace: float = Limits.grace) -> None:
    """Refuse new requests, let running ones finish or, after ``grace`` seconds, fail; then end Ray.

    Args:
        grace: as in the limits of the replicas.
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
    """End the application while the proxy lives: serve.shutdown() ends the proxy first, with every connection."""
    from ray import serve

    if _APPLICATION not in serve.status().applications:
        return
    with suppress(Exception):  # replicas that cannot be reached are waited for as well
        serve.get_app_handle(_APPLICATION).broadcast("end").results(timeout_s=_MARGIN)
    serve.delete(_APPLICATION, _blocking=False)
    end = time.monotonic() + grace + 2 * _MARGIN
    while _APPLICATION in serve.status().applications and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(_LAST_WORDS)


def run(options: Options, host: str = LOOPBACK, port: int = 8000) -> None:
    """:func:`start`, wait for Ctrl-C or SIGTERM, then :func:`stop`; a second signal ends everything at once. Call it in
    the main thread.

    Raises:
        SystemExit: at the end, with the shell's exit code for the signal: 130 or 143.
    """
    with _exit_on_signals():
        try:
            address = start(options, host, port)
            print(f"{options.replicas} replicas running on {address}; Ctrl-C ends them", flush=True)
            threading.Event().wait()
        except SystemExit as error:  # code 15 comes from Ray's handler, which is installed for a moment
            raise SystemExit(128 + signal.SIGTERM if error.code == signal.SIGTERM else error.code) from None
        finally:
            stop(Limits(**options.limits).grace)


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Make SIGINT and SIGTERM raise SystemExit inside this block."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class ProxyErrors:
    """ASGI middleware of Ray's proxy: puts the proxy's own errors into OpenAI's format, and drops control headers.

    The proxy responds in plain text if a replica has ended, none exists, or a path is unknown; if a response has
    started, it only closes the connection. The former become JSON, the latter an error event at the stream's end.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Ray's own routes
            await self._app(scope, receive, send)
            return
        started = ended = streams = replaced = False

        async def watched(message: Message) -> None:
            nonlocal started, ended, streams, replaced
            if message["type"] == "http.response.start":
                kind = dict(message.get("headers", ())).get(b"content-type", b"")
                replaced = message["status"] >= 400 and not kind.startswith(b"application/json")
                if replaced:
                    await _refuse(send, *_REFUSALS.get(message["status"], _LOST))
                started, streams = True, kind.startswith(b"text/event-stream")
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            if not replaced:
                await send(message)

        headers = [(name, value) for name, value in scope["headers"] if name.replace(b"_", b"-") not in _OBEYED]
        await self._app({**scope, "headers": headers}, receive, watched)
        if not started:
            await _refuse(send, *_LOST)
        elif streams and not ended:
            await send({"type": "http.response.body", "body": b"data: " + _error(*_LOST[1:4]) + b"\n\n"})


async def _refuse(send: Send, status: int, message: str, kind: str, code: str, retry_after: int | None) -> None:
    retry = (b"x-should-retry", b"false") if retry_after is None else (b"retry-after", str(retry_after).encode())
    await send({"type": "http.response.start", "status": status, "headers": [_JSON, retry]})
    await send({"type": "http.response.body", "body": _error(message, kind, code)})


def _error(message: str, kind: str, code: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


def proxy_middlewares() -> list[Middleware]:
    """Middlewares of every proxy; called by Ray."""
    return [Middleware(ProxyErrors)]

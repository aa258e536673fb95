"""The FastAPI application: OpenAI's image and chat routes over one model thread, plus /health and /metrics."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import anyio
from fastapi import FastAPI, Request, Response
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from bagel_rt.model_thread import ModelThread
from bagel_rt.pipeline import Bagel
from bagel_rt.request import ImageResult
from bagel_rt.serve import schema
from bagel_rt.serve.bodies import parse_json, read_body, read_form
from bagel_rt.serve.decoder_pool import DecoderPool
from bagel_rt.serve.errors import FieldError, RequestError, error_response_for, errors_of, shown
from bagel_rt.serve.hosts import HostCheck
from bagel_rt.serve.images import JPEG_QUALITY, read_url
from bagel_rt.serve.limits import Limits
from bagel_rt.serve.metrics import CONTENT_TYPE, Metrics
from bagel_rt.serve.middleware import Gate, release_body
from bagel_rt.serve.model_requests import chat_requests, image_requests, prompt_tokens
from bagel_rt.serve.openapi import document
from bagel_rt.serve.request_log import RequestLog
from bagel_rt.serve.responses import ChatResponse, EventStream, InThread, images_response
from bagel_rt.serve.worker import AsyncJob, Completion, start_worker

# Threads that build requests, read images, and encode responses. They are separate, so that slow images delay neither
# requests without images nor finished responses.
_BUILDERS = 2
_READERS = 4  # each may hold one image of the maximum size, or wait for the host of a URL
_WRITERS = 2
_DECODERS = 2  # processes

T = TypeVar("T")


class Server:
    """One model behind the routes.

    Attributes:
        bagel: the model, once it is loaded.
        worker: the model thread; None while the model is being loaded.
        load_error: the exception of loading the model, if it failed.
        on_load_error: called in the event loop after that.
        metrics: counters of ``/metrics``.
    """

    bagel: Bagel
    _decoders: DecoderPool
    _build: InThread
    _read: InThread
    _write: InThread

    def __init__(
        self, bagel: Bagel | Callable[[], Bagel], name: str, limits: Limits, hosts: frozenset[str] = frozenset()
    ):
        """
        Args:
            bagel: the model, or a function that loads it.
            name: of the model in responses.
            limits: of requests.
            hosts: hosts that images may be fetched from.
        """
        self._source, self.name, self.limits, self.hosts = bagel, name, limits, hosts
        self.metrics, self.created = Metrics(), int(time.time())
        self.worker: ModelThread | None = None
        self.load_error: BaseException | None = None
        self.on_load_error: Callable[[], None] = lambda: None
        self._ending: threading.Thread | None = None  # stops the worker

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Run the model thread while the application runs. A model that is not loaded yet is loaded meanwhile."""
        self._build, self._read, self._write = (
            partial(_run_limited, anyio.CapacityLimiter(threads)) for threads in (_BUILDERS, _READERS, _WRITERS)
        )
        self._decoders = DecoderPool(_DECODERS, self.limits.body, self.limits.pixels)
        self._ending = None
        if isinstance(self._source, Bagel):
            self._start(self._source)
        else:
            # A daemon: a process that is stopped does not wait for a model that it no longer needs.
            arguments = (self._source, asyncio.get_running_loop())
            threading.Thread(target=self._load, args=arguments, daemon=True).start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.end().join)

    def _load(self, load: Callable[[], Bagel], loop: asyncio.AbstractEventLoop) -> None:
        """Load the model. Runs in a thread, so that /health responds meanwhile."""
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            try:
                bagel = load()
            except BaseException as error:
                self.load_error = error
                loop.call_soon_threadsafe(self.on_load_error)
            else:
                loop.call_soon_threadsafe(self._start, bagel)

    def _start(self, bagel: Bagel) -> None:
        """Accept requests for a model."""
        if self._ending is None:
            self.bagel = bagel
            self.worker = start_worker(bagel, self.limits.queue, self.limits.batch, self.metrics.observe)
            self.metrics.watch(self.worker)

    def end(self) -> threading.Thread:
        """Refuse new requests; running ones finish or, after ``limits.grace`` seconds, fail. Returns at once.

        Returns:
            a thread that ends when all of them have.
        """
        if self._ending is None:
            stop = None
            if self.worker is not None:
                self.worker.refuse()
                stop = partial(self.worker.stop, self.limits.grace)
            self._decoders.close()  # of requests that the worker would refuse
            # A daemon, so that a second signal ends the process without waiting for it.
            self._ending = threading.Thread(target=stop, daemon=True)
            self._ending.start()
        return self._ending

    async def ready(self) -> Response:
        """200 while requests are accepted, else 503."""
        return self._health("ok")

    async def live(self) -> Response:
        """200 until loading or the model thread has failed, then 503: only a new process helps."""
        return self._health("ok", "loading", "stopping")

    def _health(self, *healthy: str) -> Response:
        status, worker = self._status(), self.worker
        state = {"status": status, "model": self.name, "queue": 0 if worker is None else worker.waiting}
        return JSONResponse(state, 200 if status in healthy else 503)

    def _status(self) -> str:
        """ "ok" while requests are accepted, or "loading", "stopping" or "failed"."""
        if self.load_error is not None or (self.worker is not None and self.worker.failure is not None):
            return "failed"
        if self._ending is not None:
            return "stopping"
        return "loading" if self.worker is None else "ok"

    def submit(self, jobs: Sequence[AsyncJob]) -> None:
        """Queue jobs. Raises as :meth:`~bagel_rt.model_thread.ModelThread.submit`."""
        assert self.worker is not None  # check_loaded comes first
        self.worker.submit(jobs)

    def check_loaded(self) -> None:
        """Raise RequestError while the model is being loaded."""
        if self.worker is None:
            raise RequestError("the model is being loaded. Try again later.", "", "loading", 503)

    async def scrape(self) -> Response:
        """Metrics in Prometheus' text format."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        return document()

    async def models(self) -> dict[str, Any]:
        """The only model, as a list."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, model: str) -> Response:
        """The only model, if that is its name."""
        self._check_model(model)
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "bagel_rt"}

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            allowed = f"{self.name!r} or left out"
            raise FieldError("model", f"must be {allowed}, got {name[:60]!r}.", "model_not_found", 404)

    async def generations(self, request: Request, deadline: float) -> Response:
        """Text to images."""
        body = schema.Generation.model_validate(parse_json(await read_body(request)))
        release_body(request)
        return await self._draw(request, deadline, body, [])

    async def edits(self, request: Request, deadline: float) -> Response:
        """Images and a text to images."""
        files, fields = await read_form(request, self.limits.images)
        if not files:
            text = "is missing. Send the image to edit as a file of multipart/form-data."
            raise FieldError("image", text, "missing_required_parameter")
        body = schema.Edit.model_validate(fields)
        self._check_model(body.model)
        images = []
        while files:  # drops each file once it is decoded: none should be held in the queue
            images.append(await self._read(self._decode, "image", files.pop(0)))
        release_body(request)
        return await self._draw(request, deadline, body, images)

    async def _draw(
        self, request: Request, deadline: float, body: schema.ImageFields, images: list[Image.Image]
    ) -> Response:
        self._check_model(body.model)
        requests = await self._build(image_requests, self.bagel, self.limits, body, images)
        first = requests[0]
        batch_key = (first.size, first.image.num_timesteps, first.system is None)
        jobs = [AsyncJob[ImageResult](one, deadline, batch_key) for one in requests]
        self.submit(jobs)
        async with _cancel_on_disconnect(request, jobs):
            results = [await job.finish() for job in jobs]
        self.metrics.images.inc(len(results))
        quality = JPEG_QUALITY if body.output_compression is None else body.output_compression
        tokens = prompt_tokens(self.bagel, first)
        return JSONResponse(await self._write(images_response, results, body.output_format, quality, tokens))

    async def completions(self, request: Request, deadline: float) -> Response:
        """Texts and images to a text or, with ``modalities`` of both, to texts and images."""
        begun = time.monotonic()
        body = schema.Chat.model_validate(parse_json(await read_body(request)))
        self._check_model(body.model)
        images = sum(part.type == "image_url" for _, part in body.parts)
        if images > self.limits.images:
            raise FieldError("messages", f"must have at most {self.limits.images} images, got {images}.")
        parts = [await self._read_part(param, part) for param, part in body.parts]
        body.messages = []  # the encoded images should not be held in the queue
        release_body(request)
        requests = await self._build(chat_requests, self.bagel, self.limits, body, parts)
        jobs = [AsyncJob[Completion](one, deadline, stops=body.stop) for one in requests]
        self.submit(jobs)
        response = ChatResponse(jobs, self.name, sum(prompt_tokens(self.bagel, requests[0])), self._write)
        if body.stream:
            events = response.events(body.stream_options.include_usage)
            return EventStream(jobs, events, lambda: self._count(begun, jobs, response))
        async with _cancel_on_disconnect(request, jobs):
            content = await response.whole()
        self._count(begun, jobs, response)
        return JSONResponse(content)

    def _count(self, begun: float, jobs: Sequence[AsyncJob], response: ChatResponse) -> None:
        if (first := jobs[0].first_piece_at) is not None:
            self.metrics.first_piece.observe(first - begun)
        for completion in response.completions:
            self.metrics.tokens.inc(completion.tokens)
            self.metrics.images.inc(sum(isinstance(part, ImageResult) for part in completion.parts))

    async def _read_part(self, param: str, part: schema.TextPart | schema.ImagePart) -> str | Image.Image:
        if part.type == "text":
            return part.text
        return await self._read(self._read_url, f"{param}.image_url.url", part.image_url.url)

    def _read_url(self, param: str, url: str) -> Image.Image:
        with errors_of(param, "invalid_image_url"):
            data = read_url(url, self.limits, self.hosts)
        return self._decode(param, data)

    def _decode(self, param: str, data: bytes) -> Image.Image:
        with errors_of(param, "invalid_image"):
            return self._decoders.decode(data, self.bagel.model.config.vae_transform)


async def _run_limited(limiter: anyio.CapacityLimiter, function: Callable[..., T], *arguments: Any) -> T:
    return await anyio.to_thread.run_sync(function, *arguments, limiter=limiter)


@asynccontextmanager
async def _cancel_on_disconnect(request: Request, jobs: Sequence[AsyncJob]) -> AsyncIterator[None]:
    """Cancel jobs if the client disconnects inside this block, and those still unfinished at its end."""

    async def watch() -> None:
        with suppress(Exception):  # of a client that sends more than its request
            while (await request.receive())["type"] != "http.disconnect":
                pass
        for job in jobs:
            job.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        for job in jobs:
            job.cancel()


def create_app(
    bagel: Bagel | Callable[[], Bagel],
    name: str,
    limits: Limits | None = None,
    keys: str | Sequence[str] = (),
    hosts: frozenset[str] = frozenset(),
    allowed_hosts: Sequence[str] | None = None,
    origins: Sequence[str] = (),
) -> FastAPI:
    """Create the application over a model; run it with :func:`bagel_rt.serve.run.make_server`.

    Args:
        bagel: the model, which the application alone uses once it has started; or a function that loads it. With a
            function, the server listens while it loads: /health/ready and requests get 503.
        name: of the model in responses.
        limits: of requests.
        keys: an API key or several, of which clients must send one; by default none is needed.
        hosts: hosts that images may be fetched from.
        allowed_hosts: names of this server in the header Host; None for all.
        origins: origins of web pages that may use this server from a browser, beside its own.
    """
    limits = limits or Limits()
    server = Server(bagel, name, limits, hosts)
    app = FastAPI(title="bagel_rt", lifespan=server.lifespan, openapi_url=None, redirect_slashes=False)
    app.state.server = server

    def with_deadline(handle: Callable[[Request, float], Awaitable[Response]]) -> Callable[..., Any]:
        async def handler(request: Request) -> Response:
            try:
                server.check_loaded()
                return await handle(request, time.monotonic() + limits.seconds)
            except Exception as error:
                return error_response_for(error)

        return handler

    routes: dict[str, tuple[str, Callable[..., Any]]] = {
        "/v1/images/generations": ("POST", server.generations),
        "/v1/images/edits": ("POST", server.edits),
        "/v1/chat/completions": ("POST", server.completions),
        "/v1/models": ("GET", server.models),
        "/v1/models/{model:path}": ("GET", server.model),
        "/health": ("GET", server.ready),
        "/health/ready": ("GET", server.ready),
        "/health/live": ("GET", server.live),
        "/metrics": ("GET", server.scrape),
        "/openapi.json": ("GET", server.openapi),
    }
    for route, (method, handle) in routes.items():
        app.add_api_route(route, with_deadline(handle) if method == "POST" else handle, methods=[method])

    def unknown(request: Request, error: Exception) -> Response:
        """The response to an unknown route, or to a wrong method of one."""
        assert isinstance(error, HTTPException)
        if error.status_code not in (404, 405):
            return error_response_for(error)
        known = ", ".join(f"{method} {route.partition('{')[0]}" for route, (method, _) in routes.items())
        message = f"there is no route {request.method} {shown(request.url.path)}. Routes are {known}."
        response = error_response_for(RequestError(message, "", "unknown_url", error.status_code))
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(HTTPException, unknown)
    # Errors of clients in GET routes. The handler of Exception would log them as faults of the server.
    app.add_exception_handler(RequestError, lambda _, error: error_response_for(error))
    app.add_exception_handler(Exception, lambda _, error: error_response_for(error))
    app.add_middleware(Gate, keys=keys, limits=limits)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_headers=["*"], allow_methods=["GET", "POST"],
            expose_headers=["X-Request-Id"],
        )  # fmt: skip
    app.add_middleware(HostCheck, hosts=allowed_hosts, origins=origins)
    app.add_middleware(RequestLog, metrics=server.metrics, routes=[route for route in routes if "{" not in route])
    return app

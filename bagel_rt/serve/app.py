"""The routes."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial

import anyio
from fastapi import FastAPI, Request, Response
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import parse_options_header
from starlette.responses import JSONResponse

from bagel_rt.errors import Cancelled
from bagel_rt.pipeline import Bagel
from bagel_rt.request import ImageResult
from bagel_rt.serve import schema
from bagel_rt.serve.images import as_seen, read_picture, read_url
from bagel_rt.serve.limits import Limits
from bagel_rt.serve.metrics import CONTENT_TYPE, Measures
from bagel_rt.serve.middleware import Gate, answer_to, forget_body, readable
from bagel_rt.serve.responses import ChatAnswer, EventStream, picture_answer
from bagel_rt.serve.worker import Job, Worker

_EDIT_FILES = ("image", "image[]")
_INTERVAL = "cfg_interval"  # a list in a form: written as JSON or, by OpenAI's client, as fields named with []
_CHARSETS = (b"utf-8", b"utf8", b"us-ascii")  # of a form; some of the others that Python knows take hours to decode
_READERS = 4  # threads that read requests: each may hold one of the largest pictures that are allowed
_WRITERS = 2  # threads of answers, of their own: who sends what takes long to read is not to keep others' answers


class Server:
    """One model behind its routes.

    Attributes:
        worker: the model's thread; made when the application starts.
        measures: of ``/metrics``.
    """

    def __init__(self, bagel: Bagel, name: str, limits: Limits, hosts: frozenset[str] = frozenset()):
        """
        Args:
            bagel: the model.
            name: what it is called in answers.
            limits: of requests.
            hosts: that pictures may be fetched from.
        """
        self.bagel, self.name, self.limits, self.hosts = bagel, name, limits, hosts
        self.measures, self.worker, self.created = Measures(), None, int(time.time())
        self._readers = self._writers = self._ending = None

    @asynccontextmanager
    async def lifespan(self, _) -> AsyncIterator[None]:
        """The worker lives as long as the application."""
        self._readers, self._writers = anyio.CapacityLimiter(_READERS), anyio.CapacityLimiter(_WRITERS)
        self._ending = None
        self.worker = Worker(self.bagel, self.limits.queue, self.limits.batch, self.measures.observe)
        self.measures.watch(self.worker)
        try:
            yield
        finally:
            self.end()
            await asyncio.to_thread(self._ending.join)

    def end(self) -> None:
        """Take no more requests, and let those that are under way finish or, after ``limits.grace`` seconds, fail.
        Returns at once."""
        if self._ending is None:
            self.worker.refuse()
            # A thread that the process does not wait for, should it be told to end at once.
            self._ending = threading.Thread(target=self.worker.stop, args=(self.limits.grace,), daemon=True)
            self._ending.start()

    async def health(self) -> Response:
        """200 while requests are taken, else 503."""
        worker = self.worker
        status = "failed" if worker.failure is not None else "stopping" if worker.stopping else "ok"
        state = {"status": status, "model": self.name, "queue": worker.waiting}
        return JSONResponse(state, 200 if status == "ok" else 503)

    async def metrics(self) -> Response:
        """Prometheus' text."""
        return Response(self.measures.text(), media_type=CONTENT_TYPE)

    async def models(self) -> dict:
        """The only model, as a list."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, model: str) -> Response:
        """The only model, if that is its name."""
        self._check_model(model)
        return JSONResponse(self._card())

    def _card(self) -> dict:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "bagel_rt"}

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise HTTPException(404, f"the model {name[:60]!r} is not here: allowed is {self.name!r}, or no name")

    async def _read(self, function: Callable, *arguments):
        return await anyio.to_thread.run_sync(partial(function, *arguments), limiter=self._readers)

    async def _write(self, function: Callable, *arguments):
        return await anyio.to_thread.run_sync(partial(function, *arguments), limiter=self._writers)

    async def generations(self, request: Request, deadline: float) -> Response:
        """Text to pictures."""
        said = schema.Generation.model_validate(readable(await _body(request)))
        forget_body(request)
        return await self._draw(request, deadline, said, [])

    async def edits(self, request: Request, deadline: float) -> Response:
        """Pictures and a text to pictures."""
        files, fields = await self._read_form(request)
        if not files:
            raise ValueError("image is missing: send one to edit, as a file of multipart/form-data")
        said = schema.Edit.model_validate(fields)
        self._check_model(said.model)
        pictures = []
        while files:  # which are not to wait for the model
            pictures.append(await self._read(self._seen, files.pop(0)))
        forget_body(request)
        return await self._draw(request, deadline, said, pictures)

    async def _read_form(self, request: Request) -> tuple[list[bytes], dict]:
        """(contents of the files, fields) of a form.

        Raises:
            ValueError: it is in another charset, has other files, or says something twice.
        """
        charset = parse_options_header(request.headers.get("content-type"))[1].get(b"charset", b"utf-8")
        if charset.lower() not in _CHARSETS:
            raise ValueError(f"the form's charset is {charset[:40].decode('latin-1')!r}: send UTF-8")
        files, fields, interval = [], {}, []
        async with request.form(max_files=self.limits.images, max_fields=40) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name not in _EDIT_FILES:
                        raise ValueError(f"{name[:40]!r} is a file: allowed are files named image or image[]")
                    files.append(await value.read())
                elif name == f"{_INTERVAL}[]":
                    interval.append(value)
                elif name in fields:
                    raise ValueError(f"{name[:40]!r} is given twice: send it once")
                elif name == _INTERVAL:
                    fields[name] = readable(f'{{"{name}": {value}}}'.encode())[name]
                else:
                    fields[name] = value
        if interval and _INTERVAL in fields:
            raise ValueError(f"{_INTERVAL} and {_INTERVAL}[] are both given: send one of them")
        if interval:
            fields[_INTERVAL] = interval
        return files, fields

    def _seen(self, data: bytes) -> Image.Image:
        return as_seen(read_picture(data, self.limits), self.bagel.model.config.vae_transform)

    async def _draw(self, request: Request, deadline: float, said: schema.ImageFields, pictures) -> Response:
        self._check_model(said.model)
        requests = await self._read(schema.image_requests, self.bagel, self.limits, said, pictures)
        first = requests[0]
        together = (schema.drawn_size(self.bagel, first), first.image.num_timesteps, first.system is None)
        jobs = [Job(one, "picture", deadline, together) for one in requests]
        self.worker.submit(jobs)
        async with _present(request, jobs):
            results = [await _result(job) for job in jobs]
        self.measures.pictures.inc(len(results))
        shown = schema.prompt_tokens(self.bagel, first)
        return JSONResponse(await self._write(picture_answer, results, said.output_format, shown))

    async def completions(self, request: Request, deadline: float) -> Response:
        """Texts and pictures to a text; or, with ``modalities`` of both, to texts and pictures."""
        begun = time.perf_counter()
        said = schema.Chat.model_validate(readable(await _body(request)))
        self._check_model(said.model)
        parts = await self._read(self._read_parts, said)
        said.messages = []  # whose pictures, as they came, are not to wait for the model
        forget_body(request)
        asked = await self._read(schema.chat_request, self.bagel, self.limits, said, parts)
        shown = sum(schema.prompt_tokens(self.bagel, asked))
        job = Job(asked, "interleaved" if said.draws else "text", deadline)
        self.worker.submit([job])
        answer = ChatAnswer(job, self.name, shown, self._write)
        if said.stream:

            def ended(status: int) -> None:
                self._count_written(answer)
                self.measures.answered("/v1/chat/completions", status, time.perf_counter() - begun)

            with_usage = said.stream_options is not None and said.stream_options.include_usage
            return EventStream(job, answer.events(with_usage), ended)
        async with _present(request, [job]):
            body = await answer.whole()
        self._count_written(answer)
        return JSONResponse(body)

    def _count_written(self, answer: ChatAnswer) -> None:
        if answer.written is not None:
            self.measures.tokens.inc(answer.written.tokens)
            self.measures.pictures.inc(sum(isinstance(part, ImageResult) for part in answer.written.parts))

    def _read_parts(self, said: schema.Chat) -> list:
        parts = [part for message in said.messages for part in message.parts]
        pictures = sum(part.type == "image_url" for part in parts)
        if pictures > self.limits.images:
            raise ValueError(f"{pictures} pictures: this server allows up to {self.limits.images} in a request")
        rule = self.bagel.model.config.vae_transform
        return [
            part.text if part.type == "text" else as_seen(read_url(part.image_url.url, self.limits, self.hosts), rule)
            for part in parts
        ]


async def _body(request: Request) -> bytes:
    """The bytes of a body; the request does not keep them."""
    return b"".join([chunk async for chunk in request.stream()])


async def _result(job: Job) -> ImageResult:
    async with aclosing(job.listen()) as events:
        return [value async for _, value in events][-1]


@asynccontextmanager
async def _present(request: Request, jobs: list[Job]) -> AsyncIterator[None]:
    """Meanwhile jobs are cancelled if the client goes away; at the end nobody waits for them any more."""

    async def watch():
        with suppress(Exception):  # of a client that sends more than its request: nobody takes that in
            while (await request.receive())["type"] != "http.disconnect":
                pass
        for job in jobs:
            job.cancel()
            job.tell("error", Cancelled())

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        for job in jobs:
            job.cancel()


def create_app(
    bagel: Bagel, name: str, limits: Limits | None = None, key: str | None = None, hosts: frozenset[str] = frozenset()
) -> FastAPI:
    """The application over a loaded model; run it with :func:`bagel_rt.serve.run.make_server`.

    Args:
        bagel: the model; the application's own from its start on.
        name: of the model in answers.
        limits: of requests.
        key: that clients must send; None for none.
        hosts: that pictures may be fetched from.
    """
    limits = limits or Limits()
    server = Server(bagel, name, limits, hosts)
    app = FastAPI(title="bagel_rt", lifespan=server.lifespan, openapi_url=None, redirect_slashes=False)
    app.state.server = server

    def counted(route: str, handle: Callable):
        async def handler(request: Request) -> Response:
            begun = time.perf_counter()
            try:
                answer = await handle(request, time.monotonic() + limits.seconds)
            except Exception as error:
                answer = answer_to(error)
            if not isinstance(answer, EventStream):  # which is answered at its end
                server.measures.answered(route, answer.status_code, time.perf_counter() - begun)
            return answer

        return handler

    for route, handle in (
        ("/v1/images/generations", server.generations),
        ("/v1/images/edits", server.edits),
        ("/v1/chat/completions", server.completions),
    ):
        app.add_api_route(route, counted(route, handle), methods=["POST"])
    app.add_api_route("/v1/models", server.models, methods=["GET"])
    app.add_api_route("/v1/models/{model:path}", server.model, methods=["GET"])
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/metrics", server.metrics, methods=["GET"])
    app.add_exception_handler(HTTPException, lambda _, error: answer_to(error))
    app.add_exception_handler(Exception, lambda _, error: answer_to(error))
    app.add_middleware(Gate, key=key, limits=limits)
    return app

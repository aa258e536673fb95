"""The routes."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch
from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.responses import JSONResponse, StreamingResponse

from bagel_rt.pipeline import Bagel
from bagel_rt.request import Cancelled, ImageResult
from bagel_rt.serve import schema
from bagel_rt.serve.limits import Limits
from bagel_rt.serve.measures import CONTENT_TYPE, Measures
from bagel_rt.serve.pictures import encode, read_picture, read_url
from bagel_rt.serve.protection import Gate, TooLarge, error_response, log, readable
from bagel_rt.serve.worker import Busy, Job, Late, Stopping, Worker

_EDIT_FILES = ("image", "image[]")
_NUMBERS = ("n", "seed", "num_timesteps", "max_think_token_n")
_CLOSED = 499  # of the counters: the client went away


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

    @asynccontextmanager
    async def lifespan(self, _) -> AsyncIterator[None]:
        """The worker lives as long as the application."""
        self.worker = Worker(self.bagel, self.limits.queue, self.limits.batch, self.measures.observe)
        self.measures.watch(self.worker)
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.stop, self.limits.grace)

    async def health(self) -> Response:
        """200 while requests are taken, else 503."""
        failure = self.worker.failure
        state = {"status": "ok" if failure is None else "failed", "model": self.name, "queue": self.worker.waiting}
        return JSONResponse(state, 200 if failure is None else 503)

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

    async def generations(self, request: Request) -> Response:
        """Text to pictures."""
        said = schema.Generation.model_validate(readable(await request.body()))
        return await self._draw(request, said, [])

    async def edits(self, request: Request) -> Response:
        """Pictures and a text to pictures."""
        async with request.form(max_files=self.limits.images, max_fields=40, max_part_size=1 << 20) as form:
            files, fields = [], {}
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name not in _EDIT_FILES:
                        raise ValueError(f"{name[:40]} is a file: allowed are files named image or image[]")
                    files.append(await value.read())
                else:
                    fields[name] = _form_value(name, value)
        if not files:
            raise ValueError("image is missing: send one to edit, as a file")
        said = schema.Edit.model_validate(fields)
        pictures = [await run_in_threadpool(read_picture, data, self.limits) for data in files]
        return await self._draw(request, said, pictures)

    async def _draw(self, request: Request, said: schema.ImageFields, pictures) -> Response:
        self._check_model(said.model)
        requests = await run_in_threadpool(schema.image_requests, self.bagel, self.limits, said, pictures)
        first = requests[0]
        same = None if pictures else (first.size, first.image.num_timesteps, first.system is None)
        deadline = time.monotonic() + self.limits.seconds
        jobs = [Job(one, "picture", deadline, same) for one in requests]
        self.worker.submit(jobs)
        results = await _unless_gone(request, jobs, self._results(jobs))
        self.measures.pictures.inc(len(results))
        data = []
        for result in results:
            told = {"b64_json": await run_in_threadpool(encode, result.image, said.output_format), "seed": result.seed}
            data.append(told | ({"revised_prompt": result.thought} if result.thought is not None else {}))
        size = f"{results[0].image.width}x{results[0].image.height}"
        answer = {"created": int(time.time()), "data": data, "size": size, "output_format": said.output_format}
        return JSONResponse(answer | {"usage": _usage(sum(schema.prompt_tokens(self.bagel, first)), 0)})

    @staticmethod
    async def _results(jobs: list[Job]) -> list:
        results = []
        for job in jobs:
            async for kind, value in job.listen():
                if kind == "result":
                    results.append(value)
        return results

    async def completions(self, request: Request) -> Response:
        """Texts and pictures to a text; or, with ``modalities`` of both, to texts and pictures."""
        said = schema.Chat.model_validate(readable(await request.body()))
        self._check_model(said.model)
        parts = await run_in_threadpool(self._read_parts, said)
        asked = await run_in_threadpool(schema.chat_request, self.bagel, self.limits, said, parts)
        job = Job(asked, "interleaved" if said.draws else "text", time.monotonic() + self.limits.seconds)
        self.worker.submit([job])
        answer = _Answer(self, said, job, sum(schema.prompt_tokens(self.bagel, asked)))
        if said.stream:
            return StreamingResponse(answer.stream(), media_type="text/event-stream")
        return JSONResponse(await _unless_gone(request, [job], answer.whole()))

    def _read_parts(self, said: schema.Chat) -> list:
        parts = [part for message in said.messages for part in message.parts]
        pictures = sum(part.type == "image_url" for part in parts)
        if pictures > self.limits.images:
            raise ValueError(f"{pictures} pictures: this server allows up to {self.limits.images} in a request")
        return [
            part.text if part.type == "text" else read_url(part.image_url.url, self.limits, self.hosts)
            for part in parts
        ]


class _Answer:
    """A chat's answer, whole or in pieces."""

    def __init__(self, server: Server, said: schema.Chat, job: Job, prompt_tokens: int):
        self._server, self._said, self._job, self._prompt_tokens = server, said, job, prompt_tokens
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    async def whole(self) -> dict:
        """The body of the answer."""
        text, images, written = [], [], 0
        async for delta, count in self._deltas():
            text.append(delta.get("content", ""))
            images += delta.get("images", [])
            written = count
        message = {"role": "assistant", "content": "".join(text)} | ({"images": images} if images else {})
        choice = {"index": 0, "message": message, "finish_reason": self._reason(written), "logprobs": None}
        return self._body("chat.completion", [choice]) | {"usage": _usage(self._prompt_tokens, written)}

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events; an error after the first is an event too."""
        written = 0
        try:
            yield self._event({"role": "assistant", "content": ""})
            async for delta, count in self._deltas():
                written = count
                if delta:
                    yield self._event(delta)
            yield self._event({}, self._reason(written))
            if self._said.stream_options and self._said.stream_options.include_usage:
                body = self._body("chat.completion.chunk", []) | {"usage": _usage(self._prompt_tokens, written)}
                yield f"data: {json.dumps(body)}\n\n"
            yield "data: [DONE]\n\n"
        except Exception as error:
            answer = answer_to(error)
            yield f"data: {answer.body.decode()}\n\n"
        finally:
            self._job.cancel()

    async def _deltas(self) -> AsyncIterator[tuple[dict, int]]:
        """(what is new, tokens so far)."""
        count = 0
        async for kind, value in self._job.listen():
            if kind == "text":
                yield {"content": value}, count
            elif kind == "progress" and value.stage == "text":
                count = value.step
            elif kind == "result" and isinstance(value, int):
                yield {}, value
                count = value
            elif kind == "result":
                for part in value:
                    yield (await run_in_threadpool(_part_of, part)), count
        self._server.measures.tokens.inc(count)

    def _reason(self, written: int) -> str:
        return "length" if written >= self._job.request.text.max_think_token_n - 1 else "stop"

    def _event(self, delta: dict, reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return f"data: {json.dumps(self._body('chat.completion.chunk', [choice]))}\n\n"

    def _body(self, kind: str, choices: list) -> dict:
        server = self._server
        return {"id": self._id, "object": kind, "created": self._created, "model": server.name, "choices": choices}


def _part_of(part: str | ImageResult) -> dict:
    """A text or picture of an interleaved answer, as a delta."""
    if isinstance(part, str):
        return {"content": part}
    url = f"data:image/png;base64,{encode(part.image, 'png')}"
    return {"images": [{"type": "image_url", "image_url": {"url": url}}]}


def _usage(prompt: int, written: int) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def _form_value(name: str, value: str):
    """A field of a form as JSON would have it."""
    if value in ("true", "false") and name in ("think", "do_sample"):
        return value == "true"
    if name == "cfg_interval":
        return readable(f'{{"cfg_interval": {value}}}'.encode())["cfg_interval"]
    return value


async def _unless_gone(request: Request, jobs: list[Job], answer):
    """The answer, unless the client goes away before; then its jobs are cancelled.

    Raises:
        Cancelled: it did.
    """
    waiting = asyncio.ensure_future(answer)

    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise Cancelled
        return waiting.result()
    finally:
        for job in jobs:
            job.cancel()
        for task in (waiting, leaving):
            task.cancel()


def answer_to(error: Exception) -> JSONResponse:
    """What a client is told of an error; what is not its fault is written to the log."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        return error_response(400, f"{where}: {first['msg']}"[:1000], "invalid_request_error", param=where[:200])
    if isinstance(error, HTTPException):
        return error_response(error.status_code, str(error.detail)[:1000], "invalid_request_error")
    if isinstance(error, TooLarge):
        raise error
    if isinstance(error, Busy):
        return error_response(429, "too many requests wait: try again", "rate_limit_error", "busy", Retry_After="1")
    if isinstance(error, Late):
        return error_response(504, "the answer took too long: ask for less, or try again", "server_error", "timeout")
    if isinstance(error, Stopping):
        return error_response(503, "the server is going down", "server_error", "stopping", Retry_After="5")
    if isinstance(error, Cancelled):
        return error_response(_CLOSED, "the client went away", "server_error", "cancelled")
    if isinstance(error, (ValueError, TypeError, MultiPartException)):
        return error_response(400, str(getattr(error, "message", error))[:1000], "invalid_request_error")
    name = uuid.uuid4().hex[:12]
    log.error("error %s", name, exc_info=error)
    if isinstance(error, torch.OutOfMemoryError):
        return error_response(503, f"not enough memory for this request (error {name})", "server_error", "memory")
    return error_response(500, f"the server failed at this request (error {name})", "server_error", "internal")


def create_app(
    bagel: Bagel, name: str, limits: Limits | None = None, key: str | None = None, hosts: frozenset[str] = frozenset()
) -> FastAPI:
    """The application over a loaded model; run it with uvicorn.

    Args:
        bagel: the model; the application's own from its start on.
        name: of the model in answers.
        limits: of requests.
        key: that clients must send; None for none.
        hosts: that pictures may be fetched from.
    """
    limits = limits or Limits()
    server = Server(bagel, name, limits, hosts)
    app = FastAPI(title="bagel_rt", lifespan=server.lifespan, openapi_url=None)
    app.state.server = server

    def counted(route: str, handle):
        async def handler(request: Request) -> Response:
            begun = time.perf_counter()
            try:
                answer = await handle(request)
            except TooLarge:
                raise
            except Exception as error:
                answer = answer_to(error)
            server.measures.requests.labels(route, answer.status_code).inc()
            server.measures.seconds.labels(route).observe(time.perf_counter() - begun)
            if answer.status_code == _CLOSED:
                server.measures.cancelled.inc()
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
    app.add_middleware(Gate, key=key, body=limits.body)
    return app

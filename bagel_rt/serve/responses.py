"""Responses in OpenAI's format: images, and chats as one body or as server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from bagel_rt.request import ImageResult
from bagel_rt.serve.images import encode
from bagel_rt.serve.metrics import CLOSED
from bagel_rt.serve.middleware import error_response_for
from bagel_rt.serve.worker import AsyncJob, Completion

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not buffer the stream
_SILENCE = 15.0  # seconds until a keep-alive comment: proxies close connections on which nothing is sent
_WAIT = ": wait\n\n"  # a comment, which clients ignore

InThread = Callable[..., Awaitable[Any]]
"""An async function that runs a function with its arguments in another thread."""


def images_response(results: list[ImageResult], output_format: str, prompt_tokens: tuple[int, int]) -> dict:
    """The body of a response with images.

    Args:
        results: one or more.
        output_format: "png", "jpeg" or "webp".
        prompt_tokens: (text tokens, image tokens) of the request.
    """
    data = []
    for result in results:
        thought = {"revised_prompt": result.thought} if result.thought is not None else {}
        data.append({"b64_json": encode(result.image, output_format), "seed": result.seed} | thought)
    input_tokens, output_tokens = sum(prompt_tokens), sum(len(result.latents) for result in results)
    details = {"text_tokens": prompt_tokens[0], "image_tokens": prompt_tokens[1]}
    usage = {"input_tokens": input_tokens, "input_tokens_details": details, "output_tokens": output_tokens}
    size = f"{results[0].image.width}x{results[0].image.height}"
    body = {"created": int(time.time()), "data": data, "size": size, "output_format": output_format}
    return body | {"usage": usage | {"total_tokens": input_tokens + output_tokens}}


class ChatResponse:
    """The response of a chat job, whole or streamed.

    Attributes:
        completion: the job's result; None until it has one.
    """

    def __init__(self, job: AsyncJob[Completion], model: str, prompt_tokens: int, in_thread: InThread):
        """
        Args:
            job: a submitted chat.
            model: its name.
            prompt_tokens: of the request.
            in_thread: encodes images with it.
        """
        self._job, self._model, self._prompt_tokens, self._in_thread = job, model, prompt_tokens, in_thread
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.completion: Completion | None = None

    async def whole(self) -> dict:
        """The body of an unstreamed response.

        Raises:
            Exception: as :meth:`~bagel_rt.serve.worker.AsyncJob.listen`.
        """
        async with aclosing(self._deltas()) as deltas:
            found = [delta async for delta in deltas if delta is not None]
        images = [image for delta in found for image in delta.get("images", ())]
        message: dict[str, Any] = {"role": "assistant", "content": "".join(delta.get("content", "") for delta in found)}
        if images:
            message["images"] = images
        choice = {"index": 0, "message": message, "finish_reason": self._reason(), "logprobs": None}
        return self._body("chat.completion", [choice]) | {"usage": self._usage()}

    async def events(self, with_usage: bool) -> AsyncGenerator[str, None]:
        """Server-sent events: the role, deltas, the finish reason, usage if ``with_usage``, and [DONE]; a comment after
        each period without news.

        Raises:
            Exception: as :meth:`~bagel_rt.serve.worker.AsyncJob.listen`.
        """
        yield self._event({"role": "assistant", "content": ""})
        async with aclosing(self._deltas(_SILENCE)) as deltas:
            async for delta in deltas:
                yield _WAIT if delta is None else self._event(delta)
        yield self._event({}, self._reason())
        if with_usage:
            yield _event(self._body("chat.completion.chunk", []) | {"usage": self._usage()})
        yield "data: [DONE]\n\n"

    async def _deltas(self, silence: float | None = None) -> AsyncGenerator[dict | None, None]:
        """Deltas of the message; None after ``silence`` seconds without one."""
        async with aclosing(self._job.listen(silence)) as pieces:
            async for piece in pieces:
                yield None if piece is None else {"content": piece}
        self.completion = self._job.result
        for part in self.completion.parts:
            yield await self._in_thread(_part_delta, part)

    def _reason(self) -> str:
        return "length" if self._job.result.cut else "stop"

    def _usage(self) -> dict:
        prompt, tokens = self._prompt_tokens, self._job.result.tokens
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    def _event(self, delta: dict, reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _event(self._body("chat.completion.chunk", [choice]))

    def _body(self, kind: str, choices: list) -> dict:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


class EventStream(StreamingResponse):
    """Server-sent events of a job. The job is cancelled when the stream ends, also if the client disconnects before the
    first event or between two. An error becomes the last event."""

    def __init__(self, job: AsyncJob, events: AsyncGenerator[str, None], ended: Callable[[int], None]):
        """
        Args:
            job: source of the events.
            events: each ends with an empty line.
            ended: called once, with the status that an unstreamed response would have.
        """
        self._guarded = self._with_errors(events)
        super().__init__(self._guarded, media_type="text/event-stream", headers=_STREAM_HEADERS)
        self._job, self._events, self._ended, self._status = job, events, ended, CLOSED

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # For spec versions above 2.3, Starlette does not watch for a disconnect while nothing is sent.
        scope = {**scope, "asgi": {**scope.get("asgi", {}), "spec_version": "2.3"}}
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()
            await self._guarded.aclose()
            await self._events.aclose()
            self._ended(self._status)

    async def _with_errors(self, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        try:
            async for event in events:
                yield event
            self._status = 200
        except Exception as error:
            response = error_response_for(error)
            self._status = response.status_code
            yield _event(json.loads(bytes(response.body)))


def _event(body: dict) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _part_delta(part: str | ImageResult) -> dict:
    """A text or image of an interleaved answer, as a delta."""
    if isinstance(part, str):
        return {"content": part}
    url = f"data:image/png;base64,{encode(part.image, 'png')}"
    return {"images": [{"type": "image_url", "image_url": {"url": url}}]}

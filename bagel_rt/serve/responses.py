"""Responses in OpenAI's format: images, and chats as one body or as server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from bagel_rt.request import ImageResult
from bagel_rt.serve.errors import error_response_for
from bagel_rt.serve.images import encode
from bagel_rt.serve.metrics import CLOSED
from bagel_rt.serve.worker import AsyncJob, Completion

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not buffer the stream
_SILENCE = 15.0  # seconds until a keep-alive comment: proxies close connections on which nothing is sent
_WAIT = ": wait\n\n"  # a comment, which clients ignore

InThread = Callable[..., Awaitable[Any]]
"""An async function that runs a function with its arguments in another thread."""


def images_response(
    results: list[ImageResult], output_format: str, quality: int, prompt_tokens: tuple[int, int]
) -> dict[str, Any]:
    """The body of a response with images.

    Args:
        results: one or more.
        output_format, quality: as of :func:`~bagel_rt.serve.images.encode`.
        prompt_tokens: (text tokens, image tokens) of the request.
    """
    data = []
    for result in results:
        thought = {"revised_prompt": result.thought} if result.thought is not None else {}
        data.append({"b64_json": encode(result.image, output_format, quality), "seed": result.seed} | thought)
    input_tokens, output_tokens = sum(prompt_tokens), sum(len(result.latents) for result in results)
    details = {"text_tokens": prompt_tokens[0], "image_tokens": prompt_tokens[1]}
    usage = {"input_tokens": input_tokens, "input_tokens_details": details, "output_tokens": output_tokens}
    size = f"{results[0].image.width}x{results[0].image.height}"
    body = {"created": int(time.time()), "data": data, "size": size, "output_format": output_format}
    return body | {"usage": usage | {"total_tokens": input_tokens + output_tokens}}


class ChatResponse:
    """The response of chat jobs, one for each choice, whole or streamed.

    Attributes:
        completions: results of the jobs, as far as they have one.
    """

    def __init__(self, jobs: Sequence[AsyncJob[Completion]], model: str, prompt_tokens: int, in_thread: InThread):
        """
        Args:
            jobs: submitted, one for each choice.
            model: its name.
            prompt_tokens: of the request.
            in_thread: encodes images with it.
        """
        self._jobs, self._model, self._prompt_tokens, self._in_thread = jobs, model, prompt_tokens, in_thread
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.completions: list[Completion] = []

    async def whole(self) -> dict[str, Any]:
        """The body of an unstreamed response.

        Raises:
            Exception: as :meth:`~bagel_rt.serve.worker.AsyncJob.listen`.
        """
        choices = []
        for index, job in enumerate(self._jobs):
            async with aclosing(self._deltas(job)) as deltas:
                found = [delta async for delta in deltas if delta is not None]
            message: dict[str, Any] = {"role": "assistant", "content": "".join(d.get("content", "") for d in found)}
            if images := [image for delta in found for image in delta.get("images", ())]:
                message["images"] = images
            reason = _finish_reason(job.result)
            choices.append({"index": index, "message": message, "finish_reason": reason, "logprobs": None})
        return self._body("chat.completion", choices) | {"usage": self._usage()}

    async def events(self, with_usage: bool) -> AsyncGenerator[str, None]:
        """Server-sent events: for each choice the role, deltas and the finish reason; usage if ``with_usage``; [DONE].

        A comment keeps the connection open while there is no output.

        Raises:
            Exception: as :meth:`~bagel_rt.serve.worker.AsyncJob.listen`.
        """
        for index, job in enumerate(self._jobs):  # the model answers one after the other
            yield self._event(index, {"role": "assistant", "content": ""})
            async with aclosing(self._deltas(job, _SILENCE)) as deltas:
                async for delta in deltas:
                    yield _WAIT if delta is None else self._event(index, delta)
            yield self._event(index, {}, _finish_reason(job.result))
        if with_usage:
            yield _event(self._body("chat.completion.chunk", []) | {"usage": self._usage()})
        yield "data: [DONE]\n\n"

    async def _deltas(
        self, job: AsyncJob[Completion], silence: float | None = None
    ) -> AsyncGenerator[dict[str, Any] | None, None]:
        """Deltas of a message; None after ``silence`` seconds without one."""
        async with aclosing(job.listen(silence)) as pieces:
            async for piece in pieces:
                yield None if piece is None else {"content": piece}
        self.completions.append(job.result)
        for part in job.result.parts:
            yield await self._in_thread(_part_delta, part)

    def _usage(self) -> dict[str, int]:
        prompt, tokens = self._prompt_tokens, sum(completion.tokens for completion in self.completions)
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    def _event(self, index: int, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _event(self._body("chat.completion.chunk", [choice]))

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


def _finish_reason(completion: Completion) -> str:
    return "length" if completion.cut else "stop"


class EventStream(StreamingResponse):
    """Server-sent events of jobs. The jobs are cancelled when the stream ends, also if the client disconnects before
    the first event or between two. An error becomes the last event."""

    def __init__(self, jobs: Sequence[AsyncJob], events: AsyncGenerator[str, None], ended: Callable[[], None]):
        """
        Args:
            jobs: sources of the events.
            events: each ends with an empty line.
            ended: called once.
        """
        self._guarded = self._with_errors(events)
        super().__init__(self._guarded, media_type="text/event-stream", headers=_STREAM_HEADERS)
        self._jobs, self._events, self._ended, self._status = jobs, events, ended, CLOSED

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # For spec versions above 2.3, Starlette does not watch for a disconnect while nothing is sent.
        scope = {**scope, "asgi": {**scope.get("asgi", {}), "spec_version": "2.3"}}
        try:
            await super().__call__(scope, receive, send)
        finally:
            for job in self._jobs:
                job.cancel()
            await self._guarded.aclose()
            await self._events.aclose()
            scope["bagel_rt.entry"].status = self._status
            self._ended()

    async def _with_errors(self, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        try:
            async for event in events:
                yield event
            self._status = 200
        except Exception as error:
            response = error_response_for(error)
            self._status = response.status_code
            yield _event(json.loads(bytes(response.body)))


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _part_delta(part: str | ImageResult) -> dict[str, Any]:
    """A text or image of an interleaved answer, as a delta."""
    if isinstance(part, str):
        return {"content": part}
    url = f"data:image/png;base64,{encode(part.image, 'png')}"
    return {"images": [{"type": "image_url", "image_url": {"url": url}}]}

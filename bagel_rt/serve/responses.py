"""Answers in OpenAI's form: pictures, and chats as a whole or as server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.responses import StreamingResponse

from bagel_rt.request import ImageResult
from bagel_rt.serve.images import encode
from bagel_rt.serve.metrics import CLOSED
from bagel_rt.serve.middleware import answer_to
from bagel_rt.serve.worker import Job, Written

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # what is written is to be seen at once
_SILENCE = 15.0  # seconds after which a stream says that it goes on: proxies end connections on which nothing comes
_WAIT = ": wait\n\n"  # a comment, which clients leave out


def picture_answer(results: list[ImageResult], form: str, prompt_tokens: tuple[int, int]) -> dict:
    """The body of the answer to a request for pictures.

    Args:
        results: one or more.
        form: "png", "jpeg" or "webp".
        prompt_tokens: (of texts, of pictures) that were sent.
    """
    data = []
    for result in results:
        thought = {"revised_prompt": result.thought} if result.thought is not None else {}
        data.append({"b64_json": encode(result.image, form), "seed": result.seed} | thought)
    drawn, shown = sum(len(result.latents) for result in results), sum(prompt_tokens)
    details = {"text_tokens": prompt_tokens[0], "image_tokens": prompt_tokens[1]}
    usage = {"input_tokens": shown, "input_tokens_details": details, "output_tokens": drawn}
    size = f"{results[0].image.width}x{results[0].image.height}"
    answer = {"created": int(time.time()), "data": data, "size": size, "output_format": form}
    return answer | {"usage": usage | {"total_tokens": shown + drawn}}


class ChatAnswer:
    """What a job writes, as OpenAI has it."""

    def __init__(self, job: Job, model: str, prompt_tokens: int, aside: Callable):
        """
        Args:
            job: a chat, submitted.
            model: its name.
            prompt_tokens: that were sent.
            aside: runs a function in another thread; awaited.
        """
        self._job, self._model, self._prompt_tokens, self._aside = job, model, prompt_tokens, aside
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.written: Written | None = None

    async def whole(self) -> dict:
        """The body of the answer.

        Raises:
            Exception: as :meth:`~bagel_rt.serve.worker.Job.listen`.
        """
        text, images = [], []
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                text.append(delta.get("content", ""))
                images += delta.get("images", [])
        message = {"role": "assistant", "content": "".join(text)} | ({"images": images} if images else {})
        choice = {"index": 0, "message": message, "finish_reason": self._reason(), "logprobs": None}
        return self._body("chat.completion", [choice]) | {"usage": self._usage()}

    async def events(self, with_usage: bool) -> AsyncGenerator[str, None]:
        """Server-sent events: a role, what is new, a reason, ``with_usage`` the counts, and [DONE]; a comment whenever
        nothing is new for a while.

        Raises:
            Exception: as :meth:`~bagel_rt.serve.worker.Job.listen`.
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
        """What is new; None after each ``silence`` of so many seconds."""
        async with aclosing(self._job.listen(silence)) as events:
            async for kind, value in events:
                if kind == "silence":
                    yield None
                elif kind == "text":
                    yield {"content": value}
                else:
                    self.written = value
                    for part in value.parts:
                        yield await self._aside(_part_of, part)

    def _reason(self) -> str:
        return "length" if self.written.cut else "stop"

    def _usage(self) -> dict:
        prompt, tokens = self._prompt_tokens, self.written.tokens
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    def _event(self, delta: dict, reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _event(self._body("chat.completion.chunk", [choice]))

    def _body(self, kind: str, choices: list) -> dict:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


class EventStream(StreamingResponse):
    """Events of a job, which ends with them however they end: with an error that is an event too, or because the
    client goes away, be it before the first or between two of them."""

    def __init__(self, job: Job, events: AsyncGenerator[str, None], ended: Callable[[int], None]):
        """
        Args:
            job: that the events are about.
            events: each ends with an empty line.
            ended: called once, with the status that a whole answer would have had.
        """
        super().__init__(self._with_errors(events), media_type="text/event-stream", headers=_STREAM_HEADERS)
        self._job, self._events, self._ended, self._status = job, events, ended, CLOSED

    async def __call__(self, scope, receive, send) -> None:
        # Told of a later version than 2.3, Starlette does not look whether the client is there while nothing is sent.
        scope = scope | {"asgi": scope.get("asgi", {}) | {"spec_version": "2.3"}}
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()
            await self.body_iterator.aclose()
            await self._events.aclose()
            self._ended(self._status)

    async def _with_errors(self, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        try:
            async for event in events:
                yield event
            self._status = 200
        except Exception as error:
            answer = answer_to(error)
            self._status = answer.status_code
            yield _event(json.loads(answer.body))


def _event(body: dict) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _part_of(part: str | ImageResult) -> dict:
    """A text or picture of an interleaved answer, as a delta."""
    if isinstance(part, str):
        return {"content": part}
    url = f"data:image/png;base64,{encode(part.image, 'png')}"
    return {"images": [{"type": "image_url", "image_url": {"url": url}}]}

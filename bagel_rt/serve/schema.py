"""The fields of requests, and the model's requests that they become.

Names are OpenAI's where it has one; the model's own hyper-parameters keep their official names. Unknown fields are
refused, and so are values that would have no effect.
"""

import secrets
import unicodedata
from dataclasses import fields, replace
from typing import Annotated, Any, Literal, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from bagel_rt.models.bagel.contexts import count_tokens
from bagel_rt.models.bagel.prompts import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE, THINK_INTERLEAVED
from bagel_rt.models.bagel.settings import (
    HYPERPARAMETERS,
    MAX_CHARACTERS,
    MAX_ROUNDS,
    ImageSettings,
    Task,
    resolve_settings,
)
from bagel_rt.pipeline import Bagel
from bagel_rt.request import Request
from bagel_rt.serve.limits import Limits
from bagel_rt.validation import check, integer, invalid, parse_size

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
_CHARACTERS = 32  # per token at most, far above that of real texts; longer prompts are refused before tokenization
_MARKS = 64  # on one character; writing needs a handful
_DRAWING = tuple(field.name for field in fields(ImageSettings))
_THINKING = ("max_think_token_n", "do_sample", "text_temperature")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: object) -> object:
        """Clients write null where they leave a field out."""
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the fields that the request sets."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


M = TypeVar("M", bound=BaseModel)


def _with_hyperparameters(base: type[M], *names: str) -> type[M]:
    """A subclass with hyper-parameters as further fields; one without a value has the task's default."""
    kinds: dict[str, Any] = {name: HYPERPARAMETERS[name].type for name in names}
    optional: dict[str, Any] = {name: (kind | None, None) for name, kind in kinds.items()}
    return create_model(base.__name__, __base__=base, **optional)


class ImageFields(_Strict):
    """Fields of generations and of edits, without the hyper-parameters."""

    prompt: Text
    model: str | None = None
    n: int = Field(1, ge=1)
    size: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    user: str | None = None
    seed: int | None = None
    think: bool = False
    negative_prompt: Text | None = None

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Those that the request sets. ValueError if one has no effect."""
        unused = [] if self.think else list(self.given(*_THINKING))
        if unused:
            raise ValueError(f"{unused[0]} has no effect without thoughts. Set think to true.")
        return self.given(*_DRAWING, *_THINKING)


class _Generation(ImageFields):
    """Body of ``POST /v1/images/generations``."""


class _Edit(ImageFields):
    """Fields of ``POST /v1/images/edits``; the images come as files. The result has the last image's size."""

    size: Literal["auto"] = "auto"


Generation = _with_hyperparameters(_Generation, *_DRAWING, *_THINKING)
Edit = _with_hyperparameters(_Edit, *_DRAWING, *_THINKING)


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class _URL(_Strict):
    url: str
    detail: Literal["auto", "high", "low"] = "auto"


class ImagePart(_Strict):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: _URL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """One message. The model knows no roles: it sees the contents of all messages in order."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)] | None = None
    images: Annotated[list[ImagePart], Field(fail_fast=True)] = []
    name: str | None = None

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """Its texts and images, in order; images of an earlier answer come after its text."""
        content = [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        return (content or []) + self.images


class _StreamOptions(_Strict):
    include_usage: bool = False


class ChatFields(_Strict):
    """Body of ``POST /v1/chat/completions``, without the hyper-parameters."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, max_length=1024)
    model: str | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    n: Literal[1] = 1
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)
    seed: int | None = None
    user: str | None = None
    modalities: Annotated[list[Literal["text", "image"]], Field(fail_fast=True)] | None = None
    think: bool | None = None
    max_rounds: int | None = Field(None, ge=1)
    size: str | None = None

    @field_validator("messages")
    @classmethod
    def _check_content(cls, messages: list[Message]) -> list[Message]:
        if not any(message.parts for message in messages):
            raise ValueError("no message has any content")
        return messages

    @property
    def draws(self) -> bool:
        """Whether the answer may contain images."""
        return "image" in (self.modalities or ())

    @property
    def most_tokens(self) -> int | None:
        """Maximum tokens of the answer."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Those that the request sets. ValueError if a field has no effect."""
        unused = [] if self.draws else list(self.given(*_DRAWING, "max_rounds", "size"))
        if unused:
            raise ValueError(f"{unused[0]} has no effect without images. Set modalities to ['text', 'image'].")
        given = self.given(*_DRAWING, "top_p", "top_k")
        if self.temperature is None and (given.get("top_p", 1) != 1 or given.get("top_k")):
            raise ValueError("top_p and top_k have no effect without sampling. Set temperature above 0.")
        if self.most_tokens is not None:
            given["max_think_token_n"] = self.most_tokens + 1  # counts forward passes; the last one writes nothing
        if self.temperature is not None:
            given["do_sample"] = self.temperature > 0
            if self.temperature:
                given["text_temperature"] = self.temperature
        return given


Chat = _with_hyperparameters(ChatFields, *_DRAWING, "top_p", "top_k")


def image_requests(bagel: Bagel, limits: Limits, body: ImageFields, images: list[Image.Image]) -> list[Request]:
    """The model's requests for ``body.n`` images, checked; their seeds are consecutive.

    Raises:
        ValueError: a field is out of range.
    """
    _check_limit("n", body.n, limits.outputs)
    _check_limit("num_timesteps", body.hyperparameters.get("num_timesteps"), limits.steps)
    _check_limit("max_think_token_n", body.hyperparameters.get("max_think_token_n"), limits.written_tokens + 1)
    settings = _resolve("edit" if images else "generate", body, limits)
    size = None if images else _read_size(bagel, limits, body.size)
    seed = _read_seed(body.seed, body.n)
    system = THINK_BEFORE_IMAGE if body.think else None
    requests = [
        Request([*images, body.prompt], size, seed + number, *settings, None, system, body.negative_prompt)
        for number in range(body.n)
    ]
    _check_request(bagel, limits, requests[0])
    return requests


def chat_request(bagel: Bagel, limits: Limits, body: ChatFields, parts: list[str | Image.Image]) -> Request:
    """The model's request for an answer to these texts and images, checked.

    Raises:
        ValueError: a field is out of range.
    """
    most_rounds = min(limits.outputs, MAX_ROUNDS)
    _check_limit("max_tokens", body.most_tokens, limits.written_tokens)
    _check_limit("max_rounds", body.max_rounds, most_rounds)
    _check_limit("num_timesteps", body.hyperparameters.get("num_timesteps"), limits.steps)
    settings = _resolve("interleave" if body.draws else "chat", body, limits)
    rounds = size = None
    if body.draws:
        rounds, size = body.max_rounds or min(3, most_rounds), _read_size(bagel, limits, body.size or "auto")
    thinks = body.draws if body.think is None else body.think
    system = (THINK_INTERLEAVED if body.draws else THINK_BEFORE_ANSWER) if thinks else None
    request = Request(parts, size, _read_seed(body.seed, 1), *settings, None, system, rounds=rounds)
    _check_request(bagel, limits, request)
    return request


def prompt_tokens(bagel: Bagel, request: Request) -> tuple[int, int]:
    """(tokens of a request's texts, system prompt included, tokens of its images)."""
    parts = [*request.inputs, *(part for part in (request.system, request.negative_prompt) if part is not None)]
    return count_tokens(bagel.model.config, bagel.tokenizer, parts, request.image is not None)[:2]


def drawn_size(bagel: Bagel, request: Request) -> tuple[int, int] | None:
    """(height, width) of the image that a request is for: that of its last input image, or the requested one."""
    images = [part for part in request.inputs if not isinstance(part, str)]
    return count_tokens(bagel.model.config, bagel.tokenizer, images, True)[2] or request.size


def _check_request(bagel: Bagel, limits: Limits, request: Request) -> None:
    """Check the client's texts against the server's limits, then the whole request against the model's."""
    texts = [part for part in (*request.inputs, request.negative_prompt) if isinstance(part, str)]
    most, characters = limits.prompt_tokens, sum(map(len, texts))
    if characters > _CHARACTERS * most:
        raise ValueError(f"the prompt must have at most {most} tokens on this server, got {characters} characters.")
    for text in texts:
        _check_marks(text)
    tokens = count_tokens(bagel.model.config, bagel.tokenizer, texts, False)[0]
    _check_limit("the number of tokens of the prompt", tokens, most)
    bagel.check_request(request)


def _check_marks(text: str) -> None:
    """Refuse long runs of combining marks: Python normalizes them in quadratic time, holding the GIL."""
    marks = 0
    for character in "" if text.isascii() else text:
        marks = marks + 1 if unicodedata.category(character)[0] == "M" else 0
        if marks > _MARKS:
            raise ValueError(f"a text must have at most {_MARKS} combining marks on one character. Remove some.")


def _check_limit(name: str, value: int | None, most: int) -> None:
    if value is not None and value > most:
        raise invalid(name, value, f"at most {most} on this server")


def _resolve(task: str, body: ImageFields | ChatFields, limits: Limits) -> Task:
    """The task's settings; defaults beyond the server's limits are lowered to them."""
    image, text = resolve_settings(task, body.hyperparameters)
    if image is not None:
        image = replace(image, num_timesteps=min(image.num_timesteps, limits.steps))
    return Task(image, replace(text, max_think_token_n=min(text.max_think_token_n, limits.written_tokens + 1)))


def _read_seed(seed: int | None, count: int) -> int:
    """The first of ``count`` consecutive seeds, a random one if none is given."""
    if seed is None:
        return secrets.randbelow(2**31)
    check("seed", seed, integer(0, 2**63 - count))
    return seed


def _read_size(bagel: Bagel, limits: Limits, size: str) -> tuple[int, int]:
    """ "WIDTHxHEIGHT" -> (height, width); "auto" is the model's default, or the largest square within the limits."""
    config = bagel.model.config
    if size == "auto":
        side = min(config.default_resolution, limits.side // config.latent_stride * config.latent_stride)
        height, width = side, side
    else:
        height, width = parse_size("size", size, "auto or WIDTHxHEIGHT, such as 1024x768")
        _check_limit("the longer side of size", max(height, width), limits.side)
    config.check_size(height, width)
    return height, width

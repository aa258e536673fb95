"""What requests may say, field by field; and the model's requests that they become.

Names are OpenAI's where it has one; the model's own hyper-parameters go by their official names beside them. A field
that nobody knows is refused, and so is a value that would have to be ignored: an answer is what was asked for.
"""

import secrets
import unicodedata
from dataclasses import replace
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from bagel_rt.models.bagel.contexts import count_tokens
from bagel_rt.models.bagel.prompts import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE, THINK_INTERLEAVED
from bagel_rt.models.bagel.settings import MAX_CHARACTERS, MAX_ROUNDS, resolve_settings
from bagel_rt.pipeline import Bagel
from bagel_rt.request import Request
from bagel_rt.serve.limits import Limits

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
_CHARACTERS = 32  # of a token at most, far above what texts have; more are not worth being counted
_MARKS = 64  # on one character; writing needs a handful
_IMAGE_FIELDS = (
    "cfg_text_scale",
    "cfg_img_scale",
    "cfg_interval",
    "cfg_renorm_min",
    "cfg_renorm_type",
    "timestep_shift",
    "num_timesteps",
)
_THOUGHT_FIELDS = ("max_think_token_n", "do_sample", "text_temperature")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _said(cls, data):
        """Null says nothing: clients write it where they leave a field out."""
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class ImageFields(_Strict):
    """What generations and edits share."""

    prompt: Text
    model: str | None = None
    n: int = Field(1, ge=1)
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    user: str | None = None
    seed: int | None = None
    think: bool = False
    negative_prompt: Text | None = None
    cfg_text_scale: float | None = None
    cfg_img_scale: float | None = None
    cfg_interval: tuple[float, float] | None = None
    cfg_renorm_min: float | None = None
    cfg_renorm_type: str | None = None
    timestep_shift: float | None = None
    num_timesteps: int | None = None
    max_think_token_n: int | None = None
    do_sample: bool | None = None
    text_temperature: float | None = None

    @property
    def hyperparameters(self) -> dict:
        """What was said of the model's own settings.

        Raises:
            ValueError: something was said that would change nothing.
        """
        given = {name: getattr(self, name) for name in (*_IMAGE_FIELDS, *_THOUGHT_FIELDS)}
        unused = [name for name in _THOUGHT_FIELDS if given[name] is not None]
        if unused and not self.think:
            raise ValueError(f"{unused[0]} is about thoughts: ask for them with think")
        return {name: value for name, value in given.items() if value is not None}


class Generation(ImageFields):
    """Body of ``POST /v1/images/generations``."""

    size: str = "auto"


class Edit(ImageFields):
    """Fields of ``POST /v1/images/edits``; the pictures come as files. The result has the last picture's size."""

    size: Literal["auto"] = "auto"


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class _URL(_Strict):
    url: str
    detail: Literal["auto", "high", "low"] = "auto"


class ImagePart(_Strict):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: _URL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """One message. The model knows no roles: what was said before is what it sees before the last text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)] | None = None
    images: Annotated[list[ImagePart], Field(fail_fast=True)] = []
    name: str | None = None

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """Its texts and pictures, in order; those of an answer that is sent back come after its text."""
        content = [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        return (content or []) + self.images


class _StreamOptions(_Strict):
    include_usage: bool = False


class Chat(_Strict):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, max_length=1024)
    model: str | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    n: Literal[1] = 1
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = None
    top_k: int | None = None
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)
    seed: int | None = None
    user: str | None = None
    modalities: Annotated[list[Literal["text", "image"]], Field(fail_fast=True)] | None = None
    think: bool | None = None
    max_rounds: int | None = Field(None, ge=1)
    size: str | None = None
    cfg_text_scale: float | None = None
    cfg_img_scale: float | None = None
    cfg_interval: tuple[float, float] | None = None
    cfg_renorm_min: float | None = None
    cfg_renorm_type: str | None = None
    timestep_shift: float | None = None
    num_timesteps: int | None = None

    @field_validator("messages")
    @classmethod
    def _says_something(cls, messages: list[Message]) -> list[Message]:
        if not any(message.parts for message in messages):
            raise ValueError("no message has any content")
        return messages

    @property
    def draws(self) -> bool:
        """Whether pictures may be part of the answer."""
        return "image" in (self.modalities or ())

    @property
    def most_tokens(self) -> int | None:
        """That the answer may have."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def hyperparameters(self) -> dict:
        """What was said of the model's own settings.

        Raises:
            ValueError: something was said that would change nothing.
        """
        drawing = {name: getattr(self, name) for name in (*_IMAGE_FIELDS, "max_rounds", "size")}
        unused = [name for name, value in drawing.items() if value is not None]
        if unused and not self.draws:
            raise ValueError(f"{unused[0]} is about pictures: ask for them with modalities ['text', 'image']")
        if self.temperature is None and (self.top_p not in (None, 1) or self.top_k):
            raise ValueError("top_p and top_k choose among sampled tokens: give a temperature above 0 too")
        given: dict[str, Any] = {"top_p": self.top_p, "top_k": self.top_k}
        if self.most_tokens is not None:
            given["max_think_token_n"] = self.most_tokens + 1  # counts forward passes; the last one writes nothing
        if self.temperature is not None:
            given["do_sample"] = self.temperature > 0
            given["text_temperature"] = self.temperature or None
        given |= {name: drawing[name] for name in _IMAGE_FIELDS}
        return {name: value for name, value in given.items() if value is not None}


def image_requests(bagel: Bagel, limits: Limits, said: ImageFields, pictures: list[Image.Image]) -> list[Request]:
    """The model's requests for ``said.n`` pictures, checked; seeds follow one another.

    Raises:
        ValueError: something is out of range.
    """
    _check_most("n", said.n, limits.pictures)
    _check_most("num_timesteps", said.num_timesteps, limits.steps)
    _check_most("max_think_token_n", said.max_think_token_n, limits.written_tokens + 1)
    image, text = _limited(resolve_settings("edit" if pictures else "generate", said.hyperparameters), limits)
    size = None if pictures else _read_size(bagel, limits, said.size)
    seed = _read_seed(said.seed, said.n)
    system = THINK_BEFORE_IMAGE if said.think else None
    requests = [
        Request([*pictures, said.prompt], size, seed + number, image, text, None, system, said.negative_prompt)
        for number in range(said.n)
    ]
    _check(bagel, limits, requests[0])
    return requests


def chat_request(bagel: Bagel, limits: Limits, said: Chat, parts: list[str | Image.Image]) -> Request:
    """The model's request for an answer to these texts and pictures, checked.

    Raises:
        ValueError: something is out of range.
    """
    most_rounds = min(limits.pictures, MAX_ROUNDS)
    _check_most("max_tokens", said.most_tokens, limits.written_tokens)
    _check_most("max_rounds", said.max_rounds, most_rounds)
    _check_most("num_timesteps", said.num_timesteps, limits.steps)
    image, text = _limited(resolve_settings("interleave" if said.draws else "chat", said.hyperparameters), limits)
    rounds = size = None
    if said.draws:
        rounds, size = said.max_rounds or min(3, most_rounds), _read_size(bagel, limits, said.size or "auto")
    thinks = said.draws if said.think is None else said.think
    system = (THINK_INTERLEAVED if said.draws else THINK_BEFORE_ANSWER) if thinks else None
    request = Request(parts, size, _read_seed(said.seed, 1), image, text, None, system, rounds=rounds)
    _check(bagel, limits, request)
    return request


def prompt_tokens(bagel: Bagel, request: Request) -> tuple[int, int]:
    """(tokens of a request's texts, the system prompt with them, tokens of its pictures)."""
    parts = [*request.inputs, *(part for part in (request.system, request.negative_prompt) if part is not None)]
    return count_tokens(bagel.model.config, bagel.tokenizer, parts, request.image is not None)[:2]


def drawn_size(bagel: Bagel, request: Request) -> tuple[int, int]:
    """(height, width) of the picture that a request is for: the last picture's, or as asked."""
    pictures = [part for part in request.inputs if not isinstance(part, str)]
    return count_tokens(bagel.model.config, bagel.tokenizer, pictures, True)[2] or request.size


def _check(bagel: Bagel, limits: Limits, request: Request) -> None:
    """What a client sent is held against the server's limits, all that the model will see against the model's."""
    texts = [part for part in (*request.inputs, request.negative_prompt) if isinstance(part, str)]
    most, characters = limits.prompt_tokens, sum(map(len, texts))
    if characters > _CHARACTERS * most:
        raise ValueError(f"the prompt has {characters} characters: this server allows up to {most} tokens")
    for text in texts:
        _check_marks(text)
    _check_most(
        "the number of tokens of the prompt", count_tokens(bagel.model.config, bagel.tokenizer, texts, False)[0], most
    )
    bagel.check(request)


def _check_marks(text: str) -> None:
    """Refuse long runs of combining marks: Python takes the square of their number to normalise them, and does nothing
    else meanwhile."""
    marks = 0
    for character in "" if text.isascii() else text:
        marks = marks + 1 if unicodedata.category(character)[0] == "M" else 0
        if marks > _MARKS:
            raise ValueError(f"a text has over {_MARKS} combining marks on one character: take some away")


def _check_most(name: str, value: int | None, most: int) -> None:
    if value is not None and value > most:
        raise ValueError(f"{name} is {value}: this server allows up to {most}")


def _limited(settings: tuple, limits: Limits) -> tuple:
    """(image, text) settings whose defaults may be beyond what this server allows; what was said is not."""
    image, text = settings
    if image is not None:
        image = replace(image, num_timesteps=min(image.num_timesteps, limits.steps))
    return image, replace(text, max_think_token_n=min(text.max_think_token_n, limits.written_tokens + 1))


def _read_seed(seed: int | None, count: int) -> int:
    """The first of ``count`` seeds, a random one if none is given."""
    if seed is None:
        return secrets.randbelow(2**31)
    if not 0 <= seed <= 2**63 - count:
        raise ValueError(f"seed is {seed}: allowed are integers from 0 to {2**63 - count}")
    return seed


def _read_size(bagel: Bagel, limits: Limits, size: str) -> tuple[int, int]:
    """ "WIDTHxHEIGHT" -> (height, width); "auto" is the model's usual square, or the largest that is allowed."""
    stride = bagel.model.config.latent_stride
    if size == "auto":
        side = min(bagel.model.config.default_resolution, limits.side // stride * stride)
        return bagel.check_size((side, side))
    width, _, height = size.partition("x")
    if not (width.isascii() and width.isdecimal() and height.isascii() and height.isdecimal()) or len(size) > 11:
        raise ValueError(f"size is {size[:40]!r}: allowed are 'auto' and WIDTHxHEIGHT, such as 1024x768")
    _check_most("size", max(int(width), int(height)), limits.side)
    return bagel.check_size((int(height), int(width)))

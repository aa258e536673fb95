"""What requests may say, field by field; and the model's requests that they become.

Names are OpenAI's where it has one; the model's own hyper-parameters go by their official names beside them. A field
that nobody knows is refused, and so is a value that would have to be ignored: an answer is what was asked for.
"""

import secrets
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from bagel_rt.conversation import count_tokens
from bagel_rt.pipeline import Bagel
from bagel_rt.prompts import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE, THINK_INTERLEAVED
from bagel_rt.request import Request
from bagel_rt.serve.limits import Limits
from bagel_rt.settings import CHAT, EDIT, GENERATE, INTERLEAVE, MAX_CHARACTERS, override

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
_IMAGE_FIELDS = (
    "cfg_text_scale",
    "cfg_img_scale",
    "cfg_interval",
    "cfg_renorm_min",
    "cfg_renorm_type",
    "timestep_shift",
    "num_timesteps",
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


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
        """What was said of the model's own settings."""
        names = (*_IMAGE_FIELDS, "max_think_token_n", "do_sample", "text_temperature")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


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
    content: Text | list[Part]
    name: str | None = None

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """Its texts and pictures, in order."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content


class _StreamOptions(_Strict):
    include_usage: bool = False


class Chat(_Strict):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    model: str | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    n: Literal[1] = 1
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    user: str | None = None
    modalities: list[Literal["text", "image"]] | None = None
    think: bool | None = None
    max_rounds: int = 3
    size: str = "auto"
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
    def hyperparameters(self) -> dict:
        """What was said of the model's own settings."""
        given: dict[str, Any] = {
            "max_think_token_n": self.max_completion_tokens or self.max_tokens,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
        if self.temperature is not None:
            given["do_sample"] = self.temperature > 0
            given["text_temperature"] = self.temperature or None
        if self.draws:
            given |= {name: getattr(self, name) for name in _IMAGE_FIELDS}
        return {name: value for name, value in given.items() if value is not None}


def image_requests(bagel: Bagel, limits: Limits, said: ImageFields, pictures: list[Image.Image]) -> list[Request]:
    """The model's requests for ``said.n`` pictures, checked; seeds follow one another.

    Raises:
        ValueError: something is out of range.
    """
    image, text = override(EDIT if pictures else GENERATE, said.hyperparameters)
    _check_most("n", said.n, limits.pictures)
    _check_most("num_timesteps", image.num_timesteps, limits.steps)
    _check_most("max_think_token_n", text.max_think_token_n, limits.written_tokens, said.think)
    size = None if pictures else _read_size(bagel, limits, said.size)
    seed = secrets.randbelow(2**31) if said.seed is None else said.seed
    if not 0 <= seed < 2**62:
        raise ValueError(f"seed is {seed}: allowed are integers from 0 to 2**62 - 1")
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
    image, text = override(INTERLEAVE if said.draws else CHAT, said.hyperparameters)
    _check_most("max_tokens", text.max_think_token_n, limits.written_tokens)
    rounds = size = None
    if said.draws:
        _check_most("max_rounds", said.max_rounds, limits.pictures)
        _check_most("num_timesteps", image.num_timesteps, limits.steps)
        rounds, size = said.max_rounds, _read_size(bagel, limits, said.size)
    thinks = said.draws if said.think is None else said.think
    system = (THINK_INTERLEAVED if said.draws else THINK_BEFORE_ANSWER) if thinks else None
    seed = secrets.randbelow(2**31) if said.seed is None else said.seed
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}: allowed are integers from 0 to 2**63 - 1")
    request = Request(parts, size, seed, image, text, None, system, rounds=rounds)
    _check(bagel, limits, request)
    return request


def prompt_tokens(bagel: Bagel, request: Request) -> tuple[int, int]:
    """(tokens of a request's texts, tokens of its pictures)."""
    parts = [*request.inputs, *(part for part in (request.system, request.negative_prompt) if part is not None)]
    return count_tokens(bagel.model.config, bagel.tokenizer, parts, request.image is not None)[:2]


def _check(bagel: Bagel, limits: Limits, request: Request) -> None:
    bagel.check(request)
    _check_most("the number of tokens of the prompt", prompt_tokens(bagel, request)[0], limits.prompt_tokens)


def _check_most(name: str, value: int, most: int, applies: bool = True) -> None:
    if applies and value > most:
        raise ValueError(f"{name} is {value}: this server allows up to {most}")


def _read_size(bagel: Bagel, limits: Limits, size: str) -> tuple[int, int]:
    """"WIDTHxHEIGHT" -> (height, width); "auto" is the model's usual square, or the largest that is allowed."""
    stride = bagel.model.config.latent_stride
    if size == "auto":
        side = min(bagel.model.config.usual_side, limits.side // stride * stride)
        return bagel.check_size((side, side))
    width, _, height = size.partition("x")
    if not (width.isascii() and width.isdecimal() and height.isascii() and height.isdecimal()) or len(size) > 11:
        raise ValueError(f"size is {size[:40]!r}: allowed are 'auto' and WIDTHxHEIGHT, such as 1024x768")
    _check_most("size", max(int(width), int(height)), limits.side)
    return bagel.check_size((int(height), int(width)))

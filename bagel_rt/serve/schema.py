"""The bodies of requests.

Names are OpenAI's where it has one; the model's own hyper-parameters keep their official names. Unknown fields are
refused, and so are values that would have no effect.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    TypeAdapter,
    WithJsonSchema,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from bagel_rt.models.bagel.settings import HYPERPARAMETERS, MAX_CHARACTERS, ImageSettings
from bagel_rt.serve import neutral
from bagel_rt.serve.errors import FieldError, check_field, invalid_field, shown
from bagel_rt.serve.neutral import Neutral

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
_DRAWING = tuple(field.name for field in fields(ImageSettings))
_THINKING = ("max_think_token_n", "do_sample", "text_temperature")
_LEAST_TEMPERATURE, _LEAST_TOP_P = 1e-3, 1e-6  # of the model; smaller values are the same as greedy decoding
_MAX_STOPS = 16
_UNLIMITED = ("top_k", "max_tokens", "max_completion_tokens")
M = TypeVar("M", bound=BaseModel)


class _Strict(BaseModel):
    """A body, or an object in one.

    Attributes:
        neutral_values: fields that are accepted only with no-op values.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    neutral_values: ClassVar[Mapping[str, Neutral]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: object) -> object:
        """Drop no-op values. Clients write null where they leave a field out, or an empty value in a
        field of another server."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if value is None:
                continue
            if name in cls.neutral_values:
                cls.neutral_values[name].check(name, value)
            elif name in cls.model_fields:
                kept[name] = value
            elif value not in ("", [], {}):
                supported = ", ".join(cls.model_fields)
                raise FieldError(
                    shown(name), f"is not a supported field. Supported are {supported}.", "unknown_parameter"
                )
        return kept

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Add the fields that are only accepted with neutral values."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        schema["properties"] |= {name: values.json_schema() for name, values in cls.neutral_values.items()}
        return schema

    def set_fields(self, *names: str) -> dict[str, Any]:
        """Those of these fields that the request sets."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def _with_hyperparameters(name: str, base: type[M], *names: str) -> type[M]:
    """A subclass with hyper-parameters as further fields; one without a value has the task's default."""

    def field(name: str) -> Any:
        def check(value: object) -> object:
            check_field("", value, HYPERPARAMETERS[name].metadata["spec"])
            return value

        row = HYPERPARAMETERS[name]
        kind: Any = row.type
        schema = TypeAdapter(kind).json_schema() | {"description": row.metadata["help"]}
        return (Annotated[Any, AfterValidator(check), WithJsonSchema(schema)], None)

    return create_model(name, __base__=base, **{name: field(name) for name in names})


class ImageFields(_Strict):
    """Fields of generations and of edits, without the hyper-parameters."""

    neutral_values = neutral.IMAGES

    prompt: Text
    model: str | None = None
    n: int = Field(1, ge=1)
    size: str = "auto"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100)
    seed: int | None = None
    think: bool = False
    negative_prompt: Text | None = None

    @model_validator(mode="after")
    def _check_effects(self) -> "ImageFields":
        """Refuse values without an effect."""
        unused = [] if self.think else list(self.set_fields(*_THINKING))
        if unused:
            raise FieldError(unused[0], "has no effect without thoughts. Set think to true.")
        if self.output_format == "png" and self.output_compression not in (None, 100):
            raise FieldError(
                "output_compression", "has no effect on PNG, which is lossless. Set output_format to jpeg or webp."
            )
        return self

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Those that the request sets."""
        return self.set_fields(*_DRAWING, *_THINKING)


Generation = _with_hyperparameters("Generation", ImageFields, *_DRAWING, *_THINKING)
Edit = _with_hyperparameters("Edit", ImageFields, *_DRAWING, *_THINKING)  # the images come as files


class TextPart(_Strict):
    """A text in a message."""

    neutral_values = neutral.PART

    type: Literal["text"]
    text: Text


class ImageURL(_Strict):
    neutral_values = neutral.URL

    url: str


def _read_url(value: object) -> object:
    """A plain string is a URL."""
    return {"url": value} if isinstance(value, str) else value


class ImagePart(_Strict):
    """An image in a message."""

    neutral_values = neutral.PART

    type: Literal["image_url"]
    image_url: Annotated[ImageURL, BeforeValidator(_read_url, json_schema_input_type=str | ImageURL)]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _read_content(value: object) -> object:
    """A string, alone or in a list, is a text."""
    if not isinstance(value, (str, list)):
        raise FieldError("", f"must be a string or a list of parts, got {type(value).__name__}.", "invalid_type")
    parts = [value] if isinstance(value, str) else value
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


class Message(_Strict):
    """One message. The model knows no roles: it sees the contents of all messages in order."""

    neutral_values = neutral.MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Part],
        Field(fail_fast=True),
        BeforeValidator(_read_content, json_schema_input_type=str | list[str | Part]),
    ] = []
    images: Annotated[list[ImagePart], Field(fail_fast=True)] = []


class StreamOptions(_Strict):
    neutral_values = neutral.STREAM_OPTIONS

    include_usage: bool = False


def _read_stops(value: object) -> object:
    """A string is a list of one; an empty string stops nothing."""
    values = [value] if isinstance(value, str) else value
    return [stop for stop in values if stop != ""] if isinstance(values, list) else values


Stop = Annotated[str, Field(max_length=1000)]


class ChatFields(_Strict):
    """Body of ``POST /v1/chat/completions``, without the hyper-parameters."""

    neutral_values = neutral.CHAT

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, max_length=1024)
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: Annotated[
        list[Stop],
        Field(max_length=_MAX_STOPS, fail_fast=True),
        BeforeValidator(_read_stops, json_schema_input_type=str | list[str]),
    ] = []
    temperature: float | None = Field(None, ge=0, le=100)
    seed: int | None = None
    modalities: Annotated[list[Literal["text", "image"]], Field(fail_fast=True)] = ["text"]
    think: bool | None = None
    max_rounds: int | None = Field(None, ge=1)
    size: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_sampling(cls, data: object) -> object:
        """-1 means no limit, on other servers; top_p of 0 means the most likely token."""
        if isinstance(data, dict):
            data = {name: value for name, value in data.items() if name not in _UNLIMITED or value != -1}
            top_p = data.get("top_p")
            if isinstance(top_p, (int, float)) and 0 <= top_p < _LEAST_TOP_P:
                data["top_p"] = _LEAST_TOP_P
        return data

    @field_validator("messages")
    @classmethod
    def _check_content(cls, messages: list[Message]) -> list[Message]:
        if not any(message.content or message.images for message in messages):
            raise FieldError("", "must have content: no message has any.")
        return messages

    @model_validator(mode="after")
    def _check_effects(self) -> "ChatFields":
        """Refuse values without an effect."""
        unused = [] if self.draws else list(self.set_fields(*_DRAWING, "max_rounds", "size"))
        if unused:
            raise FieldError(unused[0], "has no effect without images. Set modalities to ['text', 'image'].")
        if self.draws and self.n > 1:
            raise invalid_field("n", self.n, "1 if the answer may contain images")
        for name, value in self.set_fields("top_p", "top_k").items():
            if self.temperature is None and value != HYPERPARAMETERS[name].default:
                raise FieldError(name, "has no effect without sampling. Set temperature above 0.")
        return self

    @property
    def parts(self) -> list[tuple[str, TextPart | ImagePart]]:
        """(path, part) of all texts and images, in order; images of an earlier answer come after its text."""
        return [
            (f"messages[{number}].{name}[{index}]", part)
            for number, message in enumerate(self.messages)
            for name, parts in (("content", message.content), ("images", message.images))
            for index, part in enumerate(parts)
        ]

    @property
    def draws(self) -> bool:
        """Whether the answer may contain images."""
        return "image" in self.modalities

    @property
    def token_limit(self) -> int | None:
        """Maximum tokens of the answer."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Those that the request sets."""
        settings = self.set_fields(*_DRAWING, "top_p", "top_k")
        if self.token_limit is not None:
            settings["max_think_token_n"] = self.token_limit + 1  # counts forward passes; the last one writes nothing
        if self.temperature is not None:
            settings["do_sample"] = self.temperature >= _LEAST_TEMPERATURE
            if settings["do_sample"]:
                settings["text_temperature"] = self.temperature
        return settings


Chat = _with_hyperparameters("Chat", ChatFields, *_DRAWING, "top_p", "top_k")

"""The model's requests, made from the bodies of HTTP requests and checked against the limits and the model."""

import secrets
import unicodedata
from dataclasses import replace

from PIL import Image

from bagel_rt.models.bagel.contexts import count_tokens
from bagel_rt.models.bagel.prompts import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE, THINK_INTERLEAVED
from bagel_rt.models.bagel.settings import MAX_ROUNDS, ImageTask, ImageTaskName, TextSettings, resolve_settings
from bagel_rt.pipeline import Bagel
from bagel_rt.request import ImageRequest, InterleavedRequest, Request, check_prompt
from bagel_rt.serve.errors import FieldError, check_field, errors_of, invalid_field
from bagel_rt.serve.limits import Limits
from bagel_rt.serve.schema import ChatFields, ImageFields
from bagel_rt.validation import integer, parse_size

_CHARACTERS = 32  # per token at most, far above that of real texts; longer prompts are refused before tokenization
_MARKS = 64  # on one character; writing needs a handful


def image_requests(bagel: Bagel, limits: Limits, body: ImageFields, images: list[Image.Image]) -> list[ImageRequest]:
    """The model's requests for ``body.n`` images, checked; their seeds are consecutive.

    Raises:
        RequestError: a field is out of range.
    """
    settings = _resolve("edit" if images else "generate", body, limits)
    seeds = _read_seeds(body.seed, body.n, limits)
    system = THINK_BEFORE_IMAGE if body.think else None
    with errors_of("prompt"):
        check_prompt("prompt", body.prompt, "Describe the change" if images else "Describe the image")
    size = _read_size(bagel, limits, body.size, images)
    requests = [
        ImageRequest(
            inputs=[*images, body.prompt],
            seed=seed,
            text=settings.text,
            system=system,
            size=size,
            image=settings.image,
            negative_prompt=body.negative_prompt,
        )
        for seed in seeds
    ]
    _check_request("prompt", bagel, limits, requests[0])
    return requests


def chat_requests(bagel: Bagel, limits: Limits, body: ChatFields, parts: list[str | Image.Image]) -> list[Request]:
    """The model's requests for ``body.n`` answers to these texts and images, checked; their seeds are consecutive.

    Raises:
        RequestError: a field is out of range.
    """
    max_rounds = min(limits.outputs, MAX_ROUNDS)
    _check_limit("max_tokens", body.token_limit, limits.written_tokens)
    _check_limit("max_rounds", body.max_rounds, max_rounds)
    seeds = _read_seeds(body.seed, body.n, limits)
    images = [part for part in parts if not isinstance(part, str)]
    thinks = body.draws if body.think is None else body.think
    system = (THINK_INTERLEAVED if body.draws else THINK_BEFORE_ANSWER) if thinks else None
    if not images:
        with errors_of("messages"):
            check_prompt("messages", "".join(part for part in parts if isinstance(part, str)), "Ask a question")
    requests: list[Request] = []
    if body.draws:
        settings = _resolve("interleave", body, limits)
        # Any size: clients send the whole conversation with the same fields again, once it contains an image, too.
        size = _read_size(bagel, limits, body.size or "auto", [])
        for seed in seeds:
            request = InterleavedRequest(
                inputs=parts,
                seed=seed,
                text=settings.text,
                system=system,
                size=size,
                image=settings.image,
                rounds=body.max_rounds or min(3, max_rounds),
            )
            requests.append(request)
    else:
        text = _resolve_text(body, limits)
        requests += [Request(inputs=parts, seed=seed, text=text, system=system) for seed in seeds]
    _check_request("messages", bagel, limits, requests[0])
    return requests


def prompt_tokens(bagel: Bagel, request: Request) -> tuple[int, int]:
    """(tokens of a request's texts, system prompt included, tokens of its images)."""
    return count_tokens(bagel.model.config, bagel.tokenizer, request.parts, request.draws)[:2]


def _check_request(param: str, bagel: Bagel, limits: Limits, request: Request) -> None:
    """Check the client's texts against the server's limits, then the whole request against the model's."""
    texts = [part for part in request.parts if isinstance(part, str) and part is not request.system]
    limit, characters = limits.prompt_tokens, sum(map(len, texts))
    if characters > _CHARACTERS * limit:
        text = f"must have at most {limit} tokens on this server, got {characters} characters."
        raise FieldError(param, text, "context_length_exceeded")
    for text in texts:
        _check_marks(param, text)
    tokens = count_tokens(bagel.model.config, bagel.tokenizer, texts, False)[0]
    if tokens > limit:
        text = f"must have at most {limit} tokens on this server, got {tokens}."
        raise FieldError(param, text, "context_length_exceeded")
    with errors_of(param):
        bagel.check_request(request)


def _check_marks(param: str, text: str) -> None:
    """Refuse long runs of combining marks: Python normalizes them in quadratic time, holding the GIL."""
    marks = 0
    for character in "" if text.isascii() else text:
        marks = marks + 1 if unicodedata.category(character)[0] == "M" else 0
        if marks > _MARKS:
            raise FieldError(param, f"must have at most {_MARKS} combining marks on one character. Remove some.")


def _check_limit(param: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        raise invalid_field(param, value, f"at most {limit} on this server")


def _resolve(task: ImageTaskName, body: ImageFields | ChatFields, limits: Limits) -> ImageTask:
    """The task's settings; defaults beyond the server's limits are lowered to them."""
    _check_limit("num_timesteps", body.hyperparameters.get("num_timesteps"), limits.steps)
    image, text = resolve_settings(task, body.hyperparameters)
    image = replace(image, num_timesteps=min(image.num_timesteps, limits.steps))
    return ImageTask(image, _limit_text(text, body, limits))


def _resolve_text(body: ChatFields, limits: Limits) -> TextSettings:
    """The settings of a chat; a default beyond the server's limits is lowered to it."""
    return _limit_text(resolve_settings("chat", body.hyperparameters).text, body, limits)


def _limit_text(text: TextSettings, body: ImageFields | ChatFields, limits: Limits) -> TextSettings:
    limit = limits.written_tokens + 1
    _check_limit("max_think_token_n", body.hyperparameters.get("max_think_token_n"), limit)
    return replace(text, max_think_token_n=min(text.max_think_token_n, limit))


def _read_seeds(seed: int | None, count: int, limits: Limits) -> list[int]:
    """Consecutive seeds, from a random one if none is given."""
    _check_limit("n", count, limits.outputs)
    if seed is None:
        seed = secrets.randbelow(2**31)
    check_field("seed", seed, integer(0, 2**63 - count))
    return [seed + number for number in range(count)]


def _read_size(bagel: Bagel, limits: Limits, size: str, images: list[Image.Image]) -> tuple[int, int]:
    """ "WIDTHxHEIGHT" -> (height, width); "auto" is the last image's, or the model's default within the limits.

    Raises:
        RequestError: malformed, out of range, or not the size that the last image has for the model.
    """
    config = bagel.model.config
    if images:
        width, height = config.vae_transform.output_size(*images[-1].size)
        if size not in ("auto", f"{width}x{height}"):
            raise invalid_field("size", size, f"auto or {width}x{height}, the size of the last image for the model")
        return height, width
    if size == "auto":
        side = min(config.default_resolution, limits.side // config.latent_stride * config.latent_stride)
        return side, side
    with errors_of("size"):
        height, width = parse_size("size", size, "auto or WIDTHxHEIGHT, such as 1024x768")
        if max(height, width) > limits.side:
            raise invalid_field("size", size, f"at most {limits.side} pixels on the longer side on this server")
        config.check_size(height, width)
    return height, width

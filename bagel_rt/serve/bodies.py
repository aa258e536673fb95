"""Read the bodies of requests: JSON objects, and forms with files."""

import json
import re
from typing import Any, NoReturn

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile

from bagel_rt.serve import neutral
from bagel_rt.serve.errors import FieldError, RequestError, shown

_PIECES = 1 << 16  # JSON punctuation in a body; base64, which may be long, has none
_CHARSETS = (b"utf-8", b"utf8", b"us-ascii")  # of a form; some other codecs of Python take hours on hostile input
_FIELDS = 40  # of a form
_IMAGE = re.compile(r"image(\[[0-9]{0,3}\])?")
_INTERVAL = "cfg_interval"  # a list in a form: JSON or, from OpenAI's client, fields named with []
_INTEGER, _NUMBER = re.compile("-?[0-9]{1,20}"), re.compile(r"-?[0-9]{1,20}(\.[0-9]{0,20})?([eE][-+]?[0-9]{1,3})?")
_TEXTS = ("prompt", "negative_prompt", "model", "size", "user")  # fields of a form that are never numbers


async def read_body(request: Request) -> bytes:
    """The bytes of a body; unlike ``request.body()``, the request does not keep them."""
    return b"".join([chunk async for chunk in request.stream()])


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse a body as a JSON object.

    Raises:
        RequestError: not a JSON object, a repeated name, or so many values that parsing would take many times the
            body's size.
    """
    pieces = sum(map(data.count, (b",", b"[", b"{", b":")))
    if pieces > _PIECES:
        raise FieldError("", f"must have at most {_PIECES} commas, colons and brackets, got {pieces}.")
    if not data:
        raise FieldError("", "must be a JSON object, got no body.", "invalid_json")
    value = _parse("", data)
    if not isinstance(value, dict):
        raise FieldError("", f"must be a JSON object, got {type(value).__name__}.", "invalid_type")
    return value


def _parse(param: str, text: bytes | str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_float=_number, parse_constant=_refuse)
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise FieldError(param, f"must be JSON: {str(error)[:200]}.", "invalid_json") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of a repeated name, parsers take different values: a proxy may have checked another one."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _repeated(repeated)
    return value


def _number(text: str) -> int | float:
    """A number with a point or exponent; 2.0 is an integer, as some languages write all numbers."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _refuse(constant: str) -> NoReturn:
    raise FieldError("", f"must be JSON, which has no {constant}.", "invalid_json")


def _repeated(name: str) -> FieldError:
    return FieldError(shown(name), "must be given once, got several.")


async def read_form(request: Request, max_files: int) -> tuple[list[bytes], dict[str, Any]]:
    """(contents of the files, fields) of a form.

    Raises:
        RequestError: unsupported charset, unknown file, or a repeated field.
    """
    charset = parse_options_header(request.headers.get("content-type"))[1].get(b"charset", b"utf-8")
    if charset.lower() not in _CHARSETS:
        raise FieldError("", f"must be a form in UTF-8, got {charset[:40].decode('latin-1')!r}.")
    files, interval = [], []
    fields: dict[str, Any] = {}
    async with request.form(max_files=max_files, max_fields=_FIELDS) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.append(await _read_file(name, value))
                continue
            if _IMAGE.fullmatch(name):
                raise FieldError("image", "must be a file, got a text. With curl, write image=@FILE.")
            if name == f"{_INTERVAL}[]":
                interval.append(_read_value(name, value))
            elif name in fields:
                raise _repeated(name)
            elif (base := name.partition("[")[0]) != name and base in neutral.IMAGES:
                neutral.IMAGES[base].check(base, value)
            elif value or name in _TEXTS:
                fields[name] = _parse(name, value) if name == _INTERVAL else _read_value(name, value)
    if interval and _INTERVAL in fields:
        raise FieldError(_INTERVAL, f"must be given once, got {_INTERVAL} and {_INTERVAL}[].")
    if interval:
        fields[_INTERVAL] = interval
    return files, fields


async def _read_file(name: str, file: UploadFile) -> bytes:
    """The content of a form's file."""
    if _IMAGE.fullmatch(name):
        return await file.read()
    if name in neutral.IMAGES:
        neutral.IMAGES[name].check(name, "a file")
    raise FieldError("", f"must have files named image or image[], got {shown(name)}.")


def _read_value(name: str, text: str) -> str | bool | int | float:
    """The value of a form's field."""
    if name in _TEXTS:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text

"""Value checks with uniform errors: ``<name> must be <allowed>, got <value>. <remedy>.``

A :class:`Spec` states the allowed values. It belongs to a dataclass field (:func:`checked`, :func:`check_fields`) or is
passed to :func:`check`.
"""

import math
import re
import reprlib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from operator import index
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Spec:
    """The allowed values of an argument.

    Attributes:
        accepts: whether a value, of any type, is allowed.
        allowed: the allowed values in words, following "must be".
        remedy: what the user can do instead, a sentence without its period.
        convert: an allowed value -> the value to use, of a built-in type.
    """

    accepts: Callable[[Any], bool]
    allowed: str
    remedy: str = ""
    convert: Callable[[Any], Any] = lambda value: value


def as_integer(value: object) -> int | None:
    """The int of an int, a numpy integer or a torch scalar of an integer dtype; None for other values and for bool."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else int(value)
    if getattr(value, "ndim", 0) != 0 or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return index(value)  # type: ignore[arg-type]  # raises TypeError for other types
    except TypeError:
        return None


def as_number(value: object) -> int | float | None:
    """The int or float of a number of Python, numpy or torch; None for other values and for bool."""
    integer = as_integer(value)
    if integer is not None:
        return integer
    if getattr(value, "ndim", None) == 0:  # a scalar of numpy or torch
        value = value.item()  # type: ignore[attr-defined]
    return float(value) if isinstance(value, float) else None


def integer(low: int, high: float = math.inf, remedy: str = "") -> Spec:
    """An integer in [low, high], also of numpy or torch; not a bool."""

    def accepts(value: object) -> bool:
        number = as_integer(value)
        return number is not None and low <= number <= high

    allowed = "an integer " + (f"from {low} to {high}" if high < math.inf else f">= {low}")
    return Spec(accepts, str(low) if low == high else allowed, remedy, as_integer)


def number(low: float, high: float = math.inf, remedy: str = "", above: bool = False, below: bool = False) -> Spec:
    """A number in [low, high], without ``low`` if ``above`` and ``high`` if ``below``; not a bool or NaN."""

    def accepts(value: object) -> bool:  # comparisons with NaN are false
        number = as_number(value)
        if number is None or not low <= number <= high:
            return False
        return not (above and number == low) and not (below and number == high)

    allowed = f"from {low:g} to {high:g}"
    if above or below or high == math.inf:
        allowed = f">{'' if above else '='} {low:g}"
        allowed += f" and <{'' if below else '='} {high:g}" if high < math.inf else ""
    return Spec(accepts, f"a number {allowed}", remedy, as_number)


BOOLEAN = Spec(lambda value: isinstance(value, bool), "true or false")


def one_of(options: tuple[object, ...], remedy: str = "") -> Spec:
    """One of several values."""
    *others, last = map(str, options)
    return Spec(lambda value: value in options, f"{', '.join(others)} or {last}", remedy)


def invalid(name: str, value: object, allowed: str, remedy: str = "") -> ValueError:
    """The error for a value that is not allowed."""
    return ValueError(f"{name} must be {allowed}, got {reprlib.repr(value)}." + (f" {remedy}." if remedy else ""))


def check(name: str, value: object, spec: Spec) -> Any:
    """The value, converted to a built-in type; ValueError unless it is allowed."""
    if not spec.accepts(value):
        raise invalid(name, value, spec.allowed, spec.remedy)
    return spec.convert(value)


def checked(spec: Spec, default: Any = MISSING, **metadata: Any) -> Any:
    """A dataclass field for :func:`check_fields`; ``metadata`` is stored with it. Typed as ``field()`` is."""
    return field(default=default, metadata={"spec": spec, **metadata})


def check_fields(instance: "DataclassInstance") -> None:
    """Check and convert every checked field of a dataclass instance; ValueError if one is not allowed.

    The message names a field by its metadata ``key``, if it has one.
    """
    for item in fields(instance):
        if "spec" in item.metadata:
            value = check(item.metadata.get("key", item.name), getattr(instance, item.name), item.metadata["spec"])
            object.__setattr__(instance, item.name, value)  # the dataclass may be frozen


def per_prompt(name: str, values: object, count: int) -> list[Any]:
    """The values as a list of ``count`` entries, one per prompt; ValueError if they are not."""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise invalid(name, values, f"one value for all prompts or a list of {count}, one per prompt")
    return list(values)


def parse_size(name: str, text: str, allowed: str = "WIDTHxHEIGHT, such as 1024x768") -> tuple[int, int]:
    """ "1024x768" -> (768, 1024): height and width in pixels. ValueError, naming ``name``, for any other text."""
    sides = re.fullmatch("([0-9]{1,5})x([0-9]{1,5})", text)
    if sides is None:
        raise invalid(name, text, allowed)
    return int(sides[2]), int(sides[1])

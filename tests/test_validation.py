"""Checked values: the values that each spec accepts, and the form of the error."""

import math
from dataclasses import dataclass

import pytest

from bagel_rt.validation import BOOLEAN, Spec, check, check_fields, checked, integer, number, one_of, parse_size

CASES = {  # (spec, allowed values in words, accepted values, rejected values)
    "integers of a range": (integer(1, 3), "an integer from 1 to 3", [1, 3], [0, 4, 2.0, True, "2", None]),
    "integers without an upper bound": (integer(0), "an integer >= 0", [0, 10**300], [-1, math.inf, math.nan]),
    "one integer": (integer(3, 3), "3", [3], [2, 4]),
    "numbers of a range": (number(0, 1), "a number from 0 to 1", [0, 0.5, 1], [-1e-9, 1.1, math.nan, True, "0"]),
    "numbers above a bound": (number(0, above=True), "a number > 0", [1e-9, math.inf], [0, 0.0, -1, math.nan]),
    "numbers below a bound": (number(0, 1, below=True), "a number >= 0 and < 1", [0, 0.9], [1, 1.0]),
    "numbers between two": (number(0, 9, above=True), "a number > 0 and <= 9", [9], [0, 9.1]),
    "flags": (BOOLEAN, "true or false", [True, False], [0, 1, "true", None]),
    "names": (one_of(("a", "b", "c")), "a, b or c", ["a", "c"], ["d", None, ["a"]]),
}


@pytest.mark.parametrize("spec, allowed, accepted, rejected", CASES.values(), ids=CASES)
def test_spec_accepts_the_allowed_values(spec, allowed, accepted, rejected):
    assert spec.allowed == allowed
    assert all(map(spec.accepts, accepted)) and not any(map(spec.accepts, rejected))


def test_error_contains_name_allowed_values_value_and_remedy():
    with pytest.raises(ValueError, match=r"^size must be an integer from 1 to 3, got 4\. Choose another\.$"):
        check("size", 4, integer(1, 3, "Choose another"))


def test_error_truncates_a_long_value():
    with pytest.raises(ValueError, match=r"^name must be short, got ") as error:
        check("name", "x" * 10**6, Spec(lambda value: False, "short"))
    assert len(str(error.value)) < 100


def test_error_names_a_field_by_its_key():
    @dataclass
    class Settings:
        steps: int = checked(integer(1), 5, key="num_steps")
        free: object = None

    check_fields(Settings(free="anything"))
    with pytest.raises(ValueError, match="^num_steps must be an integer >= 1, got 0"):
        check_fields(Settings(steps=0))


def test_size_is_width_times_height():
    assert parse_size("size", "1024x768") == (768, 1024)


@pytest.mark.parametrize("text", ["", "1024", "1024x", "x768", "1024X768", "1x2x3", "-1x5", "1.5x5", "٣x٣", "1e3x5"])
def test_rejects_a_malformed_size(text):
    with pytest.raises(ValueError, match="^size must be WIDTHxHEIGHT"):
        parse_size("size", text)

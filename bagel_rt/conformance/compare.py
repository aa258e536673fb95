"""One line of a conformance report: a computed value beside a recorded one."""

from dataclasses import dataclass

import torch

TOLERANCE = 5e-5  # of the largest recorded magnitude: float32 against float32


@dataclass(frozen=True)
class Comparison:
    """What came of comparing one value.

    Attributes:
        name: of the recorded value.
        error: max |got - want| / max |want| of tensors; 0 or 1 of values that are equal or not.
        tolerance: the largest error that passes.
        passed: whether it did.
        note: why it could not be compared, or why the tolerance is another.
    """

    name: str
    error: float
    tolerance: float
    passed: bool
    note: str = ""


def compare(
    name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float = TOLERANCE, note: str = ""
) -> Comparison:
    """Compare tensors: floating ones within ``tolerance`` of the largest magnitude, others for equality."""
    got = got.detach().cpu()
    if got.shape != want.shape:
        return Comparison(name, 1.0, tolerance, False, f"shape {tuple(got.shape)}, recorded {tuple(want.shape)}")
    if not want.is_floating_point():
        return agree(name, bool((got == want).all()), True, note)
    if not want.numel():
        return Comparison(name, 0.0, tolerance, True, note)
    largest = want.double().abs().max().item()
    error = (got.double() - want.double()).abs().max().item() / (largest or 1.0)
    return Comparison(name, error, tolerance, error <= tolerance, note)


def agree(name: str, got, want, note: str = "") -> Comparison:
    """Compare values for equality."""
    same = got == want
    return Comparison(
        name, 0.0 if same else 1.0, 0.0, same, note if same else f"{_short(got)}, recorded {_short(want)}"
    )


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."

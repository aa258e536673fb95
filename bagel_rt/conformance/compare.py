"""Compare a computed value with a recorded one."""

from dataclasses import dataclass
from typing import Any

import torch

Meta = dict[str, Any]
"""The ``meta.json`` of a case: inputs, hyper-parameters, and results that are not tensors."""

Tensors = dict[str, torch.Tensor]
"""The recorded tensors of a case, or computed ones, by name."""

TOLERANCE = 5e-5  # relative to the largest recorded magnitude; both sides are float32


@dataclass(frozen=True)
class Comparison:
    """The result of comparing one value.

    Attributes:
        name: of the recorded value.
        error: for tensors, max |actual - recorded| / max |recorded|; for other values, 0 if equal, else 1.
        tolerance: the largest error that passes.
        passed: whether the error is within the tolerance.
        note: why the values could not be compared, or why the tolerance is not the usual one.
    """

    name: str
    error: float
    tolerance: float
    passed: bool
    note: str = ""


def compare_tensors(
    name: str, actual: torch.Tensor, recorded: torch.Tensor, tolerance: float = TOLERANCE, note: str = ""
) -> Comparison:
    """Compare floating-point tensors within ``tolerance`` of the largest magnitude, others for equality."""
    actual = actual.detach().cpu()
    if actual.shape != recorded.shape:
        return Comparison(name, 1.0, tolerance, False, f"shape {tuple(actual.shape)}, recorded {tuple(recorded.shape)}")
    if not recorded.is_floating_point():
        return compare_values(name, bool((actual == recorded).all()), True, note)
    if not recorded.numel():
        return Comparison(name, 0.0, tolerance, True, note)
    scale = recorded.double().abs().max().item() or 1.0
    error = (actual.double() - recorded.double()).abs().max().item() / scale
    return Comparison(name, error, tolerance, error <= tolerance, note)


def compare_values(name: str, actual: object, recorded: object, note: str = "") -> Comparison:
    """Compare values for equality."""
    equal = actual == recorded
    if not equal:
        note = f"{_shortened(actual)}, recorded {_shortened(recorded)}"
    return Comparison(name, 0.0 if equal else 1.0, 0.0, equal, note)


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."

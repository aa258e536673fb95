"""Which implementation the ops run, and which ops there are."""

import os

OPS = (
    "rms_norm",
    "add_rms_norm",
    "linear",
    "qk_norm_rope",
    "attention",
    "decode_attention",
    "guided_step",
    "sample",
)
"""Every op of the ``bagel_rt`` namespace of ``torch.ops``."""


CHOICES = ("auto", "reference")

_chosen: str | None = None


def choose_backend(choice: str | None) -> None:
    """Choose for this process, over the environment; None leaves it to the environment again.

    Raises:
        ValueError: not one of ``CHOICES``.
    """
    global _chosen
    if choice is not None and choice not in CHOICES:
        raise ValueError(f"backend={choice!r} is not a backend; use 'auto' or 'reference'")
    _chosen = choice


def backend() -> str:
    """Name the implementation in force: what was chosen, else the environment variable ``BAGEL_RT_BACKEND``.

    Unset or ``auto`` takes the best the device offers; ``reference`` forces the PyTorch formulas on every device,
    which tells a kernel bug from a model bug.

    Raises:
        ValueError: the variable has any other value.
    """
    choice = _chosen or os.environ.get("BAGEL_RT_BACKEND", "auto")
    if choice not in CHOICES:
        raise ValueError(f"BAGEL_RT_BACKEND={choice!r} is not a backend; use 'auto' (or unset it) or 'reference'")
    return "reference"

"""The exceptions of the public API."""


class CheckpointError(ValueError):
    """A model folder cannot be loaded. The message names the file, the problem and the remedy."""


class NonFiniteError(FloatingPointError):
    """The model computed NaN or infinity."""

    def __init__(self, output: str) -> None:
        super().__init__(
            f"{output} of the model must be finite, got NaN or infinity. Load the model with dtype bfloat16 or "
            "float32, or check its weights."
        )


class Cancelled(Exception):
    """Raise this in a ``progress`` callback to stop the request and free its KV cache slots."""

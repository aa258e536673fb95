"""The exceptions of the public API."""


class CheckpointError(ValueError):
    """A model folder cannot be loaded. The message names the file, the problem and the remedy."""


class Cancelled(Exception):
    """Raise this in a ``progress`` callback to stop the request and free its KV cache slots."""

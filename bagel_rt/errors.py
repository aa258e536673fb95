"""The exceptions of the public API."""


class CheckpointError(ValueError):
    """A model folder cannot be used; the message names the file, what is wrong in it and what to do."""


class Cancelled(Exception):
    """Raise it in a ``progress`` callback to stop a request; its KV cache slots are freed."""

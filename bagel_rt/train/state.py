"""Saved training state: one safetensors file, with JSON metadata in its header.

A single file keeps tensors and metadata consistent. It replaces the previous state atomically.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bagel_rt.errors import CheckpointError
from bagel_rt.files import atomic_write


def save_state(path: Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write tensors and JSON-safe metadata. ``path`` is replaced only after everything is written."""
    with atomic_write(path) as file:
        file.write(save(tensors, {"metadata": json.dumps(metadata)}))


def load_state(path: Path, tensors: dict[str, torch.Tensor]) -> dict:
    """Copy a saved state into ``tensors``, which define names, shapes and dtypes, and return its metadata.

    Raises:
        CheckpointError: the file is missing, is not a training state, or belongs to another model. ``tensors`` is
            unchanged then.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["metadata"])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not iterable
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a training state: {error}. Remove it to start over.") from None
    for name in sorted(stored.keys() | tensors.keys()):
        actual, expected = (_describe(group.get(name)) for group in (stored, tensors))
        if actual != expected:
            raise CheckpointError(
                f"{name} in {path} must be {expected}, got {actual}. Use the configuration that the run was started "
                "with, or another folder."
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])
    return metadata


def _describe(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"

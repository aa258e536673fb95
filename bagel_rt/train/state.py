"""The state of a run on disk: one safetensors file, with a JSON of what is no tensor in its header.

Everything is in one file, so that what is read was written together; it replaces its predecessor when it is complete.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bagel_rt.errors import CheckpointError
from bagel_rt.files import atomic_write


def save_state(path: Path, tensors: dict[str, torch.Tensor], facts: dict) -> None:
    """Write tensors and ``facts``, anything that JSON holds; ``path`` is replaced only when all is on the disk."""
    with atomic_write(path) as file:
        file.write(save(tensors, {"facts": json.dumps(facts)}))


def load_state(path: Path, tensors: dict[str, torch.Tensor]) -> dict:
    """Read a state into ``tensors``, which say names, shapes and dtypes; return the facts.

    Raises:
        CheckpointError: no such file, or of another model; nothing was read into ``tensors`` then.
    """
    try:
        with safe_open(path, "pt") as file:
            facts, stored = json.loads(file.metadata()["facts"]), {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no state of a run: {error}. Remove it to begin anew.") from None
    for name in sorted(stored.keys() | tensors.keys()):
        found, wanted = (_described(group.get(name)) for group in (stored, tensors))
        if found != wanted:
            raise CheckpointError(
                f"{path}: {name} is {found}, this model's is {wanted}. Continue with the configuration the run was "
                "begun with, or take another folder."
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])
    return facts


def _described(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"

"""A trained model as a folder in the official layout."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from bagel_rt.errors import CheckpointError
from bagel_rt.models.bagel.folder import STORED_AS, copy_tokenizer, missing_tokenizer_files, write_config
from bagel_rt.models.bagel.model import BagelModel


def save_checkpoint(model: BagelModel, folder: str | Path, tokenizer_folder: str | Path) -> None:
    """Write a model folder that ``Bagel.from_pretrained`` and the official code read.

    ``ema.safetensors`` (bfloat16), ``ae.safetensors`` (float32), the three JSON configurations, and copies of the
    tokenizer's files.

    Args:
        model: any dtype and device.
        folder: made if it is not there; files of these names in it are replaced.
        tokenizer_folder: holds the tokenizer's four files; ``generation_config.json`` is copied too if it is there.

    Raises:
        CheckpointError: a tokenizer's file is missing, or a weight is not finite; nothing was written then.
    """
    folder, tokenizer_folder = Path(folder), Path(tokenizer_folder)
    if missing := missing_tokenizer_files(tokenizer_folder):
        raise CheckpointError(
            f"{tokenizer_folder} lacks {', '.join(missing)}; give the folder of the model's tokenizer"
        )
    weights = {stem: official_tensors(model, stem) for stem in STORED_AS}
    folder.mkdir(parents=True, exist_ok=True)
    for stem, tensors in weights.items():
        save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
    write_config(folder, model.config)
    for stem in weights:  # safetensors lets nobody else read its files
        shutil.copymode(folder / "config.json", folder / f"{stem}.safetensors")
    copy_tokenizer(tokenizer_folder, folder)


def official_tensors(model: BagelModel, stem: str) -> dict[str, torch.Tensor]:
    """Official name -> tensor of a file, on the CPU in the dtype it is stored in. ``stem`` is "ema" or "ae".

    Raises:
        CheckpointError: a weight is not finite.
    """
    tensors = {}
    for name, place in model.weight_slots()[stem].items():
        repeated = place.view[(0,) * (place.view.ndim - len(place.shape))]  # the first of equal rows
        tensors[name] = repeated.detach().to("cpu", STORED_AS[stem], copy=True).contiguous()
        if not tensors[name].isfinite().all():
            raise CheckpointError(f"{name} has values that are not finite; train with a lower learning rate")
    return tensors

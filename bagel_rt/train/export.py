"""Export of a trained model in the official folder layout."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from bagel_rt.errors import CheckpointError
from bagel_rt.models.bagel.folder import STORED_AS, copy_tokenizer, missing_tokenizer_files, write_config
from bagel_rt.models.bagel.model import BagelModel


def save_checkpoint(model: BagelModel, folder: str | Path, tokenizer_folder: str | Path) -> None:
    """Write a model folder that ``Bagel.from_pretrained`` and the official code can load.

    It has ``ema.safetensors`` (bfloat16), ``ae.safetensors`` (float32), the three JSON configurations, and copies of
    the tokenizer files.

    Args:
        model: of any dtype, on any device.
        folder: created if missing; existing files of the same names are replaced.
        tokenizer_folder: has the four tokenizer files; ``generation_config.json`` is copied too if it exists.

    Raises:
        CheckpointError: a tokenizer file is missing, or a weight is not finite. Nothing is written then.
    """
    folder, tokenizer_folder = Path(folder), Path(tokenizer_folder)
    if missing := missing_tokenizer_files(tokenizer_folder):
        raise CheckpointError(
            f"{tokenizer_folder} must contain {', '.join(missing)}. Pass the folder of the model's tokenizer."
        )
    weights = {stem: official_tensors(model, stem) for stem in STORED_AS}
    folder.mkdir(parents=True, exist_ok=True)
    for stem, tensors in weights.items():
        save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
    write_config(folder, model.config)
    for stem in weights:  # safetensors creates files that only their owner can read
        shutil.copymode(folder / "config.json", folder / f"{stem}.safetensors")
    copy_tokenizer(tokenizer_folder, folder)


def official_tensors(model: BagelModel, stem: str) -> dict[str, torch.Tensor]:
    """Official name -> tensor of one file, on the CPU, in the stored dtype. ``stem`` is "ema" or "ae".

    Raises:
        CheckpointError: a weight is not finite.
    """
    tensors = {}
    for name, place in model.weight_slots()[stem].items():
        tensor = place.view[(0,) * (place.view.ndim - len(place.shape))]  # QK-norm rows are equal: take the first
        tensors[name] = tensor.detach().to("cpu", STORED_AS[stem], copy=True).contiguous()
        if not tensors[name].isfinite().all():
            raise CheckpointError(f"{name} must be finite, got NaN or infinity. Train with a lower learning rate.")
    return tensors

"""A trained model as a folder in the official layout."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from bagel_rt.errors import CheckpointError
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.random_checkpoint import STORED_AS, TOKENIZER_FILES, official_json


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
    files = [name for name in TOKENIZER_FILES if (tokenizer_folder / name).is_file()]
    missing = sorted(set(TOKENIZER_FILES) - {"generation_config.json", *files})
    if missing:
        raise CheckpointError(
            f"{tokenizer_folder} lacks {', '.join(missing)}; give the folder of the model's tokenizer"
        )
    weights = {stem: official_tensors(model, stem) for stem in STORED_AS}
    folder.mkdir(parents=True, exist_ok=True)
    for stem, tensors in weights.items():
        save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
    for name, content in official_json(model.config).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for stem in weights:  # safetensors lets nobody else read its files
        shutil.copymode(folder / "config.json", folder / f"{stem}.safetensors")
    for name in files:
        if folder.resolve() != tokenizer_folder.resolve():
            shutil.copyfile(tokenizer_folder / name, folder / name)


def official_tensors(model: BagelModel, stem: str) -> dict[str, torch.Tensor]:
    """Official name -> tensor of a file, on the CPU in the dtype it is stored in. ``stem`` is "ema" or "ae".

    Raises:
        CheckpointError: a weight is not finite.
    """
    tensors = {}
    for name, place in model.destinations()[stem].items():
        repeated = place.view[(0,) * (place.view.ndim - len(place.shape))]  # the first of equal rows
        tensors[name] = repeated.detach().to("cpu", STORED_AS[stem], copy=True).contiguous()
        if not tensors[name].isfinite().all():
            raise CheckpointError(f"{name} has values that are not finite; train with a lower learning rate")
    return tensors

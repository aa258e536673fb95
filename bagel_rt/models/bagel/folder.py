"""Write the files of an official model folder other than the weights: three JSON configurations and the tokenizer."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from bagel_rt.models.bagel.config import BagelConfig, TransformerConfig, VAEConfig, ViTConfig

STORED_AS = {"ema": torch.bfloat16, "ae": torch.float32}
"""Dtype of the published weights, by file stem."""

_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
_GENERATION_FILE = "generation_config.json"
_VAE_RESOLUTION = 256  # required but not used by the official autoencoder


def missing_tokenizer_files(folder: Path) -> list[str]:
    """Names of the tokenizer files that are not in the folder."""
    return sorted(name for name in _TOKENIZER_FILES if not (folder / name).is_file())


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files, and ``generation_config.json`` if there is one. No-op if both folders are the same."""
    if source.resolve() == folder.resolve():
        return
    for name in (*_TOKENIZER_FILES, _GENERATION_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_config(folder: Path, config: BagelConfig) -> None:
    """Write the JSON files of :func:`official_json`."""
    for name, content in official_json(config).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def official_json(config: BagelConfig) -> dict[str, dict[str, Any]]:
    """The contents of the official JSON files, by file name; :meth:`BagelConfig.from_folder` reads them back."""
    llm, vit, vae = (_by_official_keys(part) for part in (config.llm, config.vit, config.vae))
    llm |= {"model_type": "qwen2", "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    sides = {"vit_max_num_patch_per_side": vit.pop("vit_max_num_patch_per_side")}
    vit["num_hidden_layers"] += 1  # the official loader drops the last layer
    # The official vision tower derives the size of its position table from image_size.
    image_size = config.vit.patch_size * config.vit.max_patches_per_side
    vit |= {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "image_size": image_size}
    rules = {"vae": config.vae_transform, "vit": config.vit_transform}
    main = {
        "architectures": ["BagelForConditionalGeneration"],
        "model_type": "bagel",
        "torch_dtype": "bfloat16",
        "connector_act": "gelu_pytorch_tanh",
        **_by_official_keys(config),
        **sides,
        "llm_config": llm,
        "vit_config": vit,
        "vae_config": vae | {"downsample": config.vae.downsample, "resolution": _VAE_RESOLUTION},
        "image_transforms": {name: [rule.max_size, rule.min_size, rule.stride] for name, rule in rules.items()},
    }
    return {"config.json": main, "llm_config.json": llm, "vit_config.json": vit}


def _by_official_keys(config: BagelConfig | TransformerConfig | ViTConfig | VAEConfig) -> dict[str, Any]:
    """The fields of a configuration that its JSON file stores, by JSON key."""
    return {item.metadata.get("key", item.name): getattr(config, item.name) for item in fields(config) if item.metadata}

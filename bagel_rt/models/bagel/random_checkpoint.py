"""Models of random weights: real shapes for benchmarks and tests where the published 29 GB are not at hand.

Every tensor is a function of the seed, its official name and its shape alone, drawn on the CPU whatever the model's
device. :func:`make_random_checkpoint` writes them as an official model folder; :func:`randomize_` puts the same values
straight into a model. Scales keep activations finite: norm weights near 1, small biases, other weights of standard
deviation 1 / sqrt(fan-in), the true sin-cos tables.

One core draws about 100 million numbers a second, and all cores share the large tensors. BAGEL-7B-MoT has 14.7 billion
parameters: two and a half minutes of one core.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save
from tqdm import tqdm

from bagel_rt.checkpoint import DEFAULT_MODEL
from bagel_rt.checkpoint.write import save_sharded
from bagel_rt.models.bagel.config import BAGEL_7B_MOT, BagelConfig
from bagel_rt.models.bagel.embed import sincos_table
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.tokenizer import Tokenizer

STORED_AS = {"ema": torch.bfloat16, "ae": torch.float32}  # file stem -> dtype, as published
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
_CHUNK = 1 << 22  # numbers drawn from one generator; part of what a seed means
_MARGIN = 64 << 20  # bytes of disk beside the weights


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """One weight of a random model, on the CPU.

    Args:
        name: the official tensor name; it decides the distribution (see the module's docstring).
        shape: of the official file.
        dtype: the values are rounded to; bfloat16 in ``ema.safetensors``, float32 in ``ae.safetensors``.
        seed: of the whole model.
    """
    if name.endswith("pos_embed"):
        return sincos_table(shape[1], math.isqrt(shape[0])).to(dtype)
    if name.endswith(".bias"):
        mean, deviation = 0.0, 0.02
    elif len(shape) == 1:  # of a norm
        mean, deviation = 1.0, 0.1
    else:
        mean, deviation = 0.0, math.prod(shape[1:]) ** -0.5
    tensor = torch.empty(shape, dtype=dtype)

    @torch.inference_mode()
    def draw(index: int, chunk: torch.Tensor) -> None:
        digest = hashlib.blake2b(f"{seed} {name} {index}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        chunk.copy_(torch.empty(len(chunk)).normal_(mean, deviation, generator=generator))

    chunks = tensor.view(-1).split(_CHUNK)
    with ThreadPoolExecutor(min(len(chunks), os.cpu_count() or 1)) as pool:
        list(pool.map(draw, range(len(chunks)), chunks))
    return tensor


@torch.inference_mode()
def randomize_(model: BagelModel, seed: int = 0) -> None:
    """Fill a model, on any device and in any dtype, with the weights of the random checkpoint of this seed."""
    for stem, places in model.destinations().items():
        for name, place in places.items():
            place.view.copy_(random_tensor(name, place.shape, STORED_AS[stem], seed))


def make_random_checkpoint(
    folder: str | Path,
    config: BagelConfig = BAGEL_7B_MOT,
    seed: int = 0,
    shard_bytes: int = 4 << 30,
    progress: bool = False,
    tokenizer: str | Path = DEFAULT_MODEL,
) -> int:
    """Write an official model folder of random weights; nothing is left of it if that fails or is interrupted.

    ``ema`` is sharded, with an index, in bfloat16; ``ae.safetensors`` is float32.

    Args:
        folder: does not exist yet, or is empty.
        config: the shapes.
        seed: of the weights.
        shard_bytes: most bytes of tensors in a shard; a larger tensor gets a shard of its own.
        progress: show a bar on stderr.
        tokenizer: folder of the tokenizer that is copied. That of the small model that the package carries gives a
            meaning to a few hundred of the vocabulary's ids.

    Returns:
        Bytes of weights written.

    Raises:
        ValueError: the folder is taken, the disk too small, or the configuration not expressible in the official files.
    """
    if config.llm.hidden_size % 4:
        raise ValueError(f"hidden_size is {config.llm.hidden_size}; allowed: a multiple of 4, for the sin-cos tables")
    folder = Path(folder)
    places = BagelModel.allocate(config, (0, 0), "meta", torch.bfloat16).destinations()
    shapes = {stem: {name: place.shape for name, place in named.items()} for stem, named in places.items()}
    total = sum(
        math.prod(shape) * STORED_AS[stem].itemsize for stem, named in shapes.items() for shape in named.values()
    )
    tokenizer = Path(tokenizer)
    known = len(Tokenizer.from_folder(tokenizer))
    if config.llm.vocab_size < known:
        raise ValueError(
            f"vocab_size is {config.llm.vocab_size}: the tokenizer in {tokenizer.name} needs {known} or more"
        )
    with _filling(folder, total):
        _write_configuration(folder, config)
        for name in TOKENIZER_FILES:
            if (tokenizer / name).exists():
                shutil.copyfile(tokenizer / name, folder / name)
        with tqdm(total=total, unit="B", unit_scale=True, desc="random weights", disable=not progress) as bar:

            def tensor(stem: str, name: str) -> torch.Tensor:
                drawn = random_tensor(name, shapes[stem][name], STORED_AS[stem], seed)
                bar.update(drawn.nbytes)
                return drawn

            save_sharded(
                folder,
                "ema",
                [
                    (name, lambda name=name: tensor("ema", name), shape, STORED_AS["ema"])
                    for name, shape in shapes["ema"].items()
                ],
                shard_bytes,
            )
            (folder / "ae.safetensors").write_bytes(save({name: tensor("ae", name) for name in shapes["ae"]}))
    return total


def official_json(config: BagelConfig) -> dict[str, dict]:
    """The official JSON files that :meth:`BagelConfig.from_folder` reads this configuration from, by file name."""
    llm, vit, vae = (_by_official_keys(part) for part in (config.llm, config.vit, config.vae))
    llm |= {"model_type": "qwen2", "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    sides = {"vit_max_num_patch_per_side": vit.pop("vit_max_num_patch_per_side")}
    vit["num_hidden_layers"] += 1  # official loaders subtract one
    vit |= {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"}
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
        "vae_config": vae | {"downsample": config.vae.downsample},
        "image_transforms": {name: [rule.max_size, rule.min_size, rule.stride] for name, rule in rules.items()},
    }
    return {"config.json": main, "llm_config.json": llm, "vit_config.json": vit}


def _by_official_keys(config) -> dict:
    """The fields of a configuration that its JSON file states, under that file's keys."""
    return {item.metadata["key"] or item.name: getattr(config, item.name) for item in fields(config) if item.metadata}


def _write_configuration(folder: Path, config: BagelConfig) -> None:
    for name, content in official_json(config).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    read = BagelConfig.from_folder(folder)
    if read != config:
        raise ValueError(f"the official files cannot express this configuration: {config} would be read as {read}")


@contextmanager
def _filling(folder: Path, size: int) -> Iterator[None]:
    """Make ``folder``, or take it if it is empty; if the work inside fails, leave it as it was.

    Raises:
        ValueError: it is taken, or its disk has no room for ``size`` bytes.
    """
    existed = folder.exists()
    if existed and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: name a new one")
    parent = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(parent).free
    if free < size + _MARGIN:
        raise ValueError(f"{folder}: {size / 1e9:.1f} GB would be written, but the disk has {free / 1e9:.1f} GB free")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:  # Ctrl-C too
        for file in folder.iterdir():
            file.unlink()
        if not existed:
            folder.rmdir()
        raise

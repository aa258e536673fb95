"""Models of random weights: real shapes for benchmarks and tests where the published 29 GB are not at hand.

Every tensor is a function of the seed, its official name and its shape alone, drawn on the CPU whatever the model's
device. :func:`make_random_checkpoint` writes them as an official model folder; :func:`randomize_` puts the same values
straight into a model. Scales keep activations finite: norm weights near 1, small biases, other weights of standard
deviation 1 / sqrt(fan-in), the true sin-cos tables.

One core draws about 100 million numbers a second, and all cores share the large tensors. BAGEL-7B-MoT has 14.7 billion
parameters: two and a half minutes of one core.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save
from tqdm import tqdm

from bagel_rt.checkpoint import DEFAULT_MODEL
from bagel_rt.checkpoint.write import save_sharded
from bagel_rt.models.bagel.config import BAGEL_7B_MOT, BagelConfig
from bagel_rt.models.bagel.embed import sincos_table
from bagel_rt.models.bagel.folder import STORED_AS, copy_tokenizer, write_config
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.tokenizer import Tokenizer

_CHUNK = 1 << 22  # numbers drawn from one generator; part of what a seed means
_MARGIN = 64 << 20  # bytes of disk beside the weights


def random_weight(name: str, shape: tuple[int, ...], normal: Callable[[float, float], torch.Tensor]) -> torch.Tensor:
    """The weight of this official name; ``normal(mean, deviation)`` draws a tensor of ``shape``."""
    if name.endswith("pos_embed"):
        return sincos_table(shape[1], math.isqrt(shape[0]))
    if name.endswith(".bias"):
        return normal(0.0, 0.02)
    if len(shape) == 1:  # of a norm
        return normal(1.0, 0.1)
    return normal(0.0, math.prod(shape[1:]) ** -0.5)


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """One weight of a random model, on the CPU.

    Args:
        name: the official tensor name; it decides the distribution (see the module's docstring).
        shape: of the official file.
        dtype: the values are rounded to; bfloat16 in ``ema.safetensors``, float32 in ``ae.safetensors``.
        seed: of the whole model.
    """

    def normal(mean: float, deviation: float) -> torch.Tensor:
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

    return random_weight(name, shape, normal).to(dtype)


@torch.inference_mode()
def randomize_(model: BagelModel, seed: int = 0) -> None:
    """Fill a model, on any device and in any dtype, with the weights of the random checkpoint of this seed."""
    for stem, places in model.weight_slots().items():
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
    places = BagelModel.allocate(config, (0, 0), "meta", torch.bfloat16).weight_slots()
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
        write_config(folder, config)
        read = BagelConfig.from_folder(folder)
        if read != config:
            raise ValueError(f"the official files cannot express this configuration: {config} would be read as {read}")
        copy_tokenizer(tokenizer, folder)
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

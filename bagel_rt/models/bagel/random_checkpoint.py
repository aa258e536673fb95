"""Models with random weights, for benchmarks and tests without the published 29 GB.

Every tensor depends on the seed, its official name and its shape only, and is drawn on the CPU for any device of the
model. :func:`make_random_checkpoint` writes an official model folder; :func:`randomize_` fills a model with the same
values. The scales keep activations finite: norm weights near 1, small biases, other weights with standard deviation
1 / sqrt(fan-in), and the sine-cosine position tables of the published model.

One core draws about 100 million numbers per second; large tensors use all cores. The 14.7 billion parameters of
BAGEL-7B-MoT take two and a half minutes on one core.
"""

import functools
import hashlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save
from tqdm import tqdm

from bagel_rt.checkpoint import DEFAULT_MODEL
from bagel_rt.checkpoint.write import save_weights
from bagel_rt.models.bagel.config import BAGEL_7B_MOT, BagelConfig
from bagel_rt.models.bagel.embed import sincos_table
from bagel_rt.models.bagel.folder import STORED_AS, copy_tokenizer, write_config
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.validation import invalid

_CHUNK = 1 << 22  # numbers per generator; changing it changes the weights of every seed
_DISK_MARGIN = 64 << 20  # bytes for files other than weights
_LINE_SECONDS = 5  # between two lines of progress


def random_weight(name: str, shape: tuple[int, ...], normal: Callable[[float, float], torch.Tensor]) -> torch.Tensor:
    """Draw the weight with this official name; ``normal(mean, deviation)`` draws a tensor of ``shape``."""
    if name.endswith("pos_embed"):
        return sincos_table(shape[1], math.isqrt(shape[0]))
    if name.endswith(".bias"):
        return normal(0.0, 0.02)
    if len(shape) == 1:  # a norm
        return normal(1.0, 0.1)
    return normal(0.0, math.prod(shape[1:]) ** -0.5)


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Draw one weight of a random model, on the CPU.

    Args:
        name: the official tensor name, which determines the distribution.
        shape: the shape in the official file.
        dtype: bfloat16 in ``ema.safetensors``, float32 in ``ae.safetensors``.
        seed: of the model.
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
    """Fill a model, on any device and in any dtype, with the weights of the random checkpoint with this seed."""
    for stem, slots in model.weight_slots().items():
        for name, slot in slots.items():
            slot.view.copy_(random_tensor(name, slot.shape, STORED_AS[stem], seed))


def make_random_checkpoint(
    folder: str | Path,
    config: BagelConfig = BAGEL_7B_MOT,
    seed: int = 0,
    shard_bytes: int | None = None,
    progress: bool = False,
    tokenizer: str | Path = DEFAULT_MODEL,
) -> int:
    """Write an official model folder with random weights. If it fails or is interrupted, all its files are deleted.

    ``ema`` is bfloat16; ``ae.safetensors`` is float32.

    Args:
        folder: must not exist, or be empty.
        config: the shapes.
        seed: of the weights.
        shard_bytes: maximum tensor bytes per shard of ``ema``. Default: one file, which the official code needs.
        progress: show a progress bar on stderr, or lines if it is not a terminal.
        tokenizer: folder of the tokenizer to copy. The default, of the embedded model, has a few hundred tokens.

    Returns:
        Bytes of weights written.

    Raises:
        ValueError: the folder is not empty, the disk is too small, or the official files cannot express the
            configuration.
    """
    if config.llm.hidden_size % 4:
        raise invalid("hidden_size", config.llm.hidden_size, "a multiple of 4, because of the sine-cosine tables")
    folder = Path(folder)
    slots = BagelModel.allocate(config, (0, 0), "meta", torch.bfloat16).weight_slots()
    shapes = {stem: {name: slot.shape for name, slot in named.items()} for stem, named in slots.items()}
    total = sum(
        math.prod(shape) * STORED_AS[stem].itemsize for stem, named in shapes.items() for shape in named.values()
    )
    tokenizer = Path(tokenizer)
    tokens = len(Tokenizer.from_folder(tokenizer))
    if config.llm.vocab_size < tokens:
        allowed = f"at least {tokens}, the number of tokens of the tokenizer in {tokenizer.name}"
        raise invalid("vocab_size", config.llm.vocab_size, allowed)
    with _new_folder(folder, total):
        write_config(folder, config)
        read = BagelConfig.from_folder(folder)
        if read != config:
            raise ValueError(f"the official files cannot express this configuration: {config} would be read as {read}.")
        copy_tokenizer(tokenizer, folder)
        with _progress(total, progress) as advance:

            def tensor(stem: str, name: str) -> torch.Tensor:
                drawn = random_tensor(name, shapes[stem][name], STORED_AS[stem], seed)
                advance(drawn.nbytes)
                return drawn

            save_weights(
                folder,
                "ema",
                [
                    (name, functools.partial(tensor, "ema", name), shape, STORED_AS["ema"])
                    for name, shape in shapes["ema"].items()
                ],
                shard_bytes,
            )
            (folder / "ae.safetensors").write_bytes(save({name: tensor("ae", name) for name in shapes["ae"]}))
    return total


@contextmanager
def _progress(total: int, enabled: bool) -> Iterator[Callable[[int], object]]:
    """Yield a function that takes the bytes written since its last call and shows the progress towards ``total``."""
    if not enabled:
        yield lambda count: None
        return
    if sys.stderr.isatty():
        with tqdm(total=total, unit="B", unit_scale=True, desc="random weights") as bar:
            yield bar.update
        return
    done, last = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        if done == total or time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            print(f"random weights: {done * 100 // total}% of {total / 1e9:.1f} GB", file=sys.stderr, flush=True)

    yield advance


@contextmanager
def _new_folder(folder: Path, size: int) -> Iterator[None]:
    """Create ``folder`` or use an empty one; if the block fails, delete the files in it, and the folder if it is new.

    Raises:
        ValueError: the folder is not empty, or its disk has less than ``size`` bytes free.
    """
    existed = folder.exists()
    if existed and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} must be a new or empty folder. Choose another one.")
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < size + _DISK_MARGIN:
        raise ValueError(
            f"the disk of {folder} must have {(size + _DISK_MARGIN) / 1e9:.1f} GB free, got {free / 1e9:.1f} GB. "
            "Free some space, or write to another disk."
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:  # includes KeyboardInterrupt
        for file in folder.iterdir():
            file.unlink()
        if not existed:
            folder.rmdir()
        raise

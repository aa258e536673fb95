"""Collect versions, devices, the extension, the ops' backends, the environment and a checkpoint's sizes.

A missing package, GPU or extension is an entry of the report, not an error.
"""

import math
import os
import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bagel_rt import __version__
from bagel_rt.checkpoint.find import find_weights
from bagel_rt.checkpoint.read import check_weights
from bagel_rt.errors import CheckpointError
from bagel_rt.kernels.extension import EXTENSION, EXTENSION_ERROR, cuda_error
from bagel_rt.models.bagel.config import BagelConfig

_PACKAGES = ("triton", "numpy", "safetensors", "tokenizers", "pillow", "tqdm", "typer")


def collect(model: Path | None = None) -> dict:
    """Collect the report as JSON-safe values.

    Args:
        model: checkpoint folder to describe; only its JSON files and the weights' headers are read.

    Raises:
        CheckpointError: the model folder's configuration cannot be read.
    """
    report = {
        "versions": versions(),
        "devices": devices(),
        "extension": "compiled" if EXTENSION else f"absent: {EXTENSION_ERROR.strip()}",
        "cuda_kernels": cuda_kernels(),
        "ops": ops(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("BAGEL_RT_")},
    }
    return report if model is None else report | {"model": checkpoint(model)}


def versions() -> dict[str, str]:
    """Versions of this package, Python and the dependencies that may affect results."""
    # torch's own version states the CUDA version it was built for, such as +cu132; that of its package does not.
    installed = {"bagel_rt": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def devices() -> list[dict]:
    """Describe the CPU, then every CUDA device: name, compute capability, memory in GiB."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    entries = [
        {
            "device": "cpu",
            "name": _processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "memory_gib": _gib(pages),
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        entries.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_gib": _gib(properties.total_memory),
            }
        )
    return entries


def cuda_kernels() -> str:
    """Status of the extension's CUDA kernels: "compiled", or why they are not built or do not run here."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    error = cuda_error(device)
    return f"absent: {error}" if error else "compiled"


def ops() -> dict[str, str]:
    """Op -> implementation on the default device: "cuda", "triton" or "reference"; {"none": error} if none can run."""
    try:
        from bagel_rt.kernels.registry import OPS, implementation  # here: imports optional packages

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return {op: implementation(op, device) for op in OPS}
    except (ImportError, ValueError) as error:
        return {"none": str(error)}


def checkpoint(folder: Path) -> dict:
    """A checkpoint's name, sizes and parameter counts, and whether its weights match its configuration."""
    from bagel_rt.models.bagel.model import IGNORED_TENSORS, BagelModel  # here: as above

    config = BagelConfig.from_folder(folder)
    weight_slots = BagelModel.allocate(config, (0, 0), "meta", torch.bfloat16).weight_slots()
    counts: Counter[str] = Counter()
    for stem, slots in weight_slots.items():
        for name, slot in slots.items():
            counts[_part(stem, name)] += math.prod(slot.shape)
    try:
        for stem, slots in weight_slots.items():
            check_weights(find_weights(folder, stem), slots, IGNORED_TENSORS)
        weights = "complete"
    except CheckpointError as error:
        weights = str(error)
    llm, vit = config.llm, config.vit
    return {
        "name": folder.resolve().name,
        "layers": llm.num_layers,
        "hidden_size": llm.hidden_size,
        "heads": llm.num_heads,
        "kv_heads": llm.num_kv_heads,
        "vocabulary": llm.vocab_size,
        "vision_layers": vit.num_layers,
        "largest_image": config.max_latent_size * config.latent_stride,
        "parameters": {**dict(sorted(counts.items())), "total": counts.total()},
        "bf16_gib": _gib(2 * counts.total()),
        "weights": weights,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _part(stem: str, name: str) -> str:
    if stem == "ae":
        return "autoencoder"
    if name.startswith("vit_model."):
        return "vision tower"
    if name.startswith("language_model."):
        return "generation expert" if "_moe_gen" in name else "understanding expert"
    return "embeddings"


def _gib(size: int) -> float:
    return round(size / 2**30, 2)

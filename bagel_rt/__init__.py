"""bagel_rt: a custom-kernel runtime for BAGEL, the unified text and image transformer."""

from importlib import import_module
from pathlib import Path

# A checkout that was never installed keeps the kernels beside this folder, not inside it.
if not (Path(__path__[0]) / "kernels").is_dir():
    __path__.append(str(Path(__path__[0]).parent))

__version__ = "0.1.0"

# Imported when first asked for, so that `bagel-rt --help` does not wait for torch.
_HOMES = {
    "Bagel": "pipeline",
    "Cancelled": "errors",
    "CheckpointError": "errors",
    "ImageResult": "request",
    "Progress": "request",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"bagel_rt.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'bagel_rt' has no attribute {name!r}")

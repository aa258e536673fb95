"""bagel_rt: a custom-kernel runtime for BAGEL, the unified text and image transformer."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

# In a checkout that is not installed, the kernels are in a folder beside this one.
if not (Path(__path__[0]) / "kernels").is_dir():
    __path__.append(str(Path(__path__[0]).parent))

__version__ = "0.2.0"

if TYPE_CHECKING:
    from bagel_rt.errors import Cancelled, CheckpointError
    from bagel_rt.pipeline import Bagel
    from bagel_rt.request import ImageResult, Progress

__all__ = ["Bagel", "Cancelled", "CheckpointError", "ImageResult", "Progress", "__version__"]

# Imported on first access, to keep `bagel-rt --help` from importing torch.
_LAZY_EXPORTS = {  # name: module
    "Bagel": "pipeline",
    "Cancelled": "errors",
    "CheckpointError": "errors",
    "ImageResult": "request",
    "NonFiniteError": "errors",
    "Progress": "request",
}

if not TYPE_CHECKING:  # for which every name would exist

    def __getattr__(name: str) -> object:
        if name in _LAZY_EXPORTS:
            return getattr(import_module(f"bagel_rt.{_LAZY_EXPORTS[name]}"), name)
        raise AttributeError(f"module 'bagel_rt' has no attribute {name!r}")

"""Shared CLI options, and the functions that check and convert their values.

Values are checked before a model is loaded. An invalid value raises ValueError.
"""

import os
import secrets
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bagel_rt.checkpoint import DEFAULT_MODEL
from bagel_rt.cli.parsing import OptionGroup
from bagel_rt.files import partial_path
from bagel_rt.models.bagel.settings import check_seed, resolve_settings
from bagel_rt.validation import integer

if TYPE_CHECKING:  # imported inside the functions, to keep ``bagel-rt --help`` fast
    import torch
    from PIL import Image

    from bagel_rt.pipeline import Bagel

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def writable_file(path: Path) -> Path:
    """Return the path if a file can be written there, else raise typer.BadParameter."""
    try:
        if path.is_dir():
            raise typer.BadParameter(f"{path} is a folder. Give the name of a file in it.")
        partial_path(path).touch()
        partial_path(path).unlink()
    except OSError as error:
        raise typer.BadParameter(f"{path}: cannot write a file there ({error.strerror})") from None
    return path


def writable_png(path: Path) -> Path:
    """Return the path if a PNG can be written there, else raise typer.BadParameter."""
    if path.suffix.lower() != ".png":
        raise typer.BadParameter(f"{path}: images are written as PNG. Give a name that ends in .png.")
    return writable_file(path)


def _output(help: str) -> Any:
    return typer.Option("--output", "-o", metavar="FILE.png", callback=writable_png, help=help)


Output = Annotated[Path, _output("Where to write the image. An existing file is replaced.")]
Outputs = Annotated[
    Path, _output("Where to write the image; several images: FILE-1.png, FILE-2.png, ... Existing files are replaced.")
]
Numbered = Annotated[Path, _output("Images are written to FILE-1.png, FILE-2.png, ... Existing files are replaced.")]
MoreImages = Annotated[list[Path] | None, typer.Option("--image", metavar="FILE", help="Another image. Repeatable.")]
Seed = Annotated[int | None, typer.Option(show_default="random", help="The same seed repeats a result on one machine.")]
Think = Annotated[bool, typer.Option(help="Let the model write its reasoning first.")]
Negative = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Prompt that text guidance moves away from; default: no prompt.")
]
Side = Annotated[int | None, typer.Option(metavar="PIXELS", show_default="the model's largest square")]

Port = Annotated[int, typer.Option(help="Port to listen on; 0 selects a free one."), integer(0, 65535)]

Model = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        envvar="BAGEL_RT_MODEL",
        show_default="the embedded model",
        help="Official checkpoint folder.",
        rich_help_panel="Model",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", show_default="cuda if there is one", help="cpu, cuda or cuda:N.", rich_help_panel="Model"
    ),
]
DTypeName = Literal["float32", "bfloat16", "float16"]
DType = Annotated[
    DTypeName | None,
    typer.Option(
        show_default="float32 on the CPU, else bfloat16", help="Data type of the weights.", rich_help_panel="Model"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.", rich_help_panel="Report")]
Progress = Annotated[
    bool | None,
    typer.Option(
        "--progress/--no-progress",
        show_default="if stderr is a terminal",
        help="Progress bars on stderr.",
        rich_help_panel="Report",
    ),
]


@dataclass(frozen=True)
class ModelOptions(OptionGroup):
    """The model to load, its device and its dtype."""

    model: Model = None
    device: Device = None
    dtype: DType = None

    @property
    def folder(self) -> Path:
        return self.model or DEFAULT_MODEL

    def load(self, progress: bool = False) -> "Bagel":
        """Load the model and return a :class:`bagel_rt.Bagel`."""
        from bagel_rt.pipeline import Bagel

        return Bagel.from_pretrained(self.folder, read_device(self.device), read_dtype(self.dtype), progress=progress)


@dataclass(frozen=True)
class RunOptions(ModelOptions):
    """The model, and how to report progress and results."""

    as_json: Json = False
    progress: Progress = None


@dataclass(frozen=True)
class RequestOptions(RunOptions):
    """Options of the model and of reporting, and those that every request has."""

    seed: Seed = None
    think: Think = False

    def request(self, task: str, settings: OptionGroup) -> dict[str, Any]:
        """Check the options and return them as keyword arguments of a request.

        Without a seed, a random one is drawn here, so that it can be reported.
        """
        resolve_settings(task, vars(settings))
        check_seed(self.seed)
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        return {"seed": seed, "think": self.think} | vars(settings)


def shows_progress(progress: bool | None) -> bool:
    """Whether to show progress bars; by default only on a terminal."""
    return sys.stderr.isatty() if progress is None else progress


def read_size(model: Path, width: int | None, height: int | None) -> tuple[int, int] | None:
    """Return (height, width), or None if both are missing.

    A single missing side defaults to the side of the model's largest square.
    """
    from bagel_rt.models.bagel.config import BagelConfig

    if width is None and height is None:
        return None
    config = BagelConfig.from_folder(model)
    height, width = (config.default_resolution if side is None else side for side in (height, width))
    config.check_size(height, width)
    return height, width


def check_address(host: str, port: int) -> None:
    """Raise ValueError if the address cannot be bound. Call it before loading a model, which may take minutes."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ValueError(f"cannot bind {host}, port {port}: {error.strerror or error}") from None


def read_device(name: str | None) -> "torch.device | None":
    """Return the torch device, or None for the default. Raise ValueError if the device does not exist."""
    import torch

    if name is None:
        return None
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not index.isdecimal())):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name} is not available: PyTorch finds {torch.cuda.device_count()} CUDA devices.")
    return torch.device(name)


def read_dtype(name: str | None) -> "torch.dtype | None":
    """The torch dtype; None for the default."""
    import torch

    return getattr(torch, name) if name else None


def read_images(paths: Sequence[Path | str]) -> "list[Image.Image]":
    """Open the images."""
    from bagel_rt.models.bagel.images import open_image

    return [open_image(path) for path in paths]


def read_part(part: str) -> "str | Image.Image":
    """Read a part of ``interleave``'s input: a text, or the image in a file."""
    kind, _, rest = part.partition(":")
    if kind == "text":
        return rest
    if kind == "image":
        return read_images([rest])[0]
    if os.path.isfile(part):
        return read_images([part])[0]
    if part.lower().endswith(_IMAGE_SUFFIXES) and not any(map(str.isspace, part)):
        raise ValueError(f"{part}: no such file. For a text, write text:{part}")
    return part

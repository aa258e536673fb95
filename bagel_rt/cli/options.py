"""Shared CLI options, and the functions that check and convert their values.

Values are checked before a model is loaded. An invalid value raises ValueError.
"""

import os
import secrets
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bagel_rt.checkpoint import DEFAULT_MODEL
from bagel_rt.cli.parsing import OptionGroup
from bagel_rt.models.bagel.settings import check_seed, resolve_settings
from bagel_rt.tiny.world import prompt_hint
from bagel_rt.validation import integer, parse_size

if TYPE_CHECKING:  # imported inside the functions, to keep ``bagel-rt --help`` fast
    from bagel_rt.pipeline import Bagel

MoreImages = Annotated[
    list[Path] | None, typer.Option("--image", metavar="FILE", help="Another image; - is stdin. Repeatable.")
]
Seed = Annotated[int | None, typer.Option(show_default="random", help="The same seed repeats a result on one machine.")]
Think = Annotated[bool, typer.Option(help="Let the model write its reasoning first.")]
Negative = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Prompt that text guidance moves away from; default: no prompt.")
]

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
DTypeName = Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]
DType = Annotated[
    DTypeName | None,
    typer.Option(
        show_default="float32 on the CPU, else bfloat16", help="Data type of the weights.", rich_help_panel="Model"
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        show_default="ema, else model",
        help="Weight file of the checkpoint, or its stem, if there are several.",
        rich_help_panel="Model",
    ),
]
Graphs = Annotated[
    bool,
    typer.Option(
        help="On a GPU, capture steps as CUDA graphs; --no-graphs needs less memory and is slower.",
        rich_help_panel="Model",
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
    weights: Weights = None
    graphs: Graphs = True

    @property
    def folder(self) -> Path:
        return self.model or DEFAULT_MODEL

    def show_hint(self, prompts: Iterable[str]) -> None:
        """With the embedded model, print a hint on stderr if a prompt is about anything but colored shapes."""
        if self.folder.resolve() == DEFAULT_MODEL.resolve() and (hint := prompt_hint(prompts)):
            typer.echo(f"bagel-rt: hint: {hint} For other prompts, use --model with a downloaded checkpoint.", err=True)

    def check(self) -> None:
        """Raise ValueError for what is found without loading the weights."""
        from bagel_rt.models.bagel.config import BagelConfig
        from bagel_rt.models.bagel.workload import resolve_dtype
        from bagel_rt.pipeline import resolve_device

        resolve_device(self.device)
        if self.dtype is not None:
            resolve_dtype(self.dtype)
        BagelConfig.from_folder(self.folder)

    def load(self, progress: bool = False) -> "Bagel":
        """Load the model and return a :class:`bagel_rt.Bagel`."""
        from bagel_rt.pipeline import Bagel

        return Bagel.from_pretrained(
            self.folder,
            self.device,
            self.dtype,
            graphs=self.graphs,
            progress=progress,
            weights=self.weights,
        )


_Side = Annotated[
    int | None, typer.Option(metavar="PIXELS", show_default="the model's default", help="One side, instead of --size.")
]


@dataclass(frozen=True)
class SizeOptions(OptionGroup):
    """The size of the images to generate."""

    size: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHxHEIGHT", show_default="the model's default", help="Size of the image, such as 1024x768."
        ),
    ] = None
    width: _Side = None
    height: _Side = None

    def resolve(self, model: Path) -> tuple[int, int] | None:
        """Return (height, width) for the model in this folder, or None if no side is given.

        A single missing side is the model's default resolution.
        """
        from bagel_rt.models.bagel.config import BagelConfig

        height, width = self.height, self.width
        if self.size is not None:
            if width is not None or height is not None:
                raise ValueError("--size must be left out with --width or --height. Give either.")
            height, width = read_size("--size", self.size)
        elif width is None and height is None:
            return None
        config = BagelConfig.from_folder(model)
        height, width = (config.default_resolution if side is None else side for side in (height, width))
        config.check_size(height, width)
        return height, width


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


def read_size(option: str, text: str) -> tuple[int, int]:
    """Parse WIDTHxHEIGHT and return (height, width); the error names ``option``."""
    return parse_size(option, text.lower())


def check_address(host: str, port: int) -> None:
    """Raise ValueError if the address cannot be bound. Call it before loading a model, which may take minutes."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ValueError(f"cannot bind {host}, port {port}: {reason}. Choose another --host or --port.") from None

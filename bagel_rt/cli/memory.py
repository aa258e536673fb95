"""``bagel-rt memory``: the GPU memory that a request needs, computed without loading the model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bagel_rt.cli import options as cli_options
from bagel_rt.cli.parsing import OptionGroup, image_settings, name_options, option_flags, with_options
from bagel_rt.validation import number

if TYPE_CHECKING:  # imported inside the command only, to keep ``bagel-rt --help`` fast
    from bagel_rt.models.bagel.memory import MemoryEstimate
    from bagel_rt.models.bagel.workload import Workload

_Size = Annotated[
    str | None,
    typer.Option(
        metavar="WIDTHxHEIGHT", show_default="the model's largest square", help="Size of the generated images."
    ),
]
_Images = Annotated[
    list[str] | None,
    typer.Option(
        "--image",
        metavar="WIDTHxHEIGHT",
        show_default="an edit: one of --size",
        help="Size of an input image. Repeatable.",
    ),
]
_Available = Annotated[
    float | None,
    typer.Option(metavar="GB", show_default="the GPU's, if there is one", help="GPU memory, in 10**9 bytes."),
    number(0, 1e6),
]


@with_options(scales=image_settings("cfg_text_scale", "cfg_img_scale"))
def memory(
    task: Annotated[
        Literal["generate", "edit", "chat"], typer.Option(help="What to estimate; for interleave, choose edit.")
    ] = "generate",
    size: _Size = None,
    images: _Images = None,
    batch: Annotated[int, typer.Option(help="Requests in one batch.")] = 1,
    text_tokens: Annotated[int, typer.Option(help="Tokens of the prompts of one request.")] = 256,
    max_think_token_n: Annotated[
        int | None, typer.Option(show_default="chat: 512, else 0", help="Maximum tokens generated.")
    ] = None,
    graphs: Annotated[bool, typer.Option(help="Capture steps as CUDA graphs, which keep their memory.")] = True,
    available: _Available = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            show_default="BAGEL-7B-MoT",
            help="Model folder; its JSON files are enough.",
            rich_help_panel="Model",
        ),
    ] = None,
    dtype: Annotated[
        cli_options.DTypeName, typer.Option(help="Data type of the weights.", rich_help_panel="Model")
    ] = "bfloat16",
    as_json: cli_options.Json = False,
    *,
    scales: OptionGroup,
) -> None:
    """Show how much GPU memory a request needs, what for, and how to reduce it.

    The exit code is 1 if it does not fit. Computed from sizes alone: no weights are read and no GPU is needed. The KV
    cache, static buffers, captured CUDA graphs and the phases of a request are counted as the runtime allocates them;
    about 1 GB is added for CUDA and its libraries. GB are 10**9 bytes. Later requests of other sizes in the same
    process keep buffers of their own, for at most 16 sizes.
    """
    import torch

    from bagel_rt.models.bagel.config import BAGEL_7B_MOT, BagelConfig
    from bagel_rt.models.bagel.memory import expected_memory
    from bagel_rt.models.bagel.settings import resolve_settings

    if task == "generate" and images:
        raise ValueError(f"--image must be left out for --task generate, got {images[0]}. Use --task edit.")
    estimate = expected_memory(
        BAGEL_7B_MOT if model is None else BagelConfig.from_folder(model),
        dtype=dtype,
        task=task,
        size=cli_options.read_size("--size", size) if size else None,
        images=[cli_options.read_size("--image", image) for image in images] if images else None,
        batch=batch,
        text_tokens=text_tokens,
        max_think_token_n=max_think_token_n,
        settings=resolve_settings("edit" if task == "edit" else "generate", scales.as_arguments()).image,
        graphs=graphs,
    )
    name = model.resolve().name if model else "BAGEL-7B-MoT"
    limit = int(available * 1e9) if available is not None else None
    if limit is None and torch.cuda.is_available():
        limit = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if as_json:
        report = {"model": name} | estimate.as_dict(limit)
        if "advice" in report:
            report["advice"] = [name_options(line, option_flags(memory)) for line in report["advice"]]
        typer.echo(json.dumps(report))
    else:
        typer.echo(f"{name}: {_describe(estimate.workload)}\n{estimate}")
        if limit is not None:
            typer.echo(_verdict(estimate, limit))
    if limit is not None and not estimate.fits(limit):
        raise typer.Exit(1)


def _describe(work: "Workload") -> str:
    """The request in one line: task, sizes, batch and dtype."""
    parts = [work.task]
    if work.draws:
        parts.append(_size_text(work.drawn))
    if work.images:
        parts.append("from " + " and ".join(map(_size_text, work.images)))
    if work.batch > 1:
        parts.append(f"batch of {work.batch}")
    if work.max_think_token_n:
        parts.append(f"up to {work.max_think_token_n} generated tokens")
    return ", ".join([*parts, str(work.dtype).removeprefix("torch.")])


def _size_text(size: tuple[int, int]) -> str:
    height, width = size
    return f"{width}x{height}"


def _verdict(estimate: "MemoryEstimate", limit: int) -> str:
    """Whether the request fits, and what would reduce it."""
    if estimate.fits(limit):
        return f"fits in {limit / 1e9:.1f} GB"
    advice = name_options(estimate.advice_text(limit), option_flags(memory))
    return f"does not fit in {limit / 1e9:.1f} GB\n{advice}"

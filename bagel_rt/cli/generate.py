"""``bagel-rt generate``, ``edit``, ``chat`` and ``interleave``: run the model on prompts and images."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bagel_rt.cli import options as cli_options
from bagel_rt.cli.options import RequestOptions, Think
from bagel_rt.cli.parsing import OptionGroup, hyperparameters, with_options
from bagel_rt.cli.run import Run, numbered
from bagel_rt.models.bagel.settings import MAX_ROUNDS
from bagel_rt.validation import integer


@with_options(settings=hyperparameters("generate"), options=RequestOptions)
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw; put each in quotes.")],
    output: cli_options.Outputs,
    width: cli_options.Side = None,
    height: cli_options.Side = None,
    negative_prompt: cli_options.Negative = None,
    *,
    settings: OptionGroup,
    options: RequestOptions,
) -> None:
    """Generate an image from a prompt, or one from each of several prompts, as one batch.

    The PNG's "parameters" hold the prompt, the seed and all settings. From prompt to prompt the seed increases by one.
    The options under Text need --think.
    """
    request = options.request("generate", settings) | {"negative_prompt": negative_prompt}
    request["size"] = cli_options.read_size(options.folder, width, height)
    with Run("generate", options) as run:
        results = run.bagel.generate(prompts, progress=run.bars, **request)
        for number, (prompt, result) in enumerate(zip(prompts, results, strict=True), start=1):
            path = numbered(output, number) if len(prompts) > 1 else output
            run.write_image(result, path, prompt=prompt, think=options.think)


@with_options(settings=hyperparameters("edit"), options=RequestOptions)
def edit(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image to edit.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to change, in quotes.")],
    output: cli_options.Output,
    more: cli_options.MoreImages = None,
    negative_prompt: cli_options.Negative = None,
    *,
    settings: OptionGroup,
    options: RequestOptions,
) -> None:
    """Edit an image as a prompt says, or combine it with those given by --image.

    The result has the size of the last image given, after the model's resize rule. The PNG's "parameters" hold the
    prompt, the seed and all settings. The options under Text need --think.
    """
    request = options.request("edit", settings) | {"negative_prompt": negative_prompt}
    paths = [image, *(more or ())]
    images = cli_options.read_images(paths)
    with Run("edit", options) as run:
        result = run.bagel.edit(images, prompt, progress=run.bars, **request)
        run.write_image(result, output, prompt=prompt, images=[path.name for path in paths], think=options.think)


@with_options(settings=hyperparameters("chat"), options=RequestOptions)
def chat(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question, in quotes.")],
    images: cli_options.MoreImages = None,
    *,
    settings: OptionGroup,
    options: RequestOptions,
) -> None:
    """Ask about images, or about anything else; the answer is printed while it is generated."""
    request = options.request("chat", settings)
    paths = images or []
    opened = cli_options.read_images(paths)
    with Run("chat", options) as run:
        bars = run.bars if options.as_json or not sys.stdout.isatty() else None  # on a terminal the answer is progress
        pieces = []
        for piece in run.bagel.stream(prompt, opened, progress=bars, **request):
            pieces.append(piece)
            run.print(piece, end="")
        run.print("")
        run.add_text("".join(pieces))
        parameters = {"prompt": prompt, "images": [path.name for path in paths]}
        run.report |= {"seed": request.pop("seed"), "parameters": parameters | request}


@dataclass(frozen=True)
class InterleaveOptions(RequestOptions):
    """Request options with reasoning on by default."""

    think: Think = True


@with_options(settings=hyperparameters("interleave"), options=InterleaveOptions)
def interleave(
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="PART...",
            help="Texts, in quotes, and image files, in order. A part that names a file is an image, any other a text; "
            "force either with image:PART or text:PART.",
        ),
    ],
    output: cli_options.Numbered,
    max_rounds: Annotated[
        int, typer.Option(help=f"Maximum number of images, 1 to {MAX_ROUNDS}."), integer(1, MAX_ROUNDS)
    ] = 3,
    width: cli_options.Side = None,
    height: cli_options.Side = None,
    *,
    settings: OptionGroup,
    options: InterleaveOptions,
) -> None:
    """Texts and images in, texts and images out; for models trained on interleaved generation (ThinkMorph).

    Texts are printed when all is done, with each image's file name in its place. Images have the size of the last
    input image; --width and --height apply if there is none.
    """
    request = options.request("interleave", settings)
    size = cli_options.read_size(options.folder, width, height)
    inputs = [cli_options.read_part(part) for part in parts]
    names = [item if isinstance(item, str) else Path(part).name for part, item in zip(parts, inputs, strict=True)]
    with Run("interleave", options) as run:
        images = 0
        for output_part in run.bagel.interleave(inputs, max_rounds=max_rounds, size=size, progress=run.bars, **request):
            if isinstance(output_part, str):
                run.print(output_part)
                run.add_text(output_part)
            else:
                images += 1
                run.write_image(output_part, numbered(output, images), parts=names, think=options.think)
        run.report |= {"seed": request.pop("seed"), "parameters": {"parts": names} | request}

"""``bagel-rt generate``, ``edit``, ``chat`` and ``interleave``: run the model on prompts and images."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bagel_rt.cli import options as cli_options
from bagel_rt.cli.inputs import check_stdin, read_image, read_parts, read_prompt
from bagel_rt.cli.options import RequestOptions, SizeOptions, Think
from bagel_rt.cli.outputs import OutputOptions
from bagel_rt.cli.parsing import OptionGroup, hyperparameters, with_options
from bagel_rt.cli.run import Run
from bagel_rt.models.bagel.settings import MAX_ROUNDS
from bagel_rt.validation import integer


@with_options(
    target=OutputOptions, dimensions=SizeOptions, settings=hyperparameters("generate"), options=RequestOptions
)
def generate(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT", help="What to generate, in quotes; - reads it from stdin.")
    ],
    *,
    target: OutputOptions,
    dimensions: SizeOptions,
    negative_prompt: cli_options.Negative = None,
    settings: OptionGroup,
    options: RequestOptions,
) -> None:
    """Generate an image from a prompt, or one from each of several prompts, as one batch.

    The prompt, the seed and all settings are stored in the image's metadata. From prompt to prompt the seed increases
    by one. The options under Text need --think.
    """
    request = options.request("generate", settings) | {"negative_prompt": negative_prompt}
    paths = target.paths(len(prompts), len(prompts) > 1, options.as_json)
    request["size"] = dimensions.resolve(options.folder)
    check_stdin(prompts)
    prompts = [read_prompt(prompt) for prompt in prompts]
    with Run("generate", options, target) as run:
        options.show_hint(prompts)
        results = run.bagel.generate(prompts, progress=run.bars, **request)
        lines = [
            run.write_image(result, path, prompt=prompt, think=options.think)
            for path, prompt, result in zip(paths, prompts, results, strict=True)
        ]
        run.print("\n".join(lines))


@with_options(target=OutputOptions, settings=hyperparameters("edit"), options=RequestOptions)
def edit(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image to edit; - reads it from stdin.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to change, in quotes; - reads it from stdin.")],
    *,
    target: OutputOptions,
    more: cli_options.MoreImages = None,
    negative_prompt: cli_options.Negative = None,
    settings: OptionGroup,
    options: RequestOptions,
) -> None:
    """Edit an image as the prompt instructs, or combine it with those of --image.

    The result has the size of the last input image, after the model's resize rule. The prompt, the seed and all
    settings are stored in the image's metadata. The options under Text need --think.
    """
    request = options.request("edit", settings) | {"negative_prompt": negative_prompt}
    (path,) = target.paths(1, False, options.as_json)
    sources = [image, *(more or ())]
    check_stdin([prompt, *map(str, sources)])
    images, prompt = [read_image(source) for source in sources], read_prompt(prompt, "Describe the change")
    with Run("edit", options, target) as run:
        options.show_hint([prompt])
        result = run.bagel.edit(images, prompt, progress=run.bars, **request)
        names = [source.name for source in sources]
        run.print(run.write_image(result, path, prompt=prompt, images=names, think=options.think))


@with_options(settings=hyperparameters("chat"), options=RequestOptions)
def chat(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question, in quotes; - reads it from stdin.")],
    images: cli_options.MoreImages = None,
    *,
    settings: OptionGroup,
    options: RequestOptions,
) -> None:
    """Ask about images, or about anything else; the answer is printed while it is generated."""
    request = options.request("chat", settings)
    sources = images or []
    check_stdin([prompt, *map(str, sources)])
    opened, prompt = [read_image(source) for source in sources], read_prompt(prompt, "Ask a question")
    with Run("chat", options) as run:
        options.show_hint([prompt])
        bars = run.bars if options.as_json or not sys.stdout.isatty() else None  # on a terminal the answer is progress
        pieces = []
        for piece in run.bagel.stream(prompt, opened, progress=bars, **request):
            pieces.append(piece)
            run.print(piece, end="")
        run.print("")
        run.add_text("".join(pieces))
        parameters = {"prompt": prompt, "images": [source.name for source in sources]}
        run.report |= {"seed": request.pop("seed"), "parameters": parameters | request}


@dataclass(frozen=True)
class InterleaveOptions(RequestOptions):
    """Request options with reasoning on by default."""

    think: Think = True


@with_options(
    target=OutputOptions, dimensions=SizeOptions, settings=hyperparameters("interleave"), options=InterleaveOptions
)
def interleave(
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="PART",
            help="Texts, in quotes, and image files, in order. A part that names a file is an image, any other a text; "
            "force either with image:PART or text:PART. - reads a text from stdin, image:- an image.",
        ),
    ],
    *,
    target: OutputOptions,
    max_rounds: Annotated[
        int, typer.Option(help=f"Maximum number of images, 1 to {MAX_ROUNDS}."), integer(1, MAX_ROUNDS)
    ] = 3,
    dimensions: SizeOptions,
    settings: OptionGroup,
    options: InterleaveOptions,
) -> None:
    """Texts and images in, texts and images out; for models trained on interleaved generation (ThinkMorph).

    Texts are printed when all is done, with each image's file name in its place. Images have the size of the last
    input image; --size, --width and --height apply if there is none.
    """
    request = options.request("interleave", settings)
    paths = target.paths(max_rounds, True, options.as_json)
    size = dimensions.resolve(options.folder)
    check_stdin(parts)
    inputs = read_parts(parts)
    names = [entry if isinstance(entry, str) else Path(part).name for part, entry in zip(parts, inputs, strict=True)]
    with Run("interleave", options, target) as run:
        options.show_hint(entry for entry in inputs if isinstance(entry, str))
        images, lines = iter(paths), []
        for output in run.bagel.interleave(inputs, max_rounds=max_rounds, size=size, progress=run.bars, **request):
            if isinstance(output, str):
                run.add_text(output)
                lines.append(output)
            else:
                lines.append(run.write_image(output, next(images), parts=names, think=options.think))
        run.print("\n".join(lines))
        run.report |= {"seed": request.pop("seed"), "parameters": {"parts": names} | request}

"""``bagel-rt generate``, ``edit``, ``chat`` and ``interleave``: run the model on prompts and images."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from bagel_rt.cli import options as cli_options
from bagel_rt.cli.options import RunOptions, with_options
from bagel_rt.cli.run import Run, numbered
from bagel_rt.models.bagel.settings import MAX_ROUNDS, resolve_settings


@with_options
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw; put each in quotes.")],
    output: cli_options.Outputs,
    width: cli_options.Side = None,
    height: cli_options.Side = None,
    seed: cli_options.Seed = None,
    negative_prompt: cli_options.Negative = None,
    think: cli_options.Think = False,
    *,
    settings: cli_options.hyperparameters("generate"),
    options: RunOptions,
) -> None:
    """Generate an image from a prompt, or one from each of several prompts, as one batch.

    The PNG's "parameters" hold the prompt, the seed and all settings. From prompt to prompt the seed increases by one.
    The options under Text need --think.
    """
    resolve_settings("generate", vars(settings))
    size, seed = cli_options.read_size(options.folder, width, height), cli_options.read_seed(seed)
    request = {"size": size, "seed": seed, "negative_prompt": negative_prompt, "think": think} | vars(settings)
    with Run("generate", options) as run:
        results = run.bagel.generate(prompts, progress=run.bars, **request)
        for number, (prompt, result) in enumerate(zip(prompts, results, strict=True), start=1):
            path = numbered(output, number) if len(prompts) > 1 else output
            run.write_image(result, path, prompt=prompt, think=think)


@with_options
def edit(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image to edit.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to change, in quotes.")],
    output: cli_options.Output,
    more: cli_options.MoreImages = None,
    seed: cli_options.Seed = None,
    negative_prompt: cli_options.Negative = None,
    think: cli_options.Think = False,
    *,
    settings: cli_options.hyperparameters("edit"),
    options: RunOptions,
) -> None:
    """Edit an image as a prompt says, or combine it with those given by --image.

    The result has the size of the last image given, after the model's resize rule. The PNG's "parameters" hold the
    prompt, the seed and all settings. The options under Text need --think.
    """
    resolve_settings("edit", vars(settings))
    paths, seed = [image, *(more or ())], cli_options.read_seed(seed)
    images = cli_options.read_images(paths)
    request = {"seed": seed, "negative_prompt": negative_prompt, "think": think} | vars(settings)
    with Run("edit", options) as run:
        result = run.bagel.edit(images, prompt, progress=run.bars, **request)
        run.write_image(result, output, prompt=prompt, images=[path.name for path in paths], think=think)


@with_options
def chat(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question, in quotes.")],
    images: cli_options.MoreImages = None,
    seed: cli_options.Seed = None,
    think: cli_options.Think = False,
    *,
    settings: cli_options.hyperparameters("chat"),
    options: RunOptions,
) -> None:
    """Ask about images, or about anything else; the answer is printed while it is generated."""
    resolve_settings("chat", vars(settings))
    paths, seed = images or [], cli_options.read_seed(seed)
    opened = cli_options.read_images(paths)
    with Run("chat", options) as run:
        bars = run.bars if options.as_json or not sys.stdout.isatty() else None  # on a terminal the answer is progress
        pieces = []
        for piece in run.bagel.stream(prompt, opened, think=think, seed=seed, progress=bars, **vars(settings)):
            pieces.append(piece)
            run.print(piece, end="")
        run.print("")
        run.add_text("".join(pieces))
        request = {"prompt": prompt, "images": [path.name for path in paths], "think": think}
        run.report |= {"seed": seed, "parameters": request | vars(settings)}


@with_options
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
    max_rounds: Annotated[int, typer.Option(min=1, max=MAX_ROUNDS, metavar="N", help="Maximum number of images.")] = 3,
    width: cli_options.Side = None,
    height: cli_options.Side = None,
    seed: cli_options.Seed = None,
    think: cli_options.Think = True,
    *,
    settings: cli_options.hyperparameters("interleave"),
    options: RunOptions,
) -> None:
    """Texts and images in, texts and images out; for models trained on interleaved generation (ThinkMorph).

    Texts are printed when all is done, with each image's file name in its place. Images have the size of the last
    input image; --width and --height apply if there is none.
    """
    resolve_settings("interleave", vars(settings))
    size, seed = cli_options.read_size(options.folder, width, height), cli_options.read_seed(seed)
    inputs = [cli_options.read_part(part) for part in parts]
    names = [made if isinstance(made, str) else Path(part).name for part, made in zip(parts, inputs, strict=True)]
    request = {"think": think, "max_rounds": max_rounds, "size": size, "seed": seed} | vars(settings)
    with Run("interleave", options) as run:
        images = 0
        for made in run.bagel.interleave(inputs, progress=run.bars, **request):
            if isinstance(made, str):
                run.print(made)
                run.add_text(made)
            else:
                images += 1
                run.write_image(made, numbered(output, images), parts=names, think=think)
        run.report |= {"seed": seed, "parameters": {"parts": names, "think": think} | vars(settings)}

"""``bagel-rt make-random-checkpoint``: write model folders."""

import json
from pathlib import Path
from typing import Annotated

import typer

from bagel_rt.cli import options as cli_options
from bagel_rt.cli.parsing import with_options
from bagel_rt.models.bagel.settings import check_seed
from bagel_rt.validation import number


@with_options()
def make_random_checkpoint(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write: new or empty.")],
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", show_default="BAGEL-7B-MoT", help="Model folder whose shapes and tokenizer are used."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    shard_gib: Annotated[
        float | None,
        typer.Option(show_default="one file", help="Write shards of about this size, in GiB."),
        number(0, 1024),
    ] = None,
    as_json: cli_options.Json = False,
    progress: cli_options.Progress = None,
) -> None:
    """Write a model folder with random weights (29 GB by default), to measure speed and memory.

    The tokenizer is that of --like, or the embedded model's, with a few hundred tokens. The same seed gives the same
    weights.
    """
    from bagel_rt.models.bagel.config import BAGEL_7B_MOT, BagelConfig
    from bagel_rt.models.bagel.random_checkpoint import make_random_checkpoint as make

    check_seed(seed)
    config = BAGEL_7B_MOT if like is None else BagelConfig.from_folder(like)
    tokenizer = {} if like is None else {"tokenizer": like}
    shard_bytes = None if shard_gib is None else int(shard_gib * 2**30)
    size = make(folder, config, seed, shard_bytes, progress is not False, **tokenizer)
    report = {"folder": str(folder), "seed": seed, "bytes": size}
    typer.echo(json.dumps(report) if as_json else f"{folder}: {size:,} bytes of random weights, seed {seed}")

"""``bagel-rt serve``: the OpenAI-compatible server."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from bagel_rt.cli import options as cli_options

_MISSING = "the server's packages are not installed ({}): pip install 'bagel_rt[serve]'"


def _limit(kind, metavar: str, help: str):
    return Annotated[kind | None, typer.Option(metavar=metavar, help=help, rich_help_panel="Limits")]


def serve(
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", show_default="the folder's", help="Of the model, in answers.")
    ] = None,
    image_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A host that pictures may be fetched from, over HTTPS. Repeatable."),
    ] = None,
    queue: _limit(int, "N", "Requests that may wait; one more gets 429.") = None,
    batch: _limit(int, "N", "Pictures drawn together.") = None,
    seconds: _limit(float, "X", "For a request, until 504.") = None,
    grace: _limit(float, "X", "For requests under way when the server is told to stop.") = None,
    body: _limit(int, "BYTES", "Of a request.") = None,
    pixels: _limit(int, "N", "Of a picture in a request.") = None,
    side: _limit(int, "PIXELS", "Of a picture to be drawn.") = None,
    steps: _limit(int, "N", "Timesteps of a picture.") = None,
    ray: Annotated[bool, typer.Option("--ray", help="Replicas under Ray Serve, one a GPU (extra [ray]).")] = False,
    replicas: Annotated[int | None, typer.Option(min=1, metavar="N", show_default="1", help="With --ray.")] = None,
    model: cli_options.Model = None,
    device: cli_options.Device = None,
    dtype: cli_options.DType = None,
) -> None:
    """Serve a model over HTTP, with OpenAI's interface: pictures, edits, chat.

    With BAGEL_RT_API_KEY in the environment, clients must send it as a bearer token. SIGTERM and Ctrl-C let requests
    under way finish, for the time of --grace.
    """
    try:
        from bagel_rt.serve.app import create_app
        from bagel_rt.serve.limits import Limits
        from bagel_rt.serve.middleware import read_key
        from bagel_rt.serve.run import make_server
    except ModuleNotFoundError as error:
        raise ValueError(_MISSING.format(error.name)) from None
    from bagel_rt.checkpoint import DEFAULT_MODEL
    from bagel_rt.pipeline import Bagel

    given = {
        "queue": queue,
        "batch": batch,
        "seconds": seconds,
        "grace": grace,
        "body": body,
        "pixels": pixels,
        "side": side,
        "steps": steps,
    }
    given = {key: value for key, value in given.items() if value is not None}
    limits = Limits(**given)
    key = read_key()
    cli_options.check_address(host, port)
    if ray:
        _serve_replicas(host, port, folder=model and str(model), name=name, replicas=replicas or 1, device=device,
                        dtype=dtype, limits=given, image_hosts=tuple(image_host or ()))  # fmt: skip
        return
    if replicas is not None:
        raise ValueError(f"--replicas is {replicas}, but one process has one model: give --ray too")
    folder = Path(model or DEFAULT_MODEL)
    bagel = Bagel.from_pretrained(folder, cli_options.read_device(device), cli_options.read_dtype(dtype))
    hosts = frozenset(entry.lower() for entry in image_host or ())
    app = create_app(bagel, name or folder.resolve().name, limits, key, hosts)
    warnings.filterwarnings("ignore", module="PIL")  # of damaged pictures: clients could fill the log with them
    make_server(app, host, port).run()


def _serve_replicas(host: str, port: int, **options) -> None:
    from bagel_rt.serve import replicas

    if find_spec("ray") is None:
        raise ValueError("Ray is not installed: pip install 'bagel_rt[ray]'")
    if options["device"] not in (None, "cpu", "cuda"):
        raise ValueError(f"--device is {options['device']}: replicas take cpu, or cuda for a GPU each")
    replicas.run(replicas.Options(**options), host, port)

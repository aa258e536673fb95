"""``bagel-rt serve``: the OpenAI-compatible server."""

import warnings
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from bagel_rt.cli.options import ModelOptions, Port, check_address
from bagel_rt.cli.parsing import OptionGroup, option_group, with_options
from bagel_rt.serve.limits import Limits
from bagel_rt.validation import integer

_MISSING = "the server's packages are not installed ({}): pip install 'bagel_rt[serve]'"

_LIMITS = ("queue", "batch", "seconds", "grace", "body", "pixels", "side", "steps")
_LimitOptions = option_group("_LimitOptions", [Limits.__dataclass_fields__[name] for name in _LIMITS], "Limits")


@with_options(limits=_LimitOptions, options=ModelOptions)
def serve(
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Port = 8000,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", show_default="the folder's", help="Name of the model in responses.")
    ] = None,
    image_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A host to fetch images from, over HTTPS. Repeatable."),
    ] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="Write each log record as a JSON object.")] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Run replicas under Ray Serve, one per GPU; needs the extra [ray].")
    ] = False,
    replicas: Annotated[
        int | None, typer.Option(show_default="1", help="Number of replicas, with --ray."), integer(1)
    ] = None,
    *,
    limits: OptionGroup,
    options: ModelOptions,
) -> None:
    """Serve a model over HTTP, with OpenAI's API: images, edits, chat.

    With BAGEL_RT_API_KEY in the environment, clients must send it as a bearer token. SIGTERM and Ctrl-C let running
    requests finish, for at most --grace seconds; a second signal ends the server at once.
    """
    try:
        from bagel_rt.serve.app import create_app
        from bagel_rt.serve.middleware import read_key
        from bagel_rt.serve.run import make_server
    except ModuleNotFoundError as error:
        raise ValueError(_MISSING.format(error.name)) from None

    checked = Limits(**limits.as_arguments())
    key = read_key()
    check_address(host, port)
    if ray:
        _serve_replicas(host, port, folder=options.model and str(options.model), name=name, replicas=replicas or 1,
                        device=options.device, dtype=options.dtype, limits=limits.as_arguments(),
                        image_hosts=tuple(image_host or ()))  # fmt: skip
        return
    if replicas is not None:
        raise ValueError(f"--replicas {replicas} needs --ray: a process has one model.")
    hosts = frozenset(entry.lower() for entry in image_host or ())
    app = create_app(options.load(), name or options.folder.resolve().name, checked, key, hosts)
    warnings.filterwarnings("ignore", module="PIL")  # about damaged images: clients could fill the log with them
    make_server(app, host, port, json_logs=log_json).run()


def _serve_replicas(host: str, port: int, **options: Any) -> None:
    from bagel_rt.serve import replicas

    if find_spec("ray") is None:
        raise ValueError("Ray is not installed: pip install 'bagel_rt[ray]'")
    if options["device"] not in (None, "cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda with --ray, got {options['device']}. Each replica gets a GPU.")
    replicas.run(replicas.Options(**options), host, port)

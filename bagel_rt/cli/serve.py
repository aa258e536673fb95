"""``bagel-rt serve``: the OpenAI-compatible server."""

import re
import warnings
from importlib.util import find_spec
from pathlib import Path
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
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default="localhost if --host is local, else all",
            help="Allowed value of the Host header, without the port. Repeatable.",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Origin of web pages that may use this server from a browser. Repeatable."),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate chain in PEM format, for HTTPS.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Private key of --tls-cert, unless that file contains it.")
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

    With BAGEL_RT_API_KEY in the environment, clients must send it as a bearer token; BAGEL_RT_API_KEY_FILE names a
    file with one key per line. On SIGTERM or Ctrl-C, running requests have --grace seconds to finish; a second signal
    ends the server at once.
    """
    try:
        from bagel_rt.serve.app import create_app
        from bagel_rt.serve.hosts import LOOPBACK_NAMES
        from bagel_rt.serve.middleware import read_keys
        from bagel_rt.serve.run import make_server
    except ModuleNotFoundError as error:
        raise ValueError(_MISSING.format(error.name)) from None

    hosts = frozenset(entry.lower() for entry in image_host or ())
    for host_name in hosts:
        if re.fullmatch("[a-z0-9_.-]+", host_name) is None:
            raise ValueError(f"--image-host must be a host name, such as example.com, got {host_name!r}.")
    checked = Limits(**limits.as_arguments())
    keys = read_keys()
    if tls_key is not None and tls_cert is None:
        raise ValueError("--tls-key needs --tls-cert.")
    check_address(host, port)
    allowed_hosts = tuple(allowed_host or (LOOPBACK_NAMES if host in LOOPBACK_NAMES else ())) or None
    origins = tuple(allow_origin or ())
    if ray:
        for option, value in (("--log-json", log_json), ("--tls-cert", tls_cert)):
            if value:
                raise ValueError(f"{option} has no effect with --ray. Ray's proxy listens and logs.")
        _serve_replicas(host, port, options, name=name, replicas=replicas or 1, limits=limits.as_arguments(),
                        image_hosts=tuple(image_host or ()), allowed_hosts=allowed_hosts, origins=origins)  # fmt: skip
        return
    if replicas is not None:
        raise ValueError(f"--replicas {replicas} needs --ray: a process has one model.")
    options.check()
    app = create_app(options.load, name or options.folder.resolve().name, checked, keys, hosts,
                     allowed_hosts, origins)  # fmt: skip
    # Pillow warns about damaged images, with which clients could fill the log.
    warnings.filterwarnings("ignore", module="PIL")
    make_server(app, host, port, json_logs=log_json, tls_cert=tls_cert, tls_key=tls_key).run()


def _serve_replicas(host: str, port: int, options: ModelOptions, **deployment: Any) -> None:
    from bagel_rt.serve import replicas

    if find_spec("ray") is None:
        raise ValueError("Ray is not installed: pip install 'bagel_rt[ray]'")
    if options.device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda with --ray, got {options.device}. Each replica gets a GPU.")
    model = vars(options) | {"folder": options.model and str(options.model)}
    model.pop("model")
    replicas.run(replicas.Options(**model, **deployment), host, port)

"""``bagel-rt ui``: the page in the browser."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from bagel_rt.cli import options as cli_options

_MISSING = "the page's packages are not installed ({}): pip install 'bagel_rt[ui]'"


def ui(
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0 takes a free one.")] = 7860,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = False,
    model: cli_options.Model = None,
    device: cli_options.Device = None,
    dtype: cli_options.DType = None,
) -> None:
    """Draw, edit, ask and talk on a page in the browser.

    Whoever reaches the address can use it: there is no password. Pictures and uploads are deleted at the end.
    """
    try:
        from bagel_rt.ui.app import Page
    except ModuleNotFoundError as error:
        raise ValueError(_MISSING.format(error.name)) from None
    cli_options.check_address(host, port)
    from bagel_rt.checkpoint import DEFAULT_MODEL
    from bagel_rt.pipeline import Bagel

    folder = Path(model or DEFAULT_MODEL).resolve()
    bagel = Bagel.from_pretrained(folder, cli_options.read_device(device), cli_options.read_dtype(dtype), progress=True)
    with Page(bagel, folder.name, folder == DEFAULT_MODEL.resolve()) as page:
        page.open(host, port)
        typer.echo(f"The page is at {page.url}; Ctrl-C ends it.")
        if browser:
            webbrowser.open(page.url)
        page.wait()

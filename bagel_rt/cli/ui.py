"""``bagel-rt ui``: the page in the browser."""

import webbrowser
from typing import Annotated

import typer

from bagel_rt.checkpoint import DEFAULT_MODEL
from bagel_rt.cli.options import ModelOptions, Port, check_address
from bagel_rt.cli.parsing import with_options

_MISSING = "the page's packages are not installed ({}): pip install 'bagel_rt[ui]'"


@with_options(options=ModelOptions)
def ui(
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Port = 7860,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = False,
    *,
    options: ModelOptions,
) -> None:
    """Generate, edit, ask and chat on a page in the browser.

    There is no password: anyone who can reach the address can use it. Images and uploads are deleted at the end.
    """
    try:
        from bagel_rt.ui.app import Page
    except ModuleNotFoundError as error:
        raise ValueError(_MISSING.format(error.name)) from None
    check_address(host, port)
    folder = options.folder.resolve()
    with Page(options.load(progress=True), folder.name, folder == DEFAULT_MODEL.resolve()) as page:
        page.open(host, port)
        typer.echo(f"The page is at {page.url}; Ctrl-C ends it.")
        if browser:
            webbrowser.open(page.url)
        page.wait()

"""The page: one tab per task over one model, and a gallery of the session's images."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import gradio as gr

from bagel_rt import __version__
from bagel_rt.pipeline import Bagel
from bagel_rt.ui.abilities import abilities_of
from bagel_rt.ui.chat_tab import ChatTab
from bagel_rt.ui.controls import EVENT
from bagel_rt.ui.examples import Examples
from bagel_rt.ui.gallery import Gallery
from bagel_rt.ui.image_tab import ImageTab
from bagel_rt.ui.jobs import MAX_JOBS, Jobs
from bagel_rt.ui.script import SCRIPT
from bagel_rt.ui.theme import CSS, masthead, theme
from bagel_rt.ui.uploads import MAX_UPLOAD
from bagel_rt.ui.vqa_tab import VqaTab

_DAY = 24 * 3600


class Page:
    """The page with its jobs and files. A context manager: leaving it cancels requests and deletes all files.

    Attributes:
        url: address of the page once it is open.
    """

    def __init__(self, bagel: Bagel, name: str, small: bool):
        """
        Args:
            bagel: used by the page alone from now on.
            name: of the model, as shown.
            small: whether it is the embedded model of colored shapes, which has examples of its own.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="bagel_rt-", ignore_cleanup_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = self._folder.name  # for uploads and copies of shown files
        dtype = str(bagel.model.dtype).removeprefix("torch.")
        source = {"model": name, "version": __version__, "dtype": dtype}
        self._jobs, self._gallery = Jobs(bagel), Gallery(Path(self._folder.name), source)
        self._abilities = abilities_of(bagel.model.config, small)
        self._blocks = self._build(masthead(name, str(bagel.model.device), dtype, self._abilities.summary), small)
        self.url = ""

    def open(self, host: str, port: int) -> None:
        """Serve the page from background threads. Port 0 takes a free one.

        Raises:
            ValueError: the address cannot be bound.
        """
        queue = self._blocks.queue(default_concurrency_limit=None, max_size=2 * MAX_JOBS)  # the queue is in Jobs
        try:
            _, self.url, _ = queue.launch(
                server_name=host,
                server_port=port or _free_port(),
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                max_file_size=MAX_UPLOAD,
                max_threads=2 * MAX_JOBS,
                footer_links=[],
                enable_monitoring=False,
                theme=theme(),
                css=CSS,
                head=f"<script>{SCRIPT}</script>",
            )
        except OSError as error:
            raise ValueError(f"cannot bind {host}, port {port}. Use another port, or 0 for a free one.") from error

    def wait(self) -> None:
        """Serve until interrupted."""
        self._blocks.block_thread()

    def __enter__(self) -> "Page":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._jobs.close()
        self._blocks.close(verbose=False)
        self._folder.cleanup()

    def _build(self, head: str, small: bool) -> gr.Blocks:
        abilities, examples = self._abilities, Examples(Path(self._folder.name), small)
        shown = gr.Gallery(
            label="Images of this session",
            columns=6,
            height="auto",
            object_fit="contain",
            fit_columns=False,
            interactive=False,
            buttons=["download", "fullscreen"],
            visible=False,
            render=False,
            elem_id="gallery",
            elem_classes="sharp",
        )
        with gr.Blocks(title="bagel_rt", analytics_enabled=False, delete_cache=(3600, _DAY), fill_width=True) as blocks:
            gr.HTML(head, elem_classes="bare")
            with gr.Tabs(elem_id="tasks") as tabs:
                with gr.Tab("Text to image", id="draw"):
                    draw = ImageTab(self._jobs, self._gallery, shown, abilities, examples.draw)
                with gr.Tab("Image editing", id="edit"):
                    edit = ImageTab(self._jobs, self._gallery, shown, abilities, examples.edit, edits=True)
                with gr.Tab("Image understanding", id="ask"):
                    ask = VqaTab(self._jobs, abilities, examples.ask)
                with gr.Tab("Interleaved chat", id="chat"):
                    ChatTab(self._jobs, self._gallery, shown, abilities, examples.chat)
            shown.render()
            for tab in (draw, edit):
                for button, image, to in ((tab.edit, edit.input, "edit"), (tab.ask, ask.input, "ask")):
                    button.click(_carry(to), tab.result, [image, tabs], **EVENT)
            blocks.unload(self._leave)
        return blocks

    def _leave(self, request: gr.Request) -> None:
        self._jobs.leave(request.session_hash)
        self._gallery.leave(request.session_hash)


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port: int = trial.getsockname()[1]
        return port


def _carry(tab: str) -> Callable[[str], tuple[list[str], gr.Tabs]]:
    """A handler that sends an image to another tab."""
    return lambda path: ([path], gr.Tabs(selected=tab))
